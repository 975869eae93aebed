"""Every rule finds what it is about, and nothing else; programs that only look wrong are left in peace."""

import json
import linecache
import re
import warnings
from dataclasses import replace
from pathlib import Path

import clean_programs
import programs_of_kinds
import programs_of_rules
import pytest
import torch

import mezzotint
from mezzotint.findings import Severity
from mezzotint.rules.catalog import ALL_RULES, TRACE_RULES, find_rule
from mezzotint.rules.judge import Judgement, judge
from mezzotint.trace.record import Trace
from mezzotint.trace.recorder import Recorder

CASES = {
    name: value
    for module in (programs_of_rules, programs_of_kinds)
    for name, value in vars(module).items()
    if name.startswith(("bad_mz", "good_mz"))
}
BAD = sorted(name for name in CASES if name.startswith("bad"))
EXPECTED = json.loads(Path(__file__).with_name("expected_findings.json").read_text())
RAISING = {name for name in BAD if EXPECTED[name]["raises"]}
# what a declared policy promises is tested with assert_policy
DECLARED = {"MZ291", "MZ292", "MZ293", "MZ294"}


def recorded(build, steps: int = 3) -> tuple[Trace, str | None]:
    """Return the trace of a program, and the class of what it raised."""
    raised = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "User provided device_type of 'cuda'|.*CUDA is not available")
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        recorder = Recorder()
        try:
            with recorder:
                step = build()
                for _ in range(steps):
                    step()
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            if getattr(build, "__name__", "") not in RAISING:
                raise
            raised = type(error).__name__
    return recorder.trace(), raised


def judged(build, steps: int = 3) -> Judgement:
    return judge(recorded(build, steps)[0])


def found_in(judgement: Judgement) -> list[list[str]]:
    """Return the code, severity and source line of each finding."""
    return [
        [one.code, str(one.severity), linecache.getline(one.path or "", one.line or 0).strip()]
        for one in judgement.findings
    ]


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_found_with_its_place_and_nothing_else_is(name: str):
    trace, raised = recorded(CASES[name])
    judgement = judge(trace)
    assert raised == EXPECTED[name]["raises"]
    assert found_in(judgement) == EXPECTED[name]["findings"]
    code = name.split("_")[1].upper()
    found = [one for one in judgement.findings if one.code == code]
    rule = find_rule(code)
    assert found[0].severity is rule.severity or rule.severity is Severity.ERROR
    assert found[0].path in (programs_of_rules.__file__, programs_of_kinds.__file__)
    assert all((found[0].line, found[0].message))
    assert found_in(judge(reworded(trace))) == EXPECTED[name]["findings"]


def reworded(trace: Trace) -> Trace:
    """Return a trace as a torch would give it that words every error differently."""
    said = {**{one.error: f"reworded {number}" for number, one in enumerate(trace.operations) if one.error}}
    return replace(
        trace,
        operations=[replace(one, error=said.get(one.error)) for one in trace.operations],
        events=[
            replace(one, facts={**one.facts, "error": said.get(one.facts["error"], "reworded")})
            if "error" in one.facts
            else one
            for one in trace.events
        ],
    )


@pytest.mark.parametrize("name", sorted(name for name in CASES if name.startswith("good")))
def test_the_right_way_is_left_in_peace(name: str):
    found = [one for one in judged(CASES[name]).findings if one.severity is not Severity.INFO]
    assert not found, [f"{one.code} {one.message} {one.line}" for one in found]


@pytest.mark.parametrize("name", sorted(clean_programs.PROGRAMS))
def test_suspicious_programs_are_clean(name: str):
    found = [one for one in judged(clean_programs.PROGRAMS[name]).findings if one.severity is not Severity.INFO]
    assert not found, [f"{one.code} {one.message} {one.line}" for one in found]


@pytest.mark.parametrize("rule", TRACE_RULES, ids=lambda rule: rule.code)
def test_every_rule_has_its_cases_and_words(rule):
    if rule.code not in DECLARED:
        assert any(name.startswith(f"bad_{rule.code.lower()}") for name in CASES)
        assert any(name.startswith(f"good_{rule.code.lower()}") for name in CASES)
    assert all((rule.name, rule.summary, rule.why, rule.bad, rule.good, rule.fix))
    assert rule.code.startswith("MZ2")
    assert find_rule(rule.code.lower()) is find_rule(rule.name) is rule


def test_codes_are_distinct_and_in_order():
    codes = [rule.code for rule in ALL_RULES]
    assert codes == sorted(set(codes))
    assert len({rule.name for rule in ALL_RULES}) == len(codes)


def test_the_policy_is_inferred_from_what_ran():
    judgement = judged(programs_of_rules.good_mz226)
    assert str(judgement.policy) == (
        "params=float32, compute=float16, loss=float32, reduce=float32, state=float32, scaling=dynamic"
    )
    assert not judgement.is_declared
    assert judgement.is_clean
    assert judged(programs_of_rules.bad_mz252).verdict == "1 warning in 3 steps"
    assert judged(lambda: lambda: torch.ones(3) + 1).verdict == "no training step was seen"
    assert judged(programs_of_kinds.bad_mz262).verdict == "1 error, and no training step was seen"


def test_every_code_in_the_source_is_one_of_the_rules():
    files = Path(mezzotint.__path__[0]).rglob("*.py")
    written = {code for file in files for code in re.findall(r"\bMZ\d{3}\b", file.read_text(encoding="utf-8"))}
    assert {f"MZ{number}" for number in range(301, 312)} <= written
    assert not written - {rule.code for rule in ALL_RULES}
