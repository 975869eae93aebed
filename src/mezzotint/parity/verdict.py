"""The verdicts of an experiment, and whether it is over: what runners and pages ask."""

from collections.abc import Iterable

from mezzotint.parity.design import Experiment
from mezzotint.parity.result import ArmResult, Run
from mezzotint.parity.sequential import state_of


def judge(experiment: Experiment, runs: Iterable[Run]) -> tuple[ArmResult, ...]:
    """Return a verdict for each treatment, in the design's order, from all runs or those that have ended so far.

    The order of runs does not matter. A sequential experiment is judged at the look that decides it.
    """
    return state_of(experiment, runs).results


def is_decided(experiment: Experiment, runs: Iterable[Run]) -> bool:
    """Say whether no further run is wanted: all seeds have run, or a sequential experiment is settled at a look."""
    return state_of(experiment, runs).is_decided
