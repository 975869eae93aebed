"""Sequential designs: when they stop, and that the verdict follows from the design and the runs alone."""

import random
from dataclasses import replace

import pytest
from made_runs import CONTROL, LOSS, TREATMENT, changed, curve, design, paired

from mezzotint.parity.levels import nominal_level
from mezzotint.parity.result import Run, RunStatus, Verdict
from mezzotint.parity.sequential import levels_of, num_complete_seeds, num_looks
from mezzotint.parity.verdict import is_decided, judge

CLOSE = [0.0004, -0.0003, 0.0001, 0.0002, -0.0001, 0.0003, 0.0, -0.0002]


def runs_of(shares: list[float]) -> tuple[Run, ...]:
    controls = [2.5 + seed / 50 for seed in range(len(shares))]
    return paired(controls, [c * (1 + share) for c, share in zip(controls, shares, strict=True)])


def looks_until_decided(shares: list[float], **fields) -> tuple[int, Verdict]:
    """Add pairs until the design is decided, as a runner does."""
    experiment = design(seeds=range(3), max_seeds=8, **fields)
    for count in range(3, 9):
        runs = runs_of(shares[:count])
        if is_decided(experiment, runs):
            assert num_looks(experiment, runs) == count - 2
            return count, judge(experiment, runs)[0].verdict
    raise AssertionError("not decided at the last look")


def test_it_stops_as_soon_as_equivalence_is_shown() -> None:
    assert looks_until_decided(CLOSE) == (3, Verdict.EQUIVALENT)


def test_it_goes_on_while_undecided_and_ends_with_the_last_seed() -> None:
    noisy = [0.01, -0.012, 0.004, -0.009, 0.011, -0.002, 0.008, -0.011]
    assert looks_until_decided(noisy) == (8, Verdict.UNDECIDED)


def test_it_stops_for_a_difference_beyond_the_margin_only() -> None:
    assert looks_until_decided([0.1, 0.101, 0.099, 0.1, 0.1, 0.1, 0.1, 0.1]) == (3, Verdict.WORSE)
    assert looks_until_decided([-0.1, -0.101, -0.099, 0.1, 0.1, 0.1, 0.1, 0.1]) == (3, Verdict.BETTER)
    # apart from 0 from the first look on, around the margin of 0.005, and shown to be within it never
    around = [0.005, 0.0052, 0.0048, 0.0051, 0.0049, 0.005, 0.0052, 0.0048]
    experiment = design(seeds=range(3), max_seeds=8)
    assert judge(experiment, runs_of(around[:3]))[0].verdict is Verdict.WORSE
    assert looks_until_decided(around) == (8, Verdict.WORSE)


def test_it_stops_for_divergence_and_for_a_control_that_does_not_learn() -> None:
    experiment = design(seeds=range(3), max_seeds=8)

    def diverge(old: Run) -> Run:
        is_it = old.arm == TREATMENT and old.seed == 2
        return replace(old, status=RunStatus.DIVERGED, values={}) if is_it else old

    noisy = runs_of([0.01, -0.012, 0.004])
    assert not is_decided(experiment, noisy)
    assert is_decided(experiment, changed(noisy, diverge))
    assert is_decided(experiment, changed(noisy, lambda old: replace(old, losses=curve(10.2))))


def test_all_arms_have_to_be_settled() -> None:
    experiment = design(arms=["good", "noisy"], seeds=range(3), max_seeds=8)
    good = [replace(one, arm=one.arm.replace(TREATMENT, "good")) for one in runs_of(CLOSE[:3])]
    noisy = [replace(one, arm="noisy") for one in runs_of([0.01, -0.012, 0.004]) if one.arm == TREATMENT]
    assert not is_decided(experiment, [*good, *noisy])
    calm = [replace(one, arm="noisy") for one in runs_of(CLOSE[:3]) if one.arm == TREATMENT]
    assert is_decided(experiment, [*good, *calm])


def test_a_look_needs_every_run_of_its_seeds() -> None:
    experiment, runs = design(seeds=range(3), max_seeds=8), runs_of(CLOSE[:4])
    missing = [one for one in runs if (one.arm, one.seed) != (CONTROL, 1)]
    assert num_complete_seeds(experiment, runs) == 4
    assert num_complete_seeds(experiment, missing) == 1
    assert is_decided(experiment, runs)
    assert not is_decided(experiment, missing)


def test_runs_beyond_the_deciding_look_change_nothing() -> None:
    # as parallel processes may leave them; a resumed experiment has to end like an uninterrupted one
    experiment = design(seeds=range(3), max_seeds=8)
    first = runs_of(CLOSE[:3])
    expected = judge(experiment, first)
    more = list(runs_of([*CLOSE[:3], 0.3, -0.4, 0.2]))
    for seed in range(5):
        random.Random(seed).shuffle(more)
        assert judge(experiment, more) == expected
        assert num_looks(experiment, more) == 1


def test_levels_are_those_of_the_looks_and_of_alpha_where_there_is_one() -> None:
    assert levels_of(design(alpha=0.1)).equivalence == levels_of(design(alpha=0.1)).difference == 0.1
    found = levels_of(design(seeds=range(3), max_seeds=8))
    assert found.equivalence == nominal_level((3, 4, 5, 6, 7, 8), 0.05, is_two_sided=False)
    assert found.difference == nominal_level((3, 4, 5, 6, 7, 8), 0.05, is_two_sided=True)
    (result,) = judge(design(seeds=range(3), max_seeds=8), runs_of(CLOSE[:3]))
    assert result.metrics[0].interval.level == pytest.approx(1 - 2 * found.equivalence)
    assert result.metrics[0].wide.level == pytest.approx(1 - found.difference)


def test_a_lost_pair_makes_the_levels_no_more_lenient() -> None:
    experiment = design(seeds=range(4), max_seeds=8)
    lost = levels_of(experiment, num_lost=1)
    assert lost.equivalence == nominal_level((3, 4, 5, 6, 7, 8), 0.05, is_two_sided=False)
    assert lost.equivalence < levels_of(experiment).equivalence
    runs = changed(
        runs_of(CLOSE[:5]), lambda old: replace(old, status=RunStatus.OUT_OF_MEMORY) if old.seed == 1 else old
    )
    assert judge(experiment, runs)[0].metrics[0].interval.level == pytest.approx(1 - 2 * lost.equivalence)


def test_wide_and_narrow_margins_of_the_same_runs_stop_at_different_looks() -> None:
    shares = [0.001, -0.002, 0.0015, -0.001, 0.0012, -0.0014, 0.001, -0.0005]
    wide = replace(LOSS, margin=0.05)
    experiment = design(wide, seeds=range(3), max_seeds=8)
    assert is_decided(experiment, runs_of(shares[:3]))
    assert looks_until_decided(shares)[0] > 3
