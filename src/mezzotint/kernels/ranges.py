"""RangeStats: what one pass over a tensor says about the range of its numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

# Exponent fields are those of float32: a number x has the field floor(log2 |x|) + BIAS.
BIAS = 127
NUM_FIELDS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeStats:
    """Counts over `count` elements, and the ends of their range.

    `exponents[k]` counts the elements whose exponent field is k when written in float32: 0 for zeros and for numbers
    below 2^-126, 255 for infinities and NaN. `subnormals` counts by the tensor's own format. `amax` is the largest
    finite magnitude (0 where there is none), `smallest` the smallest that is not 0 (infinity where there is none).
    """

    count: int
    nans: int
    infinities: int
    zeros: int
    subnormals: int
    amax: float
    smallest: float
    exponents: tuple[int, ...]

    @property
    def is_finite(self) -> bool:
        """Whether there is neither an infinity nor a NaN."""
        return self.nans == 0 and self.infinities == 0


def num_below(exponents: Sequence[int], zeros: int, min_exponent: int) -> int:
    """Return how many numbers that are not 0 lie below 2^min_exponent, by a histogram of exponent fields."""
    below_float32 = exponents[0] - zeros
    return below_float32 + sum(exponents[1 : min_exponent + BIAS]) if min_exponent + BIAS > 1 else below_float32
