"""What a treatment costs against the control: time, memory, state, as ratios with intervals over the seeds.

Times are compared step by step with the control's step that ran right before or after, because a machine's speed
drifts: the median of those ratios is one figure per seed, and seeds give an interval of its logarithm, so that "twice"
and "half" weigh alike. One seed alone gives an interval of the median of its steps (order statistics, no assumption
on their distribution). Where steps did not take turns, medians of whole runs are compared; runs that computed beside
others are left out, since each took time from the other.

A class of memory that the control has none of (master copies, for one) has no ratio and is left out here.

Pure: no torch.
"""

import math
import statistics
from collections.abc import Callable, Sequence

from scipy import stats as distributions

from mezzotint.parity.pairs import Pair
from mezzotint.parity.result import Cost, Interval, Run
from mezzotint.parity.stats import t_interval

WARMUP_STEPS = 3  # first touches of memory, compiled loops
LEVEL = 0.95
STATE_CLASSES = ("weights", "masters", "states")  # what stays between steps, gradients apart


def costs_of(pairs: Sequence[Pair]) -> tuple[Cost, ...]:
    """Return the costs that the pairs have figures for: step time, tokens/s, memory by class, state per parameter."""
    timed = [pair for pair in pairs if _is_timed(pair)]
    found = [_time(timed), _tokens(timed)]
    names = dict.fromkeys(name for pair in pairs for name in (*pair.control.memory_bytes, *pair.treatment.memory_bytes))
    found += [_ratio(f"{name}_memory", "bytes", pairs, _bytes_of(name)) for name in names]
    found.append(_ratio("state_per_parameter", "bytes", pairs, _state_per_parameter))
    return tuple(cost for cost in found if cost is not None)


def _is_timed(pair: Pair) -> bool:
    runs = (pair.treatment,) if pair.treatment.baseline_seconds else (pair.control, pair.treatment)
    return all(run.seconds and not run.is_traded_off for run in runs)


def _after_warmup(steps: Sequence[float]) -> Sequence[float]:
    """Return the values of the steps after the warm-up, or the last one of a run that has no others."""
    return steps[WARMUP_STEPS:] or steps[-1:]


def _control_seconds(pair: Pair) -> float:
    return statistics.median(_after_warmup(pair.treatment.baseline_seconds or pair.control.seconds))


def _treatment_seconds(pair: Pair) -> float:
    return statistics.median(_after_warmup(pair.treatment.seconds))


def _step_ratios(pair: Pair) -> list[float]:
    """Return the ratio of each step to the control's step next to it, or one ratio of medians."""
    run = pair.treatment
    if not run.baseline_seconds:
        return [_treatment_seconds(pair) / _control_seconds(pair)]
    ratios = [ours / theirs for ours, theirs in zip(run.seconds, run.baseline_seconds, strict=False)]
    return list(_after_warmup(ratios))


def _time(pairs: Sequence[Pair]) -> Cost | None:
    if not pairs:
        return None
    ratios = [_step_ratios(pair) for pair in pairs]
    interval = _median_interval(ratios[0]) if len(pairs) == 1 else _log_interval([statistics.median(r) for r in ratios])
    return Cost(
        name="step_time",
        unit="s",
        control=statistics.median(map(_control_seconds, pairs)),
        treatment=statistics.median(map(_treatment_seconds, pairs)),
        ratio=interval,
    )


def _tokens(pairs: Sequence[Pair]) -> Cost | None:
    """Return tokens per second: the same ratios, turned round, times that of the tokens in a step."""
    pairs = [pair for pair in pairs if pair.control.tokens_per_step and pair.treatment.tokens_per_step]
    time = _time(pairs)
    if time is None:
        return None
    counts = [(pair.control.tokens_per_step or 0, pair.treatment.tokens_per_step or 0) for pair in pairs]
    factor = statistics.median(ours / theirs for theirs, ours in counts)
    return Cost(
        name="tokens_per_second",
        unit="tokens/s",
        control=statistics.median(theirs for theirs, _ in counts) / time.control,
        treatment=statistics.median(ours for _, ours in counts) / time.treatment,
        ratio=Interval(
            low=factor / time.ratio.high,
            mean=factor / time.ratio.mean,
            high=factor / time.ratio.low,
            level=time.ratio.level,
        ),
    )


def _bytes_of(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.memory_bytes.get(name)


def _state_per_parameter(run: Run) -> float | None:
    if not run.num_parameters or "weights" not in run.memory_bytes:
        return None
    return sum(run.memory_bytes.get(name, 0) for name in STATE_CLASSES) / run.num_parameters


def _ratio(name: str, unit: str, pairs: Sequence[Pair], figure: Callable[[Run], float | None]) -> Cost | None:
    both = [(figure(pair.control), figure(pair.treatment)) for pair in pairs]
    figures = [(theirs, ours) for theirs, ours in both if theirs and ours]
    if not figures:
        return None
    return Cost(
        name=name,
        unit=unit,
        control=statistics.fmean(theirs for theirs, _ in figures),
        treatment=statistics.fmean(ours for _, ours in figures),
        ratio=_log_interval([ours / theirs for theirs, ours in figures]),
    )


def _log_interval(ratios: Sequence[float]) -> Interval:
    """Return the geometric mean of the ratios with the t-interval of their logarithms; a point of one or equal ones."""
    if len(ratios) == 1:
        return Interval(low=ratios[0], mean=ratios[0], high=ratios[0], level=LEVEL)
    found = t_interval([math.log(ratio) for ratio in ratios], LEVEL)
    low, mean, high = (math.exp(min(value, 700.0)) for value in (found.low, found.mean, found.high))
    return Interval(low=low, mean=mean, high=high, level=LEVEL)


def _median_interval(values: Sequence[float]) -> Interval:
    """Return the median with an interval between two of the sorted values, or all of them where they are few."""
    ordered, count = sorted(values), len(values)
    rank = int(distributions.binom.ppf((1 - LEVEL) / 2, count, 0.5))
    low = max(rank - 1, 0)
    return Interval(low=ordered[low], mean=statistics.median(ordered), high=ordered[count - 1 - low], level=LEVEL)
