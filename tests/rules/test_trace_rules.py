"""Every rule finds what it is about, and nothing else; programs that only look wrong are left in peace."""

import warnings

import clean_programs
import programs_of_rules
import pytest
import torch

from mezzotint.findings import Severity
from mezzotint.rules.catalog import ALL_RULES, TRACE_RULES, find_rule
from mezzotint.rules.judge import Judgement, judge
from mezzotint.trace.recorder import Recorder

CASES = {name: value for name, value in vars(programs_of_rules).items() if name.startswith(("bad_mz", "good_mz"))}
REFUSED = ("dtype", "unscale", "ScalarType", "should be the same", "inf checks", "_scale is None")
# what a declared policy promises is tested with assert_policy
DECLARED = {"MZ291", "MZ292", "MZ293", "MZ294"}


def judged(build, steps: int = 3) -> Judgement:
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
            if not any(word in str(error) for word in REFUSED):
                raise
    return judge(recorder.trace())


@pytest.mark.parametrize("name", sorted(name for name in CASES if name.startswith("bad")))
def test_a_fault_is_found_with_its_place(name: str):
    judgement = judged(CASES[name])
    code = name.split("_")[1].upper()
    found = [one for one in judgement.findings if one.code == code]
    assert found, [one.code for one in judgement.findings]
    rule = find_rule(code)
    assert found[0].severity is rule.severity or rule.severity is Severity.ERROR
    assert found[0].path == programs_of_rules.__file__
    assert found[0].line
    assert found[0].message


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
