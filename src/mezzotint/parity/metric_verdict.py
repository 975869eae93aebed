"""The verdict on one metric of one treatment, from the differences of its pairs.

Equivalent comes first: a difference that is there but within the margin is what the margin was set for. Then worse or
better, if the interval that differences are read from excludes 0; the reason tells a difference beyond the margin from
one that is only not shown to be within it. What remains is undecided, with the number of pairs that would decide.

Pure: no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mezzotint.parity.design import CURVE, FINAL_LOSS, VALIDATION_LOSS, Better, Metric
from mezzotint.parity.losses import rounded_to, spacing
from mezzotint.parity.pairs import Differences, Pair, differences, of_seeds
from mezzotint.parity.result import Interval, MetricResult, Verdict
from mezzotint.parity.spelling import spell_difference, spell_margin
from mezzotint.parity.stats import is_apart, is_within, pairs_needed, t_interval

OF_LOSSES = (VALIDATION_LOSS.name, FINAL_LOSS.name, CURVE.name)  # metrics that a rounded loss blurs


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """Nominal error rates: of each one-sided test for equivalence, and of the two-sided test for a difference."""

    equivalence: float
    difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the differences say: `is_beyond` where a difference is shown to be larger than the margin."""

    verdict: Verdict
    interval: Interval
    wide: Interval
    is_beyond: bool


def decide(values: Sequence[float], metric: Metric, levels: Levels) -> Decision:
    """Return the verdict on at least two differences."""
    interval = t_interval(values, 1 - 2 * levels.equivalence)
    wide = t_interval(values, 1 - levels.difference)
    is_beyond = wide.low >= metric.margin or wide.high <= -metric.margin
    if is_within(interval, metric.margin):
        verdict = Verdict.EQUIVALENT
    elif not is_apart(wide):
        verdict = Verdict.UNDECIDED
    elif metric.better is Better.NEITHER or (wide.mean > 0) == (metric.better is Better.LOWER):
        verdict = Verdict.WORSE
    else:
        verdict = Verdict.BETTER
    return Decision(verdict=verdict, interval=interval, wide=wide, is_beyond=is_beyond)


def judge_metric(
    metric: Metric, pairs: Sequence[Pair], levels: Levels, power: float
) -> tuple[MetricResult | None, bool]:
    """Return the verdict on `metric`, None where no pair has it, and whether it is settled.

    Settled means that further pairs are not wanted: it is equivalent, it differs by more than the margin, or it has a
    fault that no number of pairs repairs.
    """
    found = differences(metric, pairs)
    if not found.controls and not found.missing:
        return None, True
    if found.missing:
        reason = f"no finite value {of_seeds(found.missing)}, where the control has one"
        return _result(metric, found, Verdict.WORSE, reason), True
    if len(found.values) < 2:
        is_refused = len(found.controls) >= 2
        reason = found.problem if is_refused else f"{len(found.values)} pair has it, and a spread needs 2"
        return _result(metric, found, Verdict.UNDECIDED, reason), is_refused
    decision = decide(found.values, metric, levels)
    verdict, needed = decision.verdict, None
    reason = _reason(metric, decision)
    if verdict is Verdict.UNDECIDED:
        needed = pairs_needed(
            found.values,
            metric.margin,
            equivalence_alpha=levels.equivalence,
            difference_alpha=levels.difference,
            power=power,
        )
        reason += f"; about {needed} pairs would decide" if needed else "; no affordable number of pairs would decide"
    blurred, is_hidden = _blurred(metric, pairs, found)
    if blurred:
        reason += f"; {blurred}"
    if is_hidden and verdict is Verdict.EQUIVALENT:
        verdict = Verdict.UNDECIDED
    if found.problem:
        reason += f"; {found.problem}"
    is_settled = decision.verdict is Verdict.EQUIVALENT or (verdict is not Verdict.UNDECIDED and decision.is_beyond)
    return _result(metric, found, verdict, reason, decision, needed), is_settled


def _result(
    metric: Metric,
    found: Differences,
    verdict: Verdict,
    reason: str,
    decision: Decision | None = None,
    needed: int | None = None,
) -> MetricResult:
    return MetricResult(
        name=metric.name,
        num_pairs=len(found.values),
        control=_mean(found.controls),
        treatment=_mean(found.treatments),
        differences=found.values,
        interval=decision.interval if decision else None,
        wide=decision.wide if decision else None,
        margin=metric.margin,
        is_relative=metric.is_relative,
        is_primary=metric.is_primary,
        verdict=verdict,
        reason=f"{metric.name}: {reason}",
        seeds_needed=needed,
    )


def _mean(values: Sequence[float]) -> float:
    """Return the mean, NaN of none."""
    return math.fsum(value / len(values) for value in values) if values else math.nan


def _reason(metric: Metric, decision: Decision) -> str:
    # an undecided difference is shown with the interval that holds 0; the narrower one may not
    read = decision.interval if decision.verdict is Verdict.EQUIVALENT else decision.wide
    margin = spell_margin(metric.margin, is_relative=metric.is_relative)
    low, high = (_bound(metric, value, is_apart=is_apart(read)) for value in (read.low, read.high))
    text = f"{_amount(metric, read.mean)} ({100 * read.level:.3g}% interval {low} to {high})"
    match decision.verdict:
        case Verdict.EQUIVALENT:
            return f"{text}, within the margin of {margin}"
        case Verdict.UNDECIDED:
            return f"{text}, neither within the margin of {margin} nor apart from 0"
        case _ if decision.is_beyond:
            return f"{text}, beyond the margin of {margin}"
        case _:
            return f"{text}, apart from 0, and not shown to be within the margin of {margin} or beyond it"


def _bound(metric: Metric, value: float, *, is_apart: bool) -> str:
    """Return an end of an interval; one near 0 keeps a digit where the interval does not contain 0."""
    spelled = _amount(metric, value)
    if not is_apart or not value or any(digit in spelled for digit in "123456789"):
        return spelled
    return f"{100 * value:+.1g}%" if metric.is_relative else f"{value:+.1g}"


def _amount(metric: Metric, value: float) -> str:
    return spell_difference(value, metric.margin, is_relative=metric.is_relative)


def _blurred(metric: Metric, pairs: Sequence[Pair], found: Differences) -> tuple[str, bool]:
    """Return what rounded losses blur, or nothing, and whether that hides differences as small as the margin."""
    value = max(map(abs, found.controls + found.treatments))
    if metric.name not in OF_LOSSES or value == 0:
        return "", False
    runs = [run for pair in pairs if pair.is_usable for run in (pair.control, pair.treatment)]
    rounded = [(spacing(value, fmt), run.arm, fmt) for run in runs if (fmt := rounded_to(run.losses))]
    if not rounded:
        return "", False
    step, arm, fmt = max(rounded, key=lambda one: one[0])
    text = f"the losses of {arm} are {fmt} numbers, {step:.2g} apart near {value:.3g}"
    if metric.margin < (step / value if metric.is_relative else step):
        return f"{text}, which hides differences as small as the margin: compute the loss in float32", True
    return text, False
