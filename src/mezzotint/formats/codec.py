"""One code point to the number it stands for, and back."""

import math
from fractions import Fraction

from mezzotint.errors import FormatError
from mezzotint.formats.rounding import ulp_at
from mezzotint.formats.spec import FloatFormat, Specials


def fields_of(code: int, fmt: FloatFormat) -> tuple[int, int, int]:
    """Return sign, exponent and mantissa fields of a code point. Raises FormatError outside the format's codes."""
    if not 0 <= code < fmt.num_codes:
        raise FormatError(f"code {code:#x} is outside {fmt.name}, which has codes 0 to {fmt.num_codes - 1:#x}")
    mantissa = code & ((1 << fmt.mantissa_bits) - 1)
    exponent = (code >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    sign = code >> (fmt.mantissa_bits + fmt.exponent_bits)
    return sign, exponent, mantissa


def decode(code: int, fmt: FloatFormat) -> float:
    """Return the number that a code point stands for; NaN and infinities included.

    >>> from mezzotint.formats.catalog import FLOAT8_E4M3FN
    >>> decode(0x7E, FLOAT8_E4M3FN)
    448.0
    """
    sign, exponent, mantissa = fields_of(code, fmt)
    top = (1 << fmt.exponent_bits) - 1
    last = (1 << fmt.mantissa_bits) - 1
    signed = -1.0 if sign else 1.0
    if fmt.specials is Specials.IEEE and exponent == top:
        return math.nan if mantissa else signed * math.inf
    if fmt.specials is Specials.FN and exponent == top and mantissa == last:
        return math.nan
    if fmt.specials is Specials.FNUZ and sign and exponent == 0 and mantissa == 0:
        return math.nan
    if exponent == 0 and fmt.has_zero:
        return signed * math.ldexp(mantissa, fmt.min_exponent - fmt.mantissa_bits)
    return signed * math.ldexp((1 << fmt.mantissa_bits) + mantissa, exponent - fmt.bias - fmt.mantissa_bits)


def encode(value: float, fmt: FloatFormat) -> int:
    """Return the code point of a number that the format has; for NaN the positive quiet one.

    Raises FormatError for a number that the format has not: round it first.
    """
    if math.isnan(value):
        return _nan_code(fmt)
    sign = int(math.copysign(1.0, value) < 0)
    if sign and not fmt.is_signed:
        raise FormatError(f"{value} is negative and {fmt.name} has no sign")
    sign_bit = sign << (fmt.mantissa_bits + fmt.exponent_bits)
    top = ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits
    if math.isinf(value):
        if not fmt.has_infinity:
            raise FormatError(f"{fmt.name} has no infinity")
        return sign_bit | top
    magnitude = abs(Fraction(value))
    if magnitude == 0:
        if not fmt.has_zero or (sign and not fmt.has_negative_zero):
            raise FormatError(f"{fmt.name} has no {'negative ' if sign else ''}zero")
        return sign_bit
    ulp = ulp_at(magnitude, fmt)
    steps = magnitude / ulp  # the significand as a whole number, hidden bit included
    if steps.denominator != 1 or magnitude > Fraction(fmt.max):
        raise FormatError(f"{value!r} is no number of {fmt.name}; round it first")
    hidden = 1 << fmt.mantissa_bits
    if fmt.has_zero and steps < hidden:
        return sign_bit | int(steps)
    exponent = (ulp.numerator.bit_length() - ulp.denominator.bit_length()) + fmt.mantissa_bits + fmt.bias
    return sign_bit | (exponent << fmt.mantissa_bits) | (int(steps) - hidden)


def _nan_code(fmt: FloatFormat) -> int:
    if fmt.specials is Specials.IEEE:
        top = ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits
        return top | (1 << (fmt.mantissa_bits - 1))
    if fmt.specials is Specials.FN:
        return (1 << (fmt.exponent_bits + fmt.mantissa_bits)) - 1
    if fmt.specials is Specials.FNUZ:
        return 1 << (fmt.exponent_bits + fmt.mantissa_bits)
    raise FormatError(f"{fmt.name} has no NaN")
