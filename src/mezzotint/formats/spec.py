"""FloatFormat: a binary floating-point format as data, its limits as derived properties."""

from dataclasses import dataclass
from enum import StrEnum

from mezzotint.errors import FormatError


class Specials(StrEnum):
    """Which code points are given up for infinities and NaN."""

    IEEE = "ieee"  # the top exponent holds infinities and NaN (IEEE 754-2019, 3.4)
    FN = "fn"  # no infinity; only the all-ones code is NaN (OCP FP8 E4M3)
    FNUZ = "fnuz"  # no infinity, no negative zero; the negative-zero code is NaN
    NONE = "none"  # every code is a finite number (OCP MX FP6, FP4)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A binary format of sign, exponent and mantissa fields.

    `bits` is the storage width. `exponent_bits` and `mantissa_bits` are field widths, the hidden bit not
    counted. `bias` is subtracted from the exponent field. `specification` names the defining document.
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

    def __post_init__(self) -> None:
        """Refuse field widths that do not fit the storage."""
        if self.is_signed + self.exponent_bits + self.mantissa_bits > self.bits:
            raise FormatError(f"{self.name}: sign, exponent and mantissa do not fit {self.bits} bits")

    def __str__(self) -> str:
        return self.name

    @property
    def max_exponent(self) -> int:
        """The unbiased exponent of the largest finite number."""
        top = (1 << self.exponent_bits) - 1 - self.bias
        return top - 1 if self.specials is Specials.IEEE else top

    @property
    def min_exponent(self) -> int:
        """The unbiased exponent of the smallest normal number."""
        return 1 - self.bias if self.mantissa_bits else -self.bias

    @property
    def max(self) -> float:
        """The largest finite number."""
        # FN gives up the last code of the top exponent for NaN, so its largest mantissa ends in 0
        last = 2 if self.specials is Specials.FN and self.mantissa_bits else 1
        fraction = 2.0 - last * 2.0**-self.mantissa_bits
        return float(fraction * 2.0**self.max_exponent)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal number."""
        return float(2.0**self.min_exponent)

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive number, a subnormal (the smallest normal where there are no subnormals)."""
        return float(2.0 ** (self.min_exponent - self.mantissa_bits))

    @property
    def epsilon(self) -> float:
        """Machine epsilon: the distance from 1.0 to the next larger number."""
        return float(2.0**-self.mantissa_bits)

    @property
    def has_infinity(self) -> bool:
        """Whether an overflow can become an infinity."""
        return self.specials is Specials.IEEE

    @property
    def bytes(self) -> float:
        """Storage of one number in bytes; below 1 for formats narrower than 8 bits."""
        return self.bits / 8
