"""Rounding of torch tensors on any device, beyond what a cast does."""

import torch
from torch import Tensor

from mezzotint.errors import FormatError

_MASK_64 = (1 << 64) - 1


def stochastic_round(source: Tensor, out: Tensor, *, seed: int, offset: int) -> None:
    """Write `source`, float32, into `out`, bfloat16 of the same shape, rounded up or down at random.

    A value between two neighbours goes to each with the probability that makes the result right on average; values
    that bfloat16 has, infinities and NaN stay what they are (Croci et al. 2022, doi 10.1098/rsos.211631). The choice
    follows from `seed` and `offset` alone, on a given device.

    The 16 bits that bfloat16 drops are a fraction of its ulp; adding 16 random bits carries into the kept ones with
    just that probability.

    Raises FormatError for other dtypes or shapes.
    """
    if source.dtype is not torch.float32 or out.dtype is not torch.bfloat16 or source.shape != out.shape:
        raise FormatError(
            f"stochastic_round takes float32 into bfloat16 of one shape, not {source.dtype} {tuple(source.shape)} into "
            f"{out.dtype} {tuple(out.shape)}"
        )
    generator = torch.Generator(device=source.device).manual_seed(_mix(seed, offset))
    noise = torch.randint(0, 1 << 16, source.shape, generator=generator, dtype=torch.int32, device=source.device)
    bits = noise.add_(source.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    rounded = bits.view(torch.float32)
    # a carry would turn a NaN into an infinity or a zero
    out.copy_(torch.where(source.isnan(), source, rounded))


def _mix(seed: int, offset: int) -> int:
    """Return 64 bits that differ in about half their places for neighbouring seeds and offsets (splitmix64)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + offset * 0xD1B54A32D192ED03 + 1) & _MASK_64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return mixed ^ (mixed >> 31)
