"""Two runs side by side: which cases became faster or slower, and which the noise hides. Pure."""

from dataclasses import dataclass
from statistics import median

from mezzotint.bench.cases import Case
from mezzotint.bench.result import LEAST_SAMPLES, BenchResult, CaseResult, Measurement, Verdict, judge, quartiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One case and format in both runs: `ratio` is the second's median time over the first's."""

    case: Case
    label: str
    before_seconds: float
    after_seconds: float
    ratio: float
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All cases that both runs have, and in what else the runs differ, which may be why."""

    changes: tuple[Change, ...]
    differing_facts: tuple[tuple[str, str, str], ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]


def compare(before: BenchResult, after: BenchResult) -> Comparison:
    """Return how the second run differs from the first, case by case and format by format.

    The runs were not interleaved, so a machine that was slower altogether shows as slower cases; the noise allowed for
    is the larger of both runs' own.
    """
    ours, theirs = _by_key(before), _by_key(after)
    changes = [_change(ours[key], theirs[key]) for key in ours if key in theirs]
    keys = dict.fromkeys((*before.facts, *after.facts))
    differing = [
        (key, str(before.facts.get(key)), str(after.facts.get(key)))
        for key in keys
        if before.facts.get(key) != after.facts.get(key)
    ]
    if before.name != after.name:
        differing.insert(0, ("device", before.name, after.name))
    return Comparison(
        changes=tuple(changes),
        differing_facts=tuple(differing),
        only_before=tuple(" ".join(key) for key in ours if key not in theirs),
        only_after=tuple(" ".join(key) for key in theirs if key not in ours),
    )


_Found = tuple[CaseResult, Measurement]


def _by_key(result: BenchResult) -> dict[tuple[str, str], _Found]:
    return {(str(found.case), m.label): (found, m) for found in result.cases for m in found.measurements}


def _change(before: _Found, after: _Found) -> Change:
    first, second = before[1], after[1]
    # The spread of a quotient of medians, from each run's own quartiles.
    low = quartiles(second.seconds)[0] / first.median_seconds
    high = quartiles(second.seconds)[1] / first.median_seconds
    spread_before = [value / first.median_seconds for value in quartiles(first.seconds)]
    noises = [before[0].noise, after[0].noise]
    noise = None if None in noises else max(value for value in noises if value is not None)
    if noise is not None:
        noise = max(noise, spread_before[1] - 1, 1 - spread_before[0])
    count = min(len(first.seconds), len(second.seconds))
    verdict = judge(low, high, noise, count) if count >= LEAST_SAMPLES or noise is None else Verdict.UNCLEAR
    return Change(
        case=first.case,
        label=first.label,
        before_seconds=first.median_seconds,
        after_seconds=second.median_seconds,
        ratio=median(second.seconds) / median(first.seconds),
        verdict=verdict,
    )
