"""The verdict on one treatment: what happened to its runs first, then its metrics.

What no test of means could show comes first. A treatment that diverges where the control finished is worse, whatever
the other pairs say. A control that did not learn makes the comparison invalid, since runs that do not train agree
well. A treatment that does not learn where the control does is worse.

Then the primary metrics together. "Equivalent" asks every one of them to be equivalent, which needs no correction for
their number (intersection-union test, Berger 1982, Technometrics 24:295): the chance that all of them err is no larger
than the chance that one does. "Worse" and "better" are said if any metric says so, and each of k metrics is tested at
alpha / k (Bonferroni).

Pure: no torch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mezzotint.parity.costs import costs_of
from mezzotint.parity.design import Arm, Experiment
from mezzotint.parity.losses import learned_share
from mezzotint.parity.metric_verdict import Levels, judge_metric
from mezzotint.parity.pairs import Pair, of_seeds, pairs_of
from mezzotint.parity.result import ArmResult, MetricResult, Run, RunStatus, Verdict

SHARE_OF_SEEDS = 0.2  # as many runs may fail to learn by bad luck; more, and the arm does not learn


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on an arm. `is_settled` where further seeds are not wanted."""

    result: ArmResult
    is_settled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Conclusion:
    verdict: Verdict
    reasons: tuple[str, ...]
    is_settled: bool = True
    needed: int | None = None


_Judged = Sequence[tuple[MetricResult, bool]]  # metrics, and whether further pairs are not wanted


def judge_arm(experiment: Experiment, arm: Arm, runs: Iterable[Run], levels: Levels) -> Judgement:
    """Judge one treatment by the pairs whose runs have ended, with the given nominal levels."""
    pairs = pairs_of(experiment, arm, runs)
    judged = [judge_metric(metric, pairs, levels, experiment.power) for metric in experiment.metrics]
    found = [(result, is_settled) for result, is_settled in judged if result is not None]
    end = _of_runs(experiment, arm, pairs) or _of_metrics(experiment, arm, pairs, found)
    result = ArmResult(
        arm=arm.name,
        verdict=end.verdict,
        reasons=(*end.reasons, *_lost_pairs(experiment, arm, pairs)),
        metrics=tuple(result for result, _ in found if math.isfinite(result.control)),
        costs=costs_of([pair for pair in pairs if pair.is_usable]),
        seeds_needed=end.needed,
    )
    return Judgement(result=result, is_settled=end.is_settled)


def _of_runs(experiment: Experiment, arm: Arm, pairs: Sequence[Pair]) -> _Conclusion | None:
    """Return what the runs' ends and their curves decide alone, or None."""
    usable = [pair for pair in pairs if pair.is_usable]
    if diverged := _divergence(experiment, arm, pairs):
        return _Conclusion(verdict=Verdict.WORSE, reasons=(diverged,))
    finished = [pair.control for pair in pairs if pair.control.status is RunStatus.FINISHED]
    if idle := _not_learned(experiment, finished):
        return _Conclusion(verdict=Verdict.INVALID, reasons=(idle,))
    if len(usable) < 2:
        count = f"{len(usable)} pair{'' if len(usable) == 1 else 's'} finished, and a spread needs 2"
        if len(pairs) < len(experiment.seeds):
            text = f"{count}: runs are still to come"
            return _Conclusion(verdict=Verdict.UNDECIDED, reasons=(text,), is_settled=False)
        return _Conclusion(verdict=Verdict.INVALID, reasons=(count,))
    if idle := _learned_less(experiment, arm, usable):
        return _Conclusion(verdict=Verdict.WORSE, reasons=(idle,))
    return None


