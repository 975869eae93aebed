"""Statistics of paired differences: intervals, equivalence, and how many pairs would decide.

A pair is one seed in both arms, with the same initial weights, data order and dropout masks, so that what differs
within it is the precision (or whatever else the arms differ in) and the chaos that it sets off. Each pair gives one
difference; seeds are drawn independently, so the differences are a sample, and a mean of them has a t-interval.

Equivalence is shown, never assumed: two one-sided tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657; Lakens
2017, Soc. Psychol. Personal. Sci. 8:355) reject "at least the margin worse" and "at least the margin better", each at
level alpha. Both reject exactly when the interval of level 1 - 2 alpha lies inside the margins, which is how it is
computed here. A difference is read from the interval of level 1 - alpha. That the two intervals belong together, with
no correction for asking three questions (worse, equivalent, better), is Goeman, Solari and Stijnen 2010 (Statistics in
Medicine 29:2117): at most one of the three hypotheses is true.

What the t-interval assumes is that differences are roughly normal, which three or five pairs cannot confirm. Heavy
tails only make it more cautious; differences as skewed as an exponential distribution, mostly small and now and then
large, make false equivalence three times as frequent (both simulated in tests/parity/test_error_rates.py).

Distributions are scipy's. Pure: no torch.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from scipy import stats as distributions
from scipy.special import ndtr  # the normal distribution, without the checks that cost more than it

from mezzotint.parity.result import Interval

MOST_PAIRS = 1000  # beyond it "how many pairs would decide" has no useful answer
_POINTS = 500  # of the quadrature over the spread that a sample will show


@lru_cache(maxsize=4096)
def critical_t(level: float, degrees: int) -> float:
    """Return the half width of a two-sided t-interval of `level`, in standard errors of the mean."""
    return float(distributions.t.isf((1 - level) / 2, degrees))


def mean_and_spread(differences: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation (of n - 1) of at least two differences.

    Differences that are all equal have no spread at all, which rounding in the mean would otherwise hide.
    """
    if min(differences) == max(differences):
        return float(differences[0]), 0.0
    largest = max(map(abs, differences))  # squares of huge differences would overflow
    values, count = [value / largest for value in differences], len(differences)
    mean = math.fsum(values) / count  # rounded once, so that the order of the pairs does not matter
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean * largest, math.sqrt(squares / (count - 1)) * largest


def t_interval(differences: Sequence[float], level: float) -> Interval:
    """Return the mean of at least two differences with its t-interval; a sample without spread gives a point."""
    mean, spread = mean_and_spread(differences)
    half = critical_t(level, len(differences) - 1) * spread / math.sqrt(len(differences))
    return Interval(low=mean - half, mean=mean, high=mean + half, level=level)


def is_within(interval: Interval, margin: float) -> bool:
    """Say whether the interval lies inside the margins, their ends not included."""
    return -margin < interval.low and interval.high < margin


def is_apart(interval: Interval, value: float = 0.0) -> bool:
    """Say whether the interval excludes `value`."""
    return interval.low > value or interval.high < value


def equivalence_power(mean: float, standard_error: float, degrees: int, margin: float, alpha: float) -> float:
    """Return the chance that two one-sided t-tests show equivalence, if mean and standard error are true.

    As with Owen's Q function (Phillips 1990, J. Pharmacokinet. Biopharm. 18:137): over the spread that the sample may
    show, the chance that its mean falls between the margins less the half width.
    """
    if standard_error == 0:
        return float(abs(mean) < margin)
    half = critical_t(1 - 2 * alpha, degrees) * _shown_spreads(degrees)  # in true standard errors
    upper = ndtr((margin - mean) / standard_error - half)
    lower = ndtr((-margin - mean) / standard_error + half)
    return float(np.maximum(upper - lower, 0).mean())


def difference_power(mean: float, standard_error: float, degrees: int, alpha: float) -> float:
    """Return the chance that a two-sided t-test finds the true `mean` to differ from 0.

    It is a probability of the noncentral t distribution, whose own function is NaN far out in the tail (scipy 1.17).
    """
    if standard_error == 0:
        return float(mean != 0)
    half = critical_t(1 - alpha, degrees) * _shown_spreads(degrees)
    shift = abs(mean) / standard_error
    return float((ndtr(shift - half) + ndtr(-half - shift)).mean())


@lru_cache(maxsize=MOST_PAIRS)
def _shown_spreads(degrees: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return what a sample's standard deviation may be, in true ones: values that are equally likely."""
    shares = distributions.chi2.ppf((np.arange(_POINTS) + 0.5) / _POINTS, degrees) / degrees
    return np.asarray(np.sqrt(shares))


def pairs_needed(
    differences: Sequence[float], margin: float, *, equivalence_alpha: float, difference_alpha: float, power: float
) -> int | None:
    """Estimate how many pairs would decide, if mean and spread were what these pairs show.

    It is the smaller of the two numbers that show equivalence, and a difference, with the chance `power`; None above
    MOST_PAIRS. The spread of two or three pairs is itself rough, and so is the estimate.
    """
    mean, spread = mean_and_spread(differences)

    def equivalent(pairs: int) -> float:
        return equivalence_power(mean, spread / math.sqrt(pairs), pairs - 1, margin, equivalence_alpha)

    def different(pairs: int) -> float:
        return difference_power(mean, spread / math.sqrt(pairs), pairs - 1, difference_alpha)

    chances = [equivalent, different] if abs(mean) < margin else [different]
    found = [pairs for pairs in (_fewest(chance, power) for chance in chances) if pairs is not None]
    return min(found, default=None)


def _fewest(chance: Callable[[int], float], power: float) -> int | None:
    """Return the smallest number of pairs whose `chance`, which grows with it, reaches `power`."""
    if chance(MOST_PAIRS) < power:
        return None
    low, high = 1, MOST_PAIRS  # low does not reach it, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high
