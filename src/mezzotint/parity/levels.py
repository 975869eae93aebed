"""Nominal levels of tests that are repeated as pairs come in, so that all looks together keep the error rate.

Looking after every further seed, and stopping at the first success, gives each look a chance to err. As Pocock did for
normal means (1977, Biometrika 64:191), one constant nominal level is used at all looks, so small that the chance of an
error at any of them is alpha. For t-tests from two or three pairs on, his table does not hold: the first looks have one
or two degrees of freedom. But the path of the t-statistic at the boundary depends on neither mean nor spread of the
differences, so its distribution is found once by simulation: the nominal level is the alpha-quantile of the smallest
p-value over the looks. The seed is fixed, so that a design has one level, today and in a resumed run.

At the boundary of equivalence the true mean is one of the margins, and the t-statistic is taken about it. The other
margin's test is only a further hurdle, so the rate of false "equivalent" stays below alpha.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from scipy import stats as distributions

NUM_PATHS = 200_000  # the simulated rate's standard deviation is then below 1 % of alpha = 0.05
_BATCH = 50_000


@lru_cache(maxsize=64)
def nominal_level(looks: tuple[int, ...], alpha: float, *, is_two_sided: bool) -> float:
    """Return the level of each t-test at `looks` (numbers of pairs, rising) that makes their joint level alpha."""
    if len(looks) < 2:
        return alpha
    smallest = np.concatenate([_smallest(paths, looks, alpha, is_two_sided) for paths in t_paths(looks, NUM_PATHS)])
    rank = int(alpha * NUM_PATHS)
    return float(np.partition(smallest, rank)[rank])


def _smallest(
    paths: "np.ndarray[tuple[int, int], np.dtype[np.float64]]", looks: Sequence[int], alpha: float, is_two_sided: bool
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Return each path's smallest p-value, and 1 for paths whose p-values are all above alpha."""
    degrees = np.asarray(looks) - 1
    sides = 2 if is_two_sided else 1
    if is_two_sided:
        paths = np.abs(paths)
    crossing = (paths > distributions.t.isf(alpha / sides, degrees)).any(axis=1)
    result = np.ones(len(paths))
    result[crossing] = sides * distributions.t.sf(paths[crossing], degrees).min(axis=1)
    return result


def t_paths(
    looks: Sequence[int], num_paths: int, seed: int = 0
) -> "Iterator[np.ndarray[tuple[int, int], np.dtype[np.float64]]]":
    """Yield t-statistics of standard normal samples at each look: arrays (paths, looks), in batches.

    Between looks a sample grows by a group, whose mean and squares within it are independent: normal and chi-square.
    """
    generator = np.random.default_rng(seed)
    for start in range(0, num_paths, _BATCH):
        count = min(_BATCH, num_paths - start)
        total, squares = np.zeros(count), np.zeros(count)  # of the sample so far, squares about its mean
        columns, before = [], 0
        for pairs in looks:
            group = pairs - before
            mean = generator.standard_normal(count) / math.sqrt(group)
            within = generator.chisquare(group - 1, count) if group > 1 else 0.0
            if before:  # squares of two groups together: within both, and between their means
                squares = squares + (mean - total / before) ** 2 * before * group / pairs
            squares, total, before = squares + within, total + group * mean, pairs
            columns.append(total / np.sqrt(squares / (pairs - 1) * pairs))
        yield np.stack(columns, axis=1)
