"""A format as the few numbers that a rounding loop needs."""

import math
import struct
from functools import cache
from typing import NamedTuple

from mezzotint.errors import FormatError
from mezzotint.formats.rounding import Overflow, check_overflow
from mezzotint.formats.spec import FloatFormat, Specials


class Target(NamedTuple):
    """The numbers of a format, each of which fits uint32; compiled loops take them as an array in this order."""

    dropped: int  # mantissa bits of float32 that the format has not
    is_wide: int  # whether the format has float32's exponents: its numbers are float32's with the dropped bits 0
    lowest: int  # float32 bits of the smallest normal number
    clamp: int  # float32 bits of the power of two after the largest number: all beyond is the same to a rounding
    largest: int  # float32 bits of the largest number
    beyond: int  # float32 bits of what infinities, and numbers that round beyond the largest, become
    keeps_zero_sign: int
    largest_code: int
    beyond_code: int
    nan_code: int
    sign_shift: int  # from float32's sign bit to the code's
    sign_bit: int


_NAN = 0x7FC00000


@cache
def target(fmt: FloatFormat, overflow: Overflow | None) -> Target:
    """Return the numbers of a format.

    Raises FormatError for an overflow mode that the format cannot serve, and for a format with float64's range or
    without a sign, which these loops do not round to.
    """
    mode = check_overflow(fmt, overflow)
    if fmt.mantissa_bits > 23 or fmt.exponent_bits > 8 or not fmt.is_signed:
        raise FormatError(f"tensors are not rounded to {fmt.name}: it has no sign, or is wider than float32")
    mantissa = fmt.mantissa_bits
    top = fmt.exponent_bits + mantissa
    infinity = float32_bits(math.inf)
    largest = float32_bits(fmt.max)
    largest_code = ((fmt.max_exponent - fmt.min_exponent + 1) << mantissa) + (
        (largest >> (23 - mantissa)) & ((1 << mantissa) - 1)
    )
    infinite_code = ((1 << fmt.exponent_bits) - 1) << mantissa
    nan_code = {
        Specials.IEEE: infinite_code | (1 << max(mantissa - 1, 0)),
        Specials.FN: (1 << top) - 1,
        Specials.FNUZ: 1 << top,
        Specials.NONE: 0,
    }[fmt.specials]
    beyond = {
        Overflow.INFINITY: (infinity, infinite_code),
        Overflow.SATURATE: (largest, largest_code),
        Overflow.NAN: (_NAN, nan_code),
    }[mode]
    is_wide = fmt.exponent_bits == 8
    return Target(
        dropped=23 - mantissa,
        is_wide=is_wide,
        lowest=float32_bits(fmt.smallest_normal),
        clamp=infinity if is_wide else float32_bits(2.0 ** (fmt.max_exponent + 1)),
        largest=largest,
        beyond=beyond[0],
        keeps_zero_sign=fmt.has_negative_zero,
        largest_code=largest_code,
        beyond_code=beyond[1],
        nan_code=nan_code,
        sign_shift=31 - top,
        sign_bit=1 << top,
    )


def float32_bits(value: float) -> int:
    """Return the bits of a number that float32 has."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])
