"""FloatFormat and BlockFormat: binary floating-point formats as data, their limits as derived properties."""

import math
from dataclasses import dataclass
from enum import StrEnum

from mezzotint.errors import FormatError


class Specials(StrEnum):
    """Which code points are given up for infinities and NaN."""

    IEEE = "ieee"  # the top exponent holds infinities and NaN (IEEE 754-2019, 3.4)
    FN = "fn"  # no infinity; only the code of all ones is NaN, with either sign (OCP FP8 E4M3, MX E8M0)
    FNUZ = "fnuz"  # no infinity, no negative zero; the code of negative zero is NaN
    NONE = "none"  # every code is a finite number (OCP MX FP6, FP4)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary format of sign, exponent and mantissa fields.

    `bits` is the storage width. `exponent_bits` and `mantissa_bits` are field widths, the hidden bit not counted.
    `bias` is subtracted from the exponent field. `specification` names the defining document. A format without sign
    (`is_signed`) or zero (`has_zero`; the exponent field 0 is then an exponent like the others) is a scale of blocks.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    specification: str
    aliases: tuple[str, ...] = ()
    is_signed: bool = True
    has_zero: bool = True

    def __post_init__(self) -> None:
        """Refuse field widths that do not fit the storage."""
        if self.field_bits > self.bits:
            raise FormatError(f"{self.name}: sign, exponent and mantissa do not fit {self.bits} bits")

    def __str__(self) -> str:
        return self.name

    @property
    def field_bits(self) -> int:
        """The bits of the three fields; fewer than `bits` where storage is padded, as for tfloat32."""
        return self.is_signed + self.exponent_bits + self.mantissa_bits

    @property
    def significant_bits(self) -> int:
        """The bits that tell neighbours apart: the mantissa field and the hidden bit before it."""
        return self.mantissa_bits + 1

    @property
    def num_codes(self) -> int:
        """How many code points the fields have."""
        return 1 << self.field_bits

    @property
    def max_exponent(self) -> int:
        """The unbiased exponent of the largest finite number."""
        top = (1 << self.exponent_bits) - 1 - self.bias
        is_top_lost = self.specials is Specials.IEEE or (self.specials is Specials.FN and self.mantissa_bits == 0)
        return top - is_top_lost

    @property
    def min_exponent(self) -> int:
        """The unbiased exponent of the smallest normal number."""
        return 1 - self.bias if self.has_zero else -self.bias

    @property
    def max(self) -> float:
        """The largest finite number."""
        # FN gives up the last code of the top exponent for NaN, so its largest mantissa ends in 0
        last = 2 if self.specials is Specials.FN and self.mantissa_bits else 1
        return math.ldexp(2.0 - last * 2.0**-self.mantissa_bits, self.max_exponent)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal number."""
        return math.ldexp(1.0, self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number: a subnormal, or the smallest normal where there are no subnormals."""
        return math.ldexp(1.0, self.min_exponent - self.mantissa_bits)

    @property
    def epsilon(self) -> float:
        """Machine epsilon: the distance from 1.0 to the next larger number."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def decimal_digits(self) -> int:
        """How many decimal digits every normal number keeps (C's FLT_DIG): floor(mantissa_bits log10 2)."""
        return math.floor(self.mantissa_bits * math.log10(2))

    @property
    def has_infinity(self) -> bool:
        """Whether an overflow can become an infinity."""
        return self.specials is Specials.IEEE

    @property
    def num_nans(self) -> int:
        """How many code points are NaN."""
        per_sign = {
            Specials.IEEE: (1 << self.mantissa_bits) - 1,
            Specials.FN: 1,
            Specials.NONE: 0,
            Specials.FNUZ: 0,
        }[self.specials]
        return 1 if self.specials is Specials.FNUZ else per_sign * (1 + self.is_signed)

    @property
    def has_nan(self) -> bool:
        """Whether there is a NaN."""
        return self.num_nans > 0

    @property
    def has_negative_zero(self) -> bool:
        """Whether zero has a sign."""
        return self.is_signed and self.has_zero and self.specials is not Specials.FNUZ

    @property
    def bytes(self) -> float:
        """Storage of one number in bytes; below 1 for formats narrower than 8 bits."""
        return self.bits / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """Blocks of `block_size` elements that share a scale; a tensor may have one more scale, in float32."""

    name: str
    element: FloatFormat
    scale: FloatFormat
    block_size: int
    has_tensor_scale: bool
    specification: str
    aliases: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> float:
        """Storage of one element in bits, its share of the block's scale included."""
        return self.element.bits + self.scale.bits / self.block_size
