"""The proof's report in a reader's browser, and as text: on runs made by hand, judged as any others are."""

import json
import math
import random
import re
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from rich.console import Console

from mezzotint.parity.design import CURVE, DISTANCE, VALIDATION_LOSS, Arm, Better, Experiment, Metric, Source
from mezzotint.parity.result import Proof, Run, RunStatus, Verdict
from mezzotint.parity.verdict import judge
from mezzotint.report.page import write_page
from mezzotint.report.proof import proof_page
from mezzotint.report.proof_text import markdown, print_proof, verdict_lines

HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>"
USERS = Metric(name="accuracy", margin=0.01, is_relative=False, better=Better.HIGHER)
METRICS = (VALIDATION_LOSS, CURVE, USERS, DISTANCE)


@dataclass(frozen=True)
class Case:
    """A treatment: the share by which its losses differ, their own noise, how many seeds end how."""

    effect: float = 0.0
    noise: float = 0.0005
    num_ended: int = 0
    end: RunStatus = RunStatus.DIVERGED


SAME = Case(noise=0.0)
GOOD = Case(effect=0.0005)
WORSE = Case(effect=0.03)
BETTER = Case(effect=-0.03)
OPEN = Case(effect=0.002, noise=0.01)
DIVERGED = Case(num_ended=2)
NO_MEMORY = Case(num_ended=99, end=RunStatus.OUT_OF_MEMORY)


