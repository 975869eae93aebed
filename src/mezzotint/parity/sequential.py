"""Sequential experiments: when enough seeds have run.

A look is taken after the first seeds of the design, and after each further one. The first look at which every
treatment is settled ends the experiment: equivalent, apart by more than the margin, diverged, or spoiled in a way that
further seeds do not repair. A difference that is not shown to be larger than the margin does not stop it, because
further seeds may show that it is smaller; the last look takes it as it stands.

The verdict follows from the design and the runs alone. Runs of seeds beyond the deciding look, which parallel
processes may have finished, are left out, so that a resumed experiment ends as an uninterrupted one.

Nominal levels come from `levels.py`. A pair that cannot be used delays the looks by one; the levels are then those of
a design that also looks earlier, which is never too lenient.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mezzotint.parity.arm_verdict import judge_arm
from mezzotint.parity.design import Arm, Experiment
from mezzotint.parity.levels import nominal_level
from mezzotint.parity.metric_verdict import Levels
from mezzotint.parity.pairs import pairs_of
from mezzotint.parity.result import ArmResult, Run


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where an experiment stands: its verdicts so far, at which look, and whether it is over."""

    results: tuple[ArmResult, ...]
    num_looks: int
    is_decided: bool


def state_of(experiment: Experiment, runs: Iterable[Run]) -> State:
    """Return the state after `runs`, at the first look that decides, or at the last one that could be taken.

    Before the first look, and in a design that is not sequential, all runs count.
    """
    runs = tuple(runs)
    complete, seeds = num_complete_seeds(experiment, runs), experiment.all_seeds()
    if not experiment.is_sequential or complete < len(experiment.seeds):
        results, _ = _judge(experiment, runs)
        return State(results=results, num_looks=1, is_decided=complete == len(seeds))
    first = len(experiment.seeds)
    for count in range(first, complete + 1):
        considered = set(seeds[:count])
        results, is_settled = _judge(experiment, tuple(run for run in runs if run.seed in considered))
        is_decided = is_settled or count == len(seeds)
        if is_decided or count == complete:
            break
    return State(results=results, num_looks=count - first + 1, is_decided=is_decided)


def num_looks(experiment: Experiment, runs: Iterable[Run]) -> int:
    """Return how many looks were taken until the experiment was decided, or so far; at least 1."""
    return state_of(experiment, runs).num_looks


def num_complete_seeds(experiment: Experiment, runs: Iterable[Run]) -> int:
    """Return for how many seeds, from the design's first on without a gap, the runs of all arms have ended."""
    ended = {(run.arm, run.seed) for run in runs}
    seeds = experiment.all_seeds()
    for count, seed in enumerate(seeds):
        if any((arm.name, seed) not in ended for arm in experiment.arms):
            return count
    return len(seeds)


def levels_of(experiment: Experiment, num_lost: int = 0) -> Levels:
    """Return the nominal levels of each look, `num_lost` pairs of which could not be used.

    A difference in any primary metric decides, so each gets its part of alpha (Bonferroni); equivalence has to be shown
    in all of them, each at alpha.
    """
    of_each = experiment.alpha / sum(metric.is_primary for metric in experiment.metrics)
    if not experiment.is_sequential:
        return Levels(equivalence=experiment.alpha, difference=of_each)
    looks = tuple(range(max(2, len(experiment.seeds) - num_lost), experiment.max_seeds + 1))
    return Levels(
        equivalence=nominal_level(looks, experiment.alpha, is_two_sided=False),
        difference=nominal_level(looks, of_each, is_two_sided=True),
    )


def _judge(experiment: Experiment, runs: tuple[Run, ...]) -> tuple[tuple[ArmResult, ...], bool]:
    """Return the verdicts on all treatments by these runs, and whether all are settled."""
    judgements = []
    for arm in experiment.treatments:
        levels = levels_of(experiment, _num_lost(experiment, arm, runs))
        judgements.append(judge_arm(experiment, arm, runs, levels))
    return tuple(one.result for one in judgements), all(one.is_settled for one in judgements)


def _num_lost(experiment: Experiment, arm: Arm, runs: tuple[Run, ...]) -> int:
    return sum(not pair.is_usable for pair in pairs_of(experiment, arm, runs))
