"""Rounding one number to a format, exactly and readably: the oracle that fast kernels are tested against.

The value is a Fraction throughout, so nothing is rounded but once. Overflow is judged as IEEE 754-2019, 7.4 says: round
as if the exponent had no upper end, and where the result exceeds the largest finite number, the mode decides.
"""

import math
from enum import StrEnum
from fractions import Fraction

from mezzotint.errors import FormatError
from mezzotint.formats.spec import FloatFormat, Specials


class Rounding(StrEnum):
    """Which neighbour a number between two goes to."""

    NEAREST_EVEN = "nearest-even"  # the nearer; of two equally near, the one whose last mantissa bit is 0
    TOWARD_ZERO = "toward-zero"  # the one nearer to zero
    STOCHASTIC = "stochastic"  # the farther from zero with a probability equal to the fraction of the way to it


class Overflow(StrEnum):
    """What a number becomes whose rounding exceeds the largest finite number."""

    INFINITY = "infinity"  # what IEEE 754 formats do
    SATURATE = "saturate"  # the largest finite number, infinities included (OCP FP8 1.0, 5.3, saturating mode)
    NAN = "nan"  # what formats without infinity do when they do not saturate


def default_overflow(fmt: FloatFormat) -> Overflow:
    """Return what a conversion does where nothing else is said: infinity, else NaN, else the largest number."""
    if fmt.has_infinity:
        return Overflow.INFINITY
    return Overflow.NAN if fmt.has_nan else Overflow.SATURATE


def check_overflow(fmt: FloatFormat, overflow: Overflow | None) -> Overflow:
    """Return the overflow mode for a format; raise FormatError where the format lacks what the mode needs."""
    if overflow is None:
        return default_overflow(fmt)
    if (overflow is Overflow.INFINITY and not fmt.has_infinity) or (overflow is Overflow.NAN and not fmt.has_nan):
        lacks = "infinity" if overflow is Overflow.INFINITY else "NaN"
        raise FormatError(f"{fmt.name} has no {lacks}, so overflow={overflow} is refused; pass {default_overflow(fmt)}")
    return overflow


def round_scalar(
    value: float | Fraction,
    fmt: FloatFormat,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow | None = None,
    *,
    draw: float = 0.0,
) -> float:
    """Return the number of `fmt` that `value` rounds to, as a Python float (which holds every number up to float64).

    `draw`, from 0 up to not including 1, is the random number of stochastic rounding. NaN stays NaN where the format
    has one. A format without zero takes its smallest number for what rounds below it.

    >>> from mezzotint.formats.catalog import FLOAT16
    >>> round_scalar(1 / 3, FLOAT16), round_scalar(65520, FLOAT16)
    (0.333251953125, inf)

    Raises FormatError for NaN, or for a negative number, where the format has none.
    """
    mode = check_overflow(fmt, overflow)
    if isinstance(value, float) and math.isnan(value):
        return _nan(fmt)
    is_negative = value < 0 or (value == 0 and isinstance(value, float) and math.copysign(1.0, value) < 0)
    if is_negative and not fmt.is_signed:
        raise FormatError(f"{value} is negative and {fmt.name} has no sign; pass its absolute value")
    sign = -1.0 if is_negative else 1.0
    if isinstance(value, float) and math.isinf(value):
        return sign * (fmt.max if mode is Overflow.SATURATE else math.inf) if mode is not Overflow.NAN else math.nan
    magnitude = _round_magnitude(abs(Fraction(value)), fmt, rounding, Fraction(draw))
    if magnitude > Fraction(fmt.max):
        if rounding is Rounding.TOWARD_ZERO or mode is Overflow.SATURATE:
            return sign * fmt.max
        return math.nan if mode is Overflow.NAN else sign * math.inf
    if magnitude == 0:
        if not fmt.has_zero:
            return fmt.smallest_normal
        return -0.0 if sign < 0 and fmt.has_negative_zero else 0.0
    return sign * float(magnitude)


def overflows(value: Fraction, fmt: FloatFormat) -> bool:
    """Return whether rounding `value` to the nearest exceeds the largest finite number of `fmt`."""
    return _round_magnitude(abs(value), fmt, Rounding.NEAREST_EVEN, Fraction(0)) > Fraction(fmt.max)


def ulp_at(value: Fraction, fmt: FloatFormat) -> Fraction:
    """Return the distance between neighbours of `fmt` around `value`, as if its exponent had no upper end."""
    exponent = fmt.min_exponent if value == 0 else max(_exponent(abs(value)), fmt.min_exponent)
    return Fraction(2) ** (exponent - fmt.mantissa_bits)


def _round_magnitude(magnitude: Fraction, fmt: FloatFormat, rounding: Rounding, draw: Fraction) -> Fraction:
    ulp = ulp_at(magnitude, fmt)
    steps, rest = divmod(magnitude, ulp)
    fraction = rest / ulp  # of the way to the farther neighbour
    if rounding is Rounding.NEAREST_EVEN:
        is_up = fraction > Fraction(1, 2) or (fraction == Fraction(1, 2) and steps % 2 == 1)
    elif rounding is Rounding.STOCHASTIC:
        is_up = draw < fraction
    else:
        is_up = False
    return (steps + is_up) * ulp


def _exponent(magnitude: Fraction) -> int:
    """Return floor(log2(magnitude)) of a positive number, exactly."""
    guess = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return guess if magnitude >= Fraction(2) ** guess else guess - 1


def _nan(fmt: FloatFormat) -> float:
    if fmt.specials is Specials.NONE:
        raise FormatError(f"{fmt.name} has no NaN; remove the NaN before rounding")
    return math.nan
