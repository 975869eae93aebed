"""Pairs: which runs belong together, which of them can be compared, and by how much they differ.

A pair can be used when both runs finished. A run that is missing has not been run yet; one that ended otherwise is
told apart by who ended: a treatment that diverges where the control finished is a result, the reverse is a lost pair.

Pure: no torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mezzotint.parity.design import Arm, Experiment, Metric
from mezzotint.parity.result import Run, RunStatus

SMALLEST_SHARE = 1e-3  # of the control's largest value: below it, shares of the control's values are not comparable


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Control and treatment of one seed."""

    seed: int
    control: Run
    treatment: Run

    @property
    def is_usable(self) -> bool:
        """Whether both runs finished."""
        return self.control.status is RunStatus.FINISHED and self.treatment.status is RunStatus.FINISHED


def pairs_of(experiment: Experiment, arm: Arm, runs: Iterable[Run]) -> tuple[Pair, ...]:
    """Return the pairs of `arm` and the control of which both runs have ended, in the order of the design's seeds."""
    by_key = {(run.arm, run.seed): run for run in runs}
    found = []
    for seed in experiment.all_seeds():
        control, treatment = by_key.get((experiment.control.name, seed)), by_key.get((arm.name, seed))
        if control is not None and treatment is not None:
            found.append(Pair(seed=seed, control=control, treatment=treatment))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """One metric over the usable pairs: its values in both arms, and their differences.

    `problem` says in words why there are no differences, or why there are fewer than pairs. `missing` holds the seeds
    where the control has a finite value and the treatment has none.
    """

    controls: tuple[float, ...]
    treatments: tuple[float, ...]
    values: tuple[float, ...]
    problem: str = ""
    missing: tuple[int, ...] = ()


def differences(metric: Metric, pairs: Sequence[Pair]) -> Differences:
    """Return what `metric` differs by, pair by pair: treatment minus control, as a share of the control if relative.

    The share is of the control's magnitude, so that a metric below 0 keeps its direction. It means nothing where the
    control is 0, changes its sign from seed to seed, or all but vanishes in one of them; then there are no
    differences, and `problem` says why.
    """
    usable = [pair for pair in pairs if pair.is_usable]
    both, missing, lost = [], [], []
    for pair in usable:
        control, treatment = _value(pair.control, metric), _value(pair.treatment, metric)
        if control is not None and treatment is not None:
            both.append((pair.seed, control, treatment))
        elif control is not None:
            missing.append(pair.seed)
        else:
            lost.append(pair.seed)
    problem = f"the control has no finite {metric.name} {of_seeds(lost)}" if lost else ""
    controls = tuple(control for _, control, _ in both)
    treatments = tuple(treatment for _, _, treatment in both)
    if metric.is_relative and (reason := _no_share(metric, both)):
        return Differences(controls=controls, treatments=treatments, values=(), problem=reason, missing=tuple(missing))
    values = tuple(
        (treatment - control) / (abs(control) if metric.is_relative and treatment != control else 1.0)
        for _, control, treatment in both
    )
    return Differences(controls=controls, treatments=treatments, values=values, problem=problem, missing=tuple(missing))


def _value(run: Run, metric: Metric) -> float | None:
    value = run.values.get(metric.name)
    return value if value is not None and math.isfinite(value) else None


def _no_share(metric: Metric, both: Sequence[tuple[int, float, float]]) -> str:
    """Return why differences cannot be shares of the control, or nothing."""
    if all(control == treatment for _, control, treatment in both):
        return ""
    controls = [control for _, control, _ in both]
    largest = max(map(abs, controls))
    for seed, control, treatment in both:
        what = f"the control's {metric.name} is {control:.3g} in seed {seed}"
        fix = "a share of it says nothing; give the metric an absolute margin"
        if abs(control) <= largest * SMALLEST_SHARE:
            return f"{what}, {'too near 0 beside ' + format(largest, '.3g') + ': ' if largest and control else ''}{fix}"
        if (control < 0) != (controls[0] < 0):
            return f"{what} and {controls[0]:.3g} in seed {both[0][0]}: {fix}"
        if not math.isfinite((treatment - control) / control):
            return f"{what} and the treatment's {treatment:.3g}: {fix}"
    return ""


def of_seeds(seeds: Sequence[int]) -> str:
    """Return the seeds in words."""
    named = ", ".join(str(seed) for seed in seeds[:8]) + (", ..." if len(seeds) > 8 else "")
    return f"in seed{'s' if len(seeds) > 1 else ''} {named}"
