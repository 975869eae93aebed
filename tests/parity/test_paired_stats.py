"""Intervals, equivalence tests and power against scipy's tests and published examples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as distributions

from mezzotint.parity.stats import (
    MOST_PAIRS,
    difference_power,
    equivalence_power,
    is_apart,
    is_within,
    mean_and_spread,
    pairs_needed,
    t_interval,
)

DIFFERENCES = st.lists(st.floats(-1, 1).map(lambda x: round(x, 6)), min_size=2, max_size=12).filter(
    lambda values: max(values) - min(values) > 1e-5
)
# 500 equally likely spreads stand for the chi distribution; a chance between 0 and 1 that only falls as the spread
# grows is then off by one of them at most
QUADRATURE = 1 / 500


@settings(deadline=None)
@given(DIFFERENCES, st.sampled_from([0.8, 0.9, 0.95, 0.976]))
def test_the_interval_is_scipys(values: list[float], level: float) -> None:
    ours = t_interval(values, level)
    theirs = distributions.ttest_1samp(values, 0).confidence_interval(level)
    # a few roundings of float64, relative to the largest number involved
    size = max(map(abs, (theirs.low, theirs.high)))
    assert ours.low == pytest.approx(theirs.low, rel=1e-9, abs=1e-12 * size)
    assert ours.high == pytest.approx(theirs.high, rel=1e-9, abs=1e-12 * size)
    assert ours.mean == pytest.approx(np.mean(values), rel=1e-12, abs=1e-15)


@settings(deadline=None)
@given(DIFFERENCES, st.floats(0.01, 0.5), st.sampled_from([0.01, 0.05, 0.1]))
def test_the_interval_inside_the_margin_is_two_one_sided_tests(
    values: list[float], margin: float, alpha: float
) -> None:
    above = distributions.ttest_1samp(values, -margin, alternative="greater").pvalue
    below = distributions.ttest_1samp(values, margin, alternative="less").pvalue
    if abs(max(above, below) - alpha) > 1e-9:  # at alpha itself the last digit decides
        assert is_within(t_interval(values, 1 - 2 * alpha), margin) == (max(above, below) < alpha)


@settings(deadline=None)
@given(DIFFERENCES, st.sampled_from([0.01, 0.05, 0.1]))
def test_the_interval_apart_from_zero_is_the_two_sided_paired_test(values: list[float], alpha: float) -> None:
    controls = np.linspace(1, 2, len(values))
    pvalue = distributions.ttest_rel(controls + values, controls).pvalue
    if abs(pvalue - alpha) > 1e-9:
        assert is_apart(t_interval(values, 1 - alpha)) == (pvalue < alpha)


def test_students_sleep_data() -> None:
    # Student 1908, as in R's help page of t.test: 95 percent confidence interval -2.4598858 -0.7001142
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = t_interval([a - b for a, b in zip(first, second, strict=True)], 0.95)
    assert (round(found.low, 7), round(found.high, 7)) == (-2.4598858, -0.7001142)


@pytest.mark.parametrize(("variation", "subjects", "published"), [(0.3, 40, 0.8158453), (0.2, 20, 0.8346802)])
def test_power_of_bioequivalence_trials(variation: float, subjects: int, published: float) -> None:
    # R's PowerTOST: power.TOST(CV = 0.3, n = 40) and power.TOST(CV = 0.2, n = 20), its help page and README; a
    # 2x2 crossover of logarithms, limits 0.8 to 1.25, true ratio 0.95
    spread = math.sqrt(math.log1p(variation**2))
    error = spread * math.sqrt(2 / subjects)
    power = equivalence_power(math.log(0.95), error, subjects - 2, math.log(1.25), 0.05)
    assert power == pytest.approx(published, abs=1e-4)


@settings(deadline=None)
@given(st.floats(0, 3), st.integers(2, 40), st.sampled_from([0.01, 0.05]))
def test_power_of_a_difference_is_noncentral_t(effect: float, pairs: int, alpha: float) -> None:
    bound, shift = distributions.t.isf(alpha / 2, pairs - 1), effect * math.sqrt(pairs)
    below = distributions.nct.cdf(-bound, pairs - 1, shift)
    expected = distributions.nct.sf(bound, pairs - 1, shift) + (0 if math.isnan(below) else below)
    found = difference_power(effect, 1 / math.sqrt(pairs), pairs - 1, alpha)
    assert found == pytest.approx(expected, abs=QUADRATURE)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0.05, 2), st.integers(2, 40))
def test_power_of_equivalence_is_at_least_the_noncentral_t_bound(mean: float, spread: float, pairs: int) -> None:
    # P(both tests reject) >= P(one) + P(other) - 1, the usual approximation, which is close where power is high
    error, degrees, margin = spread / math.sqrt(pairs), pairs - 1, 1.0
    bound = distributions.t.isf(0.05, degrees)
    chances = [
        distributions.nct.sf(bound, degrees, (margin - mean) / error),
        distributions.nct.sf(bound, degrees, (margin + mean) / error),
    ]
    found = equivalence_power(mean, error, degrees, margin, 0.05)
    assert found >= sum(chances) - 1 - QUADRATURE
    assert found <= min(chances) + QUADRATURE


@pytest.mark.parametrize(("mean", "spread", "margin"), [(0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.8, 1.0, 0.5), (3, 2, 1)])
def test_pairs_needed_is_the_smallest_number_with_that_power(mean: float, spread: float, margin: float) -> None:
    unit = spread / math.sqrt(2)
    values = [mean - unit, mean + unit]  # mean and standard deviation of two values
    needed = pairs_needed(values, margin, equivalence_alpha=0.05, difference_alpha=0.05, power=0.8)
    assert needed is not None

    def power(pairs: int) -> float:
        error = spread / math.sqrt(pairs)
        shown = equivalence_power(mean, error, pairs - 1, margin, 0.05) if mean < margin else 0
        return max(shown, difference_power(mean, error, pairs - 1, 0.05))

    assert power(needed - 1) < 0.8 <= power(needed)


def test_no_number_of_pairs_decides_what_is_far_too_noisy() -> None:
    noisy = {"equivalence_alpha": 0.05, "difference_alpha": 0.05, "power": 0.8}
    assert pairs_needed([-1.0, 1.0001], 0.01, **noisy) is None
    # the requirement of MOST_PAIRS: margin 0.01 with a spread of 1 needs about (1.64 + 1.28)**2 * 1e4 pairs
    assert MOST_PAIRS < (1.64 + 1.28) ** 2 * 1e4


def test_equal_differences_have_no_spread_and_huge_ones_do_not_overflow() -> None:
    assert mean_and_spread([0.1] * 7) == (0.1, 0.0)
    assert t_interval([0.1, 0.1], 0.9).low == t_interval([0.1, 0.1], 0.9).high == 0.1
    mean, spread = mean_and_spread([1e200, 3e200])
    assert (mean, spread) == pytest.approx((2e200, math.sqrt(2) * 1e200))
    assert mean_and_spread([-1.0, 1.0]) == (0.0, math.sqrt(2))
