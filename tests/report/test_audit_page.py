"""The audit's report in a reader's browser, on a real trace, a hostile one, and a large one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from mezzotint.findings import Finding, Severity
from mezzotint.models.gpt import GPT
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.report.audit import render_audit
from mezzotint.report.audit_text import print_audit
from mezzotint.rules.judge import Judgement, judge
from mezzotint.trace.record import Trace
from mezzotint.trace.recorder import Recorder

HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>"


def recorded(model: nn.Module, vocabulary: int, steps: int = 2) -> Trace:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    with Recorder() as recorder:
        for _ in range(steps):
            ids = torch.randint(0, vocabulary, (2, 17))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                _, loss = model(ids[:, :-1], ids[:, 1:])
                loss.backward()  # inside the region: a finding
            optimizer.step()
            optimizer.zero_grad()
    return recorder.trace()


def gpt(num_layers: int) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=64, block_size=16, num_layers=num_layers, num_heads=2, dim=16, ffn_dim=32)
    return GPT(config)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return recorded(gpt(3), 64)


def page_of(trace: Trace, judgement: Judgement | None = None) -> str:
    judgement = judgement or judge(trace)
    return render_audit(
        trace, judgement.findings, verdict=judgement.verdict, policy=str(judgement.policy), is_policy_declared=False
    )


def opened(browser: Any, tmp_path: Path, text: str, scheme: str = "light") -> tuple[Any, list[str]]:
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else complaints.append(request.url),
    )
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(path.as_uri())
    return page, complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_and_its_controls_work(browser: Any, tmp_path: Path, trace: Trace, scheme: str):
    page, complaints = opened(browser, tmp_path, page_of(trace), scheme)
    assert page.locator(".verdict").inner_text() == "1 warning in 2 steps"
    assert page.locator(".finding.warning b").inner_text() == "MZ252"
    assert "loss.backward()" in page.locator(".finding.warning pre").inner_text()

    rows = page.locator("#operations tbody tr")
    total = rows.count()
    page.fill('[data-filter="operations"]', "attention.qkv")
    shown = page.locator("#operations tbody tr:visible")
    assert 0 < shown.count() < total
    assert all("attention.qkv" in text for text in shown.locator("td:nth-child(2)").all_inner_texts())
    page.select_option('select[data-phase="operations"]', "backward")
    assert set(shown.locator("td:first-child").all_inner_texts()) == {"backward"}
    page.fill('[data-filter="operations"]', "")
    page.select_option('select[data-phase="operations"]', "")
    assert shown.count() == total

    page.click("#operations th:has-text('MiB')")
    mib = [float(text) for text in page.locator("#operations tbody td:nth-child(9)").all_inner_texts()]
    assert mib == sorted(mib, reverse=True)
    page.click("#operations th:has-text('MiB')")
    mib = [float(text) for text in page.locator("#operations tbody td:nth-child(9)").all_inner_texts()]
    assert mib == sorted(mib)

    modules = page.locator("#modules tbody tr:visible")
    before = modules.count()
    page.locator("#modules tbody tr:visible .fold:not([disabled])").last.click()
    assert modules.count() > before
    page.locator("#modules tbody tr:visible .fold:not([disabled])").first.click()
    assert modules.count() == 1
    page.fill('[data-filter="modules"]', "feed_forward.up")
    assert modules.count() >= 1
    assert page.locator("#ranges tbody tr:visible").count() > 10
    page.select_option('select[data-phase="ranges"]', "backward")
    assert set(page.locator("#ranges tbody tr:visible td:nth-child(2)").all_inner_texts()) == {"backward"}
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert complaints == []
    page.close()


def test_layers_that_are_alike_are_one_row(trace: Trace):
    assert "(3 alike)" in page_of(trace)


def test_hostile_names_stay_text(browser: Any, tmp_path: Path):
    class Hostile(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules[HOSTILE] = nn.Linear(4, 4)
            self._modules["\u202eevil\n" + "x" * 300] = nn.Linear(4, 1)

        def forward(self, x):
            for module in self._modules.values():
                x = module(x)
            return x

    hostile = Hostile()
    optimizer = torch.optim.SGD(hostile.parameters(), lr=0.1)
    with Recorder() as recorder:
        hostile(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    trace = recorder.trace()
    trace.command = trace.facts["name"] = HOSTILE
    trace.notes.append(HOSTILE)
    finding = Finding(
        code="MZ201", severity=Severity.ERROR, message=HOSTILE, module=HOSTILE, path=HOSTILE, line=1, advice=HOSTILE,
        evidence={HOSTILE: HOSTILE},
    )  # fmt: skip
    judgement = Judgement(findings=(finding,), policy=judge(trace).policy, is_declared=False, verdict=HOSTILE)
    text = page_of(trace, judgement)
    assert "<img src=x" not in text
    page, complaints = opened(browser, tmp_path, text)
    page.fill('[data-filter="operations"]', "evil")
    assert page.locator("#operations tbody tr:visible").count() > 0
    assert page.evaluate("document.title") == f"Audit: {HOSTILE}"
    assert complaints == []
    page.close()
    console = Console(file=open("/dev/null", "w"), width=80)  # noqa: PTH123, SIM115
    with console.file:
        print_audit(
            console,
            trace,
            [finding],
            verdict="[red]x[/nonsense]",
            policy=HOSTILE,
            is_policy_declared=True,
            report_path=None,
        )


@pytest.mark.slow
def test_a_large_trace(browser: Any, tmp_path: Path):
    trace = recorded(gpt(36), 64)
    assert len(trace.operations) > 19_000
    judgement = judge(trace)
    text = page_of(trace, judgement)
    assert len(text.encode()) < 6_000_000
    page, complaints = opened(browser, tmp_path, text)
    page.fill('[data-filter="operations"]', "blocks.17.attention")
    assert page.locator("#operations tbody tr:visible").count() > 3
    assert complaints == []
    page.close()


def test_a_trace_of_nothing():
    assert "no training step was seen" in page_of(Trace())


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_summary(trace: Trace, width: int, capsys: pytest.CaptureFixture):
    judgement = judge(trace)
    print_audit(
        Console(width=width, highlight=False, no_color=True), trace, judgement.findings, verdict=judgement.verdict,
        policy=str(judgement.policy), is_policy_declared=False, report_path="a.html",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert out.startswith("1 warning in 2 steps\n")
    assert f"{__file__}:" in out
    assert "MZ252 warning" in out
    table = [line for line in out.splitlines() if line.startswith(("forward", "backward", "optimizer"))]
    assert all(len(line) <= width for line in table)
    assert "report  a.html" in out
