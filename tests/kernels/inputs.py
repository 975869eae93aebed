"""Numbers at which a rounding can go wrong, for any format."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from mezzotint.formats.catalog import FORMATS
from mezzotint.formats.codec import decode
from mezzotint.formats.spec import FloatFormat

# what tensors are rounded to: signed, and no wider than float32
TARGETS = [fmt for fmt in FORMATS if fmt.is_signed and fmt.mantissa_bits <= 23]
NARROW = [fmt for fmt in TARGETS if fmt.bits <= 8]
BITS_OF_ALL_SORTS = 1 << 16


def critical(fmt: FloatFormat) -> Tensor:
    """Return float32 numbers on, beside and half-way between numbers of `fmt`, and around both ends of its range."""
    magnitudes: set[float] = {0.0, fmt.max, fmt.smallest_normal, fmt.smallest_subnormal}
    if fmt.bits <= 8:
        values = [abs(decode(code, fmt)) for code in range(fmt.num_codes)]
        finite = sorted(value for value in values if math.isfinite(value))
        magnitudes.update(finite)
        magnitudes.update((a + b) / 2 for a, b in itertools.pairwise(finite))
    else:
        rng = np.random.default_rng(1)
        for exponent in range(max(fmt.min_exponent - fmt.mantissa_bits - 2, -149), fmt.max_exponent + 1):
            place = 2.0 ** (max(exponent, fmt.min_exponent) - fmt.mantissa_bits)
            steps = rng.integers(0, 1 << fmt.mantissa_bits, 3)
            magnitudes.update(2.0**exponent + float(step) * place for step in steps)
            magnitudes.update(2.0**exponent + (float(step) + 0.5) * place for step in steps)
    top_place = 2.0 ** (fmt.max_exponent - fmt.mantissa_bits)
    magnitudes.update(fmt.max + top_place * part for part in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0))
    magnitudes.update((fmt.max * 2, fmt.max * 1000, fmt.smallest_subnormal / 2, fmt.smallest_subnormal / 4))
    exact = torch.tensor(sorted(magnitudes), dtype=torch.float64).float()
    around = torch.cat(
        [exact, torch.nextafter(exact, torch.tensor(0.0)), torch.nextafter(exact, torch.tensor(torch.inf))]
    )
    ends = torch.tensor([torch.inf, 2.0**-149, 2.0**-126, 1e-42, torch.finfo(torch.float32).max])
    both = torch.cat([around, ends]).unique()
    return torch.cat([both, -both, torch.tensor([-0.0])])


def all_sorts(seed: int = 0, count: int = BITS_OF_ALL_SORTS) -> Tensor:
    """Return float32 numbers of random bits: all exponents alike, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator, dtype=torch.int64)
    special = torch.tensor([0x7F800000, -0x800000, 0x7FC00000, 0x7F800001, -1, 0, -(1 << 31)])
    bits[: special.numel()] = special
    return bits.to(torch.int32).view(torch.float32)


def moderate(seed: int = 0, count: int = BITS_OF_ALL_SORTS) -> Tensor:
    """Return float32 numbers within and somewhat beyond the range of 16-bit and narrower formats."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-28, 20, (count,), generator=generator)
    return torch.ldexp(torch.randn(count, generator=generator), exponents)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two float32 tensors are equal, signs of zero included, any NaN equal to any other."""
    nan = one.isnan()
    return bool((nan == other.isnan()).all()) and torch.equal(
        one[~nan].view(torch.int32), other[~nan].view(torch.int32)
    )
