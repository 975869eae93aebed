"""Tally: the range of the numbers that passed one place, added up; and what another format would do to them.

The counts are a histogram of float32's exponent fields (see `mezzotint.kernels.ranges`), so questions about powers of
two have exact answers; a limit inside one exponent (float16's 65504, E4M3's 448) is settled by `amax` where that can
settle it, and otherwise counts the whole exponent as beyond.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import floor, inf, log2

from mezzotint.formats.spec import FloatFormat
from mezzotint.kernels.ranges import BIAS, NUM_FIELDS

SPECIAL = NUM_FIELDS - 1


@dataclass(slots=True)
class Tally:
    """Counts over all tensors that were added; `amax` and `smallest` (not 0) over finite numbers.

    `exponents[k]` counts numbers whose float32 exponent field is k; 0 also holds zeros and what lies below 2^-126, 255
    infinities and NaN.
    """

    dtype: str
    count: int = 0
    nans: int = 0
    infinities: int = 0
    zeros: int = 0
    amax: float = 0.0
    smallest: float = inf
    exponents: list[int] = field(default_factory=lambda: [0] * NUM_FIELDS)

    def add(self, other: "Tally") -> None:
        """Add another tally's counts."""
        self.count += other.count
        self.nans += other.nans
        self.infinities += other.infinities
        self.zeros += other.zeros
        self.amax = max(self.amax, other.amax)
        self.smallest = min(self.smallest, other.smallest)
        self.exponents = [one + two for one, two in zip(self.exponents, other.exponents, strict=True)]

    @property
    def is_finite(self) -> bool:
        """Whether neither NaN nor infinity passed."""
        return self.nans == 0 and self.infinities == 0

    @property
    def ends(self) -> tuple[int, int] | None:
        """The smallest and the largest power of two among finite numbers other than 0, or None if there are none."""
        held = [k for k in range(1, SPECIAL) if self.exponents[k]]
        return (held[0] - BIAS, held[-1] - BIAS) if held else None


@dataclass(frozen=True, slots=True)
class WhatIf:
    """Shares of the numbers other than 0 that a format would lose or weaken, multiplied by `scale` first.

    `overflow` lies beyond its largest number, `underflow` becomes 0, `subnormal` keeps fewer bits.
    """

    format: str
    scale: float
    overflow: float
    underflow: float
    subnormal: float


def what_if(tally: Tally, fmt: FloatFormat, scale: float = 1.0) -> WhatIf:
    """Return what storing the tallied numbers times `scale`, a power of two, in `fmt` would do.

    A number below half the smallest subnormal becomes 0 (ties to even). Numbers of one exponent that straddles a limit
    count as beyond it, but for the top exponent where `amax` shows that all are within.
    """
    shift = round(log2(scale))
    total = sum(tally.exponents[:SPECIAL]) - tally.zeros
    if total <= 0:
        return WhatIf(fmt.name, scale, 0.0, 0.0, 0.0)
    top = floor(log2(fmt.max)) - shift
    beyond = _above(tally.exponents, top)
    if tally.amax * scale > fmt.max and -BIAS < top < NUM_FIELDS - BIAS:
        beyond += tally.exponents[max(0, top + BIAS)] if floor(log2(tally.amax)) == top else 0
    lowest = floor(log2(fmt.smallest_subnormal)) - 1 - shift
    under = _below(tally, lowest)
    below_normal = _below(tally, fmt.min_exponent - shift)
    return WhatIf(fmt.name, scale, beyond / total, under / total, (below_normal - under) / total)


def best_scale(tally: Tally, fmt: FloatFormat) -> float:
    """Return the largest power of two that keeps `amax` within `fmt`, 1.0 for numbers that are all 0.

    Overflow costs infinities and underflow only small numbers, so the top is what a scale has to fit.
    """
    if tally.amax <= 0.0:
        return 1.0
    scale = 2.0 ** floor(log2(fmt.max / tally.amax))
    return scale if tally.amax * scale <= fmt.max else scale / 2


def _above(exponents: Sequence[int], power: int) -> int:
    return sum(exponents[max(0, power + 1 + BIAS) : SPECIAL])


def _below(tally: Tally, power: int) -> int:
    """Return how many numbers other than 0 lie below 2^power."""
    if power + BIAS <= 0:
        return 0
    return sum(tally.exponents[: min(SPECIAL, power + BIAS)]) - tally.zeros