def _of_metrics(experiment: Experiment, arm: Arm, pairs: Sequence[Pair], judged: _Judged) -> _Conclusion:
    usable = [pair for pair in pairs if pair.is_usable]
    primary = [(result, is_settled) for result, is_settled in judged if result.is_primary]
    reasons = tuple(result.reason for result, _ in primary)
    known = {result.name for result, _ in primary}
    absent = [metric.name for metric in experiment.metrics if metric.is_primary and metric.name not in known]
    by_verdict = {verdict: [one for one in primary if one[0].verdict is verdict] for verdict in Verdict}
    worse, undecided = by_verdict[Verdict.WORSE], by_verdict[Verdict.UNDECIDED]
    if worse:
        return _Conclusion(verdict=Verdict.WORSE, reasons=reasons, is_settled=any(settled for _, settled in worse))
    failed = [pair.seed for pair in pairs if _ends(pair) == (RunStatus.FINISHED, RunStatus.FAILED)]
    if absent or failed:
        doubts = [f"no run reports {name}, which is to decide" for name in absent]
        if failed:
            doubts.append(
                f"{arm.name} failed where {experiment.control.name} finished, so the other pairs do not decide"
            )
        return _Conclusion(verdict=Verdict.UNDECIDED, reasons=(*doubts, *reasons))
    if all(_is_same(pair) for pair in usable):
        return _Conclusion(verdict=Verdict.IDENTICAL, reasons=(_identical(usable),))
    if undecided:
        needed = [result.seeds_needed for result, _ in undecided]
        return _Conclusion(
            verdict=Verdict.UNDECIDED,
            reasons=reasons,
            is_settled=all(settled for _, settled in undecided),
            needed=None if None in needed else max(number for number in needed if number is not None),
        )
    better = by_verdict[Verdict.BETTER]
    verdict = Verdict.BETTER if better else Verdict.EQUIVALENT
    return _Conclusion(verdict=verdict, reasons=reasons, is_settled=all(settled for _, settled in better))


def _ends(pair: Pair) -> tuple[RunStatus, RunStatus]:
    return pair.control.status, pair.treatment.status


def _divergence(experiment: Experiment, arm: Arm, pairs: Sequence[Pair]) -> str:
    comparable = [pair for pair in pairs if pair.control.status is RunStatus.FINISHED]
    diverged = [pair for pair in comparable if pair.treatment.status is RunStatus.DIVERGED]
    if not diverged:
        return ""
    where = ", ".join(f"seed {pair.seed} at step {len(pair.treatment.losses)}" for pair in diverged[:8])
    return (
        f"{arm.name} diverged in {len(diverged)} of {len(comparable)} runs where {experiment.control.name} finished: "
        f"{where}{', ...' if len(diverged) > 8 else ''}"
    )


def _not_learned(experiment: Experiment, controls: Sequence[Run]) -> str:
    shares = [learned_share(run.losses) for run in controls]
    idle = [share for share in shares if share < experiment.min_learning]
    if len(idle) <= SHARE_OF_SEEDS * len(shares):
        return ""
    return (
        f"nothing was tested: the loss of {experiment.control.name} did not fall by {experiment.min_learning:.0%} in "
        f"{len(idle)} of {len(shares)} runs (by {max(idle):.1%} at best); train for more steps"
    )


def _learned_less(experiment: Experiment, arm: Arm, pairs: Sequence[Pair]) -> str:
    """Return that the treatment does not learn, or nothing.

    It has to miss half of what the control has to reach: next to a threshold, chance alone would put two equal arms on
    either side of it. What lies between is for the tests.
    """
    learned = [(learned_share(pair.control.losses), learned_share(pair.treatment.losses)) for pair in pairs]
    idle = [share for control, share in learned if share < experiment.min_learning / 2 <= control / 2]
    if experiment.min_learning <= 0 or len(idle) <= SHARE_OF_SEEDS * len(pairs):
        return ""
    return (
        f"{arm.name} did not learn in {len(idle)} of {len(pairs)} runs: its loss fell by {max(idle):.1%} at best, "
        f"where that of {experiment.control.name} fell by {min(control for control, _ in learned):.0%} or more"
    )


def _is_same(pair: Pair) -> bool:
    control, treatment = pair.control, pair.treatment
    return (
        control.losses == treatment.losses
        and control.values == treatment.values
        and control.weights_digest == treatment.weights_digest
    )


def _identical(pairs: Sequence[Pair]) -> str:
    what = (
        "losses and values" if not all(pair.control.weights_digest for pair in pairs) else "losses, values and weights"
    )
    return f"{what} of all {len(pairs)} pairs are the same bits"


def _lost_pairs(experiment: Experiment, arm: Arm, pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return a sentence for each way in which pairs were lost; a divergence of the treatment alone is no loss."""
    lost: dict[str, list[int]] = {}
    for pair in pairs:
        for name, run in ((experiment.control.name, pair.control), (arm.name, pair.treatment)):
            is_result = run is pair.treatment and run.status is RunStatus.DIVERGED
            if run.status is not RunStatus.FINISHED and not (is_result and pair.control.status is RunStatus.FINISHED):
                message = f" ({run.message})" if run.message else ""
                lost.setdefault(f"{name}: {run.status}{message}", []).append(pair.seed)
    return tuple(f"{what} {of_seeds(seeds)}, so the pair cannot be used" for what, seeds in lost.items())