def run_of(arm: str, seed: int, steps: int, case: Case, *, is_ended: bool, has_times: bool = True) -> Run:
    """A run whose losses follow the seed, and the arm's effect by a little noise of each run's own."""
    data, own = random.Random(seed), random.Random(f"{arm}{seed}")
    effect = 1 + case.effect + case.noise * own.gauss(0, 1)
    losses = [(2.0 + 3.0 * math.exp(-4 * step / steps) + 0.1 * data.gauss(0, 1)) * effect for step in range(steps)]
    is_control = arm == "float32"
    run = Run(
        arm=arm, seed=seed, status=RunStatus.FINISHED, losses=tuple(losses),
        values={
            "validation_loss": mean(losses[-steps // 10 :]) * 1.02, "curve": mean(losses), "distance": 3.1,
            "accuracy": 0.5 + 0.2 / effect,
        },
        seconds=tuple(0.3 * (1 if is_control else 0.6) * (1 + 0.02 * own.random()) for _ in range(20)) * has_times,
        memory_bytes={
            "weights": 12_329_984, "states": 24_660_088, "gradients": 12_329_984,
            "activations": 199_499_788 if is_control else 124_000_000, "cast_cache": 0 if is_control else 6_100_000,
            "temporaries": 30_000_000, "peak": 255_000_000 if is_control else 181_000_000,
        } if has_times else {},
        num_parameters=3_082_496, tokens_per_step=2048,
        weights_digest=f"{data.getrandbits(64) if not case.noise else own.getrandbits(64):016x}",
    )  # fmt: skip
    if not is_ended:
        return run
    cut = tuple(losses[: steps // 3])
    if case.end is RunStatus.DIVERGED:
        cut = (*cut, math.nan)
    return replace(run, status=case.end, losses=cut, values={}, message=f"it ended {HOSTILE}", skipped_steps=3)


def proof_of(
    *cases: Case,
    seeds: int = 4,
    steps: int = 120,
    has_times: bool = True,
    metrics: tuple[Metric, ...] = METRICS,
    max_seeds: int = 0,
    name: str = "bf16-mixed",
) -> Proof:
    names = [name if not index else f"{name}-{index}" for index in range(len(cases))]
    experiment = Experiment(
        source=Source.SCRIPT,
        target=f"train.py:make_run {HOSTILE}",
        arms=(
            Arm(name="float32", policy="float32"),
            *(Arm(name=one, policy="bf16-mixed", settings=(HOSTILE,)) for one in names),
        ),
        seeds=tuple(range(seeds)),
        steps=steps,
        metrics=metrics,
        max_seeds=max_seeds,
        recipe_toml=f"[train]\nsteps = 3 # {HOSTILE}",
    )
    runs = [
        run_of(arm, seed, steps, case, is_ended=seed < case.num_ended, has_times=has_times)
        for arm, case in (("float32", SAME), *zip(names, cases, strict=True))
        for seed in range(seeds)
    ]
    return Proof(
        experiment=experiment,
        runs=tuple(runs),
        results=judge(experiment, runs),
        machine={"cpu": "AMD EPYC", "threads": "2", "torch": f"2.13.0 {HOSTILE}"},
        command=f"mezzotint prove train.py:make_run --out '{HOSTILE}'",
        date="2026-11-28",
        notes=(f"Products take 41% of the step {HOSTILE}.",),
    )


EVERY_KIND = (GOOD, WORSE, OPEN, BETTER, NO_MEMORY, SAME)


def opened(browser: Any, tmp_path: Path, proof: Proof, scheme: str = "light", width: int = 1100) -> Any:
    """Return the page, whose `complaints` are what went wrong in it."""
    path = tmp_path / "report.html"
    write_page(path, proof_page(proof))
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    page.complaints = []
    page.on(
        "request",
        lambda request: None if request.url == path.as_uri() else page.complaints.append(request.url),
    )
    page.on("console", lambda message: page.complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(path.as_uri())
    return page


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 390)])
def test_every_kind_of_verdict_in_chromium(browser: Any, tmp_path: Path, scheme: str, width: int) -> None:
    page = opened(browser, tmp_path, proof_of(*EVERY_KIND), scheme, width)
    page.wait_for_selector("#curves .scatterlayer .trace")
    page.wait_for_selector("#difference-0 .main-svg")
    assert page.complaints == []
    assert page.title() != "taken"
    assert page.locator("img").count() == 0
    badges = [text.lower() for text in page.locator(".badge").all_inner_texts()]
    assert badges == ["equivalent", "worse", "undecided", "better", "invalid", "identical"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    text, ground = page.evaluate(
        "[document.querySelector('#curves text'), document.body].map((part) => getComputedStyle(part))"
        ".map((style, index) => index ? style.backgroundColor : style.fill)"
    )
    assert text == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(232, 234, 237)")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
    page.close()


def test_the_first_screen_says_it_all(browser: Any, tmp_path: Path) -> None:
    """Verdict, the three figures with their intervals and the margin are seen without scrolling."""
    page = opened(browser, tmp_path, proof_of(GOOD))
    card = page.locator(".card")
    assert card.bounding_box()["y"] + card.bounding_box()["height"] < 500
    assert page.locator("h1").inner_text() == "bf16-mixed is equivalent to float32"
    values = page.locator(".tile b").all_inner_texts()
    notes = page.locator(".tile small").all_inner_texts()
    assert values[:2] == ["×0.60", "×0.71"]
    assert re.fullmatch(r"0\.5\d+ to 0\.6\d+ at 95%", notes[0])
    assert values[2].endswith("%")
    assert "at 90%; margin ±0.5%" in notes[2]
    page.close()


def test_intervals_stand_where_they_are(browser: Any, tmp_path: Path) -> None:
    """The picture of an equivalent metric lies inside the margin's field, that of a worse one leaves the frame."""
    page = opened(browser, tmp_path, proof_of(GOOD, WORSE))
    boxes = page.evaluate(
        "[...document.querySelectorAll('.forest')].map((frame) => [...frame.children].map((part) =>"
        " [part.className, part.getBoundingClientRect().left, part.getBoundingClientRect().right]))"
    )
    good, worse = dict_of(boxes[0]), dict_of(boxes[len(METRICS)])
    assert good["within"][0] < good["line"][0] < good["line"][1] < good["within"][1]
    assert "cut right" in worse
    assert worse["line"][0] > worse["within"][1]
    page.close()


def dict_of(parts: list[list[Any]]) -> dict[str, tuple[float, float]]:
    return {name: (left, right) for name, left, right in parts}


def test_bands_and_margins_are_drawn(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, proof_of(GOOD))
    margins = page.evaluate(
        "document.getElementById('difference-0').layout.shapes.map((shape) => shape.y0).sort((a, b) => a - b)"
    )
    assert margins == pytest.approx([-0.5, 0, 0.5])
    fills = page.evaluate(
        "['curves', 'difference-0'].map((id) => document.getElementById(id).data.filter("
        "(trace) => trace.fill === 'toself').length)"
    )
    assert fills == [2, 1]  # one for each arm, one for the interval
    page.close()


@pytest.mark.parametrize(
    "proof",
    [
        proof_of(OPEN, seeds=2, has_times=False),
        proof_of(GOOD, OPEN, seeds=50, steps=30),
        proof_of(DIVERGED, NO_MEMORY),
        proof_of(GOOD, metrics=(USERS,)),
        proof_of(GOOD, metrics=(replace(USERS, name="bleu"), VALIDATION_LOSS)),  # a metric that no run has
        proof_of(GOOD, steps=1),
        proof_of(GOOD, seeds=3, max_seeds=8),
        proof_of(GOOD, name="a." + "long-name" * 12),
    ],
    ids=["no times", "50 seeds", "ended early", "no loss", "missing", "one step", "sequential", "long name"],
)
def test_unusual_proofs(browser: Any, tmp_path: Path, proof: Proof) -> None:
    page = opened(browser, tmp_path, proof, width=390)
    assert page.complaints == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.close()
    assert verdict_lines(Proof.from_json(json.loads(json.dumps(proof.to_json())))) == verdict_lines(proof)
    for text in (printed(proof), markdown(proof)):
        assert str(proof.results[0].verdict) in text or proof.results[0].verdict is Verdict.INVALID
        assert "nan" not in text.lower().replace("became nan", "")


def test_long_tables_of_seeds_are_folded(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, proof_of(GOOD, seeds=40))
    details = page.locator("details:has-text('80 runs')")
    assert details.get_attribute("open") is None
    details.locator("summary").click()
    assert details.locator("tbody tr:visible").count() == 80
    page.close()


def test_the_page_in_print(browser: Any, tmp_path: Path) -> None:
    page = opened(browser, tmp_path, proof_of(GOOD), "dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('#curves text')).fill") == "rgb(0, 0, 0)"
    assert page.evaluate("getComputedStyle(document.querySelector('.badge')).color") == "rgb(26, 127, 55)"
    page.close()


def printed(proof: Proof, width: int = 80) -> str:
    out = StringIO()
    print_proof(Console(file=out, width=width, highlight=False), proof, report_path="report.html")
    return out.getvalue()


def test_verdicts_name_margin_interval_and_pairs() -> None:
    lines = verdict_lines(proof_of(*EVERY_KIND))
    for line, words in zip(
        lines,
        [
            ("bf16-mixed is equivalent to float32", "90% interval", "within the margin of 0.5%", "4 pairs"),
            ("bf16-mixed-1 is worse than float32", "beyond the margin of 0.5%"),
            ("bf16-mixed-2 against float32 is undecided", "neither within the margin", "pairs would decide"),
            ("bf16-mixed-3 is better than float32", "beyond the margin of 0.5%"),
            ("bf16-mixed-4 was not tested", "0 pairs finished"),
            ("bf16-mixed-5 is identical to float32", "same bits"),
        ],
        strict=True,
    ):
        assert all(word in line for word in words), line


def test_a_divergence_is_said_before_the_means_of_the_others() -> None:
    (line,) = verdict_lines(proof_of(DIVERGED))
    assert "diverged in 2 of 4 runs" in line
    assert "margin" not in line


def test_the_terminal_keeps_to_80_columns() -> None:
    proof = proof_of(*EVERY_KIND)
    proof = replace(proof, notes=("[bold]no markup[/bold]",))
    text = printed(proof)
    tables = [line for line in text.splitlines() if "±" in line or "[" in line]
    assert max(map(len, text.splitlines())) <= 80
    assert "validation loss" in text  # not broken into two lines
    assert "…" not in "".join(tables)
    assert "[bold]no markup[/bold]" in text
    assert "seeds would decide: a new proof with --seeds" in text
    assert "report  report.html" in text


def test_notes_with_the_same_beginning_are_one_list() -> None:
    proof = replace(proof_of(GOOD), notes=("bf16 is slow: one", "bf16 is slow: two", "alone: three"))
    assert "bf16 is slow:\n  one\n  two\nalone: three\n" in printed(proof)
    assert "\n- bf16 is slow:\n  - one\n  - two\n- alone: three\n" in markdown(proof)
    assert "<p>bf16 is slow:</p>" in proof_page(proof)


def test_markdown_is_a_table_and_inert() -> None:
    text = markdown(proof_of(GOOD, OPEN))
    assert text.startswith("### Against float32: bf16-mixed equivalent; bf16-mixed-1 undecided\n")
    assert "<img" not in text.replace(r"\<img", "").split("```")[0]
    rows = [line for line in text.splitlines() if line.startswith("| bf16-mixed |")]
    assert len(rows) == len(METRICS) + 5
    columns = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert columns == {8, 6}
    assert proof_of(GOOD, OPEN).experiment.digest in text
