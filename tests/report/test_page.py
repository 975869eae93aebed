"""Reports in a reader's browser: nothing is fetched, nothing fails, nothing of a name is taken for markup."""

from pathlib import Path
from typing import Any

import pytest

from mezzotint.bench.cases import Case, Op
from mezzotint.bench.result import BenchResult, CaseResult, Measurement, Roof
from mezzotint.errors import DataError
from mezzotint.report.bench import bench_page, spell_rate, spell_seconds
from mezzotint.report.page import write_page

HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>"


def result(name: str = HOSTILE) -> BenchResult:
    def times(scale: float) -> tuple[float, ...]:
        return tuple(scale * (1 + 0.01 * (i % 3)) for i in range(9))

    cases = []
    for op, shape in ((Op.MATMUL, (64, 64, 64)), (Op.ATTENTION, (1, 2, 64, 32)), (Op.ADD, (1000,))):
        case = Case(op=op, shape=shape)
        measurements = tuple(
            Measurement(case=case, format=fmt, kernels="torch", seconds=times(scale))
            for fmt, scale in (("float32", 1e-4), ("bfloat16", 5e-5))
        )
        refused = (("tfloat32", HOSTILE),) if op is Op.MATMUL else ()
        cases.append(CaseResult(case=case, measurements=measurements, again=times(1e-4), refused=refused))
    roofs = tuple(Roof(format=f, value=v, source="published") for f, v in (("", 1e10), ("float32", 1e11)))
    return BenchResult(device="cpu", name=name, facts={"torch": HOSTILE}, roofs=roofs, cases=tuple(cases))


def test_the_page_is_whole_and_escaped() -> None:
    page = bench_page(result(), f"mezzotint bench --out {HOSTILE}")
    assert "<img src=x" not in page
    assert page.startswith("<!doctype html>")
    assert "run 2.0 times as fast as in float32" in page


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_page(path, "text")
    assert path.read_text() == "text"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    with pytest.raises(DataError, match="cannot be written"):
        write_page(path / "below" / "report.html", "text")


def test_figures_as_words() -> None:
    assert [spell_rate(v, "B/s") for v in (312e12, 1.5e9, 2e6, 12)] == ["312 TB/s", "1.5 GB/s", "2 MB/s", "12 B/s"]
    assert [spell_seconds(v) for v in (2.5, 1.25e-3, 3.2e-6)] == ["2.5 s", "1.25 ms", "3.2 us"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_chromium(browser: Any, tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "report.html"
    write_page(path, bench_page(result(), f"mezzotint {HOSTILE}"))
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 800})
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("#roofline .scatterlayer .point")
    page.wait_for_selector("#bandwidth .bars .point")
    assert complaints == []
    assert requests == [path.as_uri()]
    assert page.title() != "taken"
    assert page.locator("img").count() == 0
    assert page.locator("#roofline .scatterlayer .point").count() >= 4
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    text, ground = page.evaluate(
        "[document.querySelector('#roofline text'), document.body].map((part) => getComputedStyle(part))"
        ".map((style, index) => index ? style.backgroundColor : style.fill)"
    )
    assert text == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(232, 234, 237)")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
    page.close()
