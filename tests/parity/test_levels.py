"""Nominal levels against Pocock's table, and as the levels that they claim to be."""

import numpy as np
import pytest
from scipy import stats as distributions

from mezzotint.parity.levels import NUM_PATHS, nominal_level, t_paths

# Pocock 1977, table 1: nominal two-sided levels for 0.05 in all, normal data of known spread
POCOCK = {2: 0.0294, 3: 0.0221, 4: 0.0182, 5: 0.0158}


@pytest.mark.parametrize("looks", POCOCK)
def test_large_groups_reproduce_pococks_table(looks: int) -> None:
    # groups of 2,000 pairs: the t-statistic is normal to three digits
    level = nominal_level(tuple(2000 * (look + 1) for look in range(looks)), 0.05, is_two_sided=True)
    # The quantile of NUM_PATHS paths: the joint level it has is binomial about alpha, with a deviation of
    # sqrt(0.05 * 0.95 / paths); the nominal level moves by less than that. Four deviations, and the table's rounding.
    deviation = np.sqrt(0.05 * 0.95 / NUM_PATHS)
    assert level == pytest.approx(POCOCK[looks], abs=4 * deviation + 5e-5)


@pytest.mark.parametrize("is_two_sided", [False, True])
@pytest.mark.parametrize("looks", [(2, 3), (2, 3, 4, 5, 6), tuple(range(3, 13)), tuple(range(5, 31)), (3, 6, 12)])
def test_the_joint_level_is_alpha_on_other_paths(looks: tuple[int, ...], is_two_sided: bool) -> None:
    level = nominal_level(looks, 0.05, is_two_sided=is_two_sided)
    bounds = distributions.t.isf(level / (2 if is_two_sided else 1), np.asarray(looks) - 1)
    paths = np.concatenate(list(t_paths(looks, 100_000, seed=1)))
    rate = ((np.abs(paths) if is_two_sided else paths) > bounds).any(axis=1).mean()
    # both the level and this rate come from samples
    deviation = np.sqrt(0.05 * 0.95 * (1 / NUM_PATHS + 1 / 100_000))
    assert rate == pytest.approx(0.05, abs=4 * deviation)


def test_paths_are_those_of_growing_samples() -> None:
    # the same distribution as scipy's t-test of raw normal numbers, at each look and between looks
    looks = (2, 3, 7)
    raw = np.random.default_rng(2).standard_normal((20_000, looks[-1]))
    samples = np.stack([distributions.ttest_1samp(raw[:, :look], 0, axis=1).statistic for look in looks], axis=1)
    (paths,) = t_paths(looks, 20_000, seed=3)
    for column in range(len(looks)):
        assert distributions.ks_2samp(paths[:, column], samples[:, column]).pvalue > 1e-4
    for pair in ((0, 1), (1, 2)):
        ours, theirs = (distributions.kendalltau(*x[:, pair].T).statistic for x in (paths, samples))
        assert ours == pytest.approx(theirs, abs=4 * np.sqrt(2 * 4 / (9 * 20_000)))  # tau's deviation, two samples


def test_more_looks_need_a_smaller_level_and_one_look_none() -> None:
    levels = [nominal_level(tuple(range(3, last)), 0.05, is_two_sided=False) for last in (4, 6, 12, 20)]
    assert levels[0] == 0.05
    assert levels == sorted(levels, reverse=True)
    assert nominal_level((3, 4, 5), 0.05, is_two_sided=False) == nominal_level((3, 4, 5), 0.05, is_two_sided=False)
