"""Operands of a product as a tensor core of another format would read them: rounded numbers, and their scales.

An operand is (rows, depth) or (depth, columns); `axis` is the one that the product sums over, along which blocks lie
and which rows and columns share a scale over. The scale is the largest number of the format over the largest magnitude,
found in float64 and stored in float32, with magnitudes taken as at least 1e-12, as torchao's float8 does; numbers
beyond the largest saturate. A magnitude that is not finite leaves its operand NaN, as the gradient then is anyway.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mezzotint.formats.inputs import BLOCK, InputRounding, ScaleGroup
from mezzotint.formats.rounding import Overflow, Rounding
from mezzotint.formats.spec import BlockFormat, FloatFormat
from mezzotint.kernels.tensors import round_to, round_to_blocks

SMALLEST_MAGNITUDE = 1e-12


class Operand(NamedTuple):
    """Numbers of a format in a dtype that holds them, and what they are to be multiplied by.

    `factor` is float32: one number, or one for each row (or column) that the product does not sum over.
    """

    values: Tensor
    factor: Tensor | None


class Role(NamedTuple):
    """What an operand is: a gradient or not, a weight or not, and the random stream of its rounding."""

    is_gradient: bool = False
    is_weight: bool = False
    seed: int = 0


def rounded_operand(
    source: Tensor, how: InputRounding, axis: int, role: Role, magnitude: Tensor | None = None
) -> Operand:
    """Return `source`, a matrix of float32, bfloat16 or float16, as an operand of a product that sums over `axis`.

    `magnitude`, a single number, replaces the largest magnitude of the tensor for scales that are delayed.
    """
    fmt = how.format_of(is_gradient=role.is_gradient)
    rounding = Rounding.STOCHASTIC if how.is_stochastic and role.is_gradient else Rounding.NEAREST_EVEN
    if isinstance(fmt, BlockFormat):
        # laid along the summed axis, the blocks of a transpose need no second one
        laid = source if axis == 1 else source.t().contiguous()
        rounded = round_to_blocks(laid, fmt, rounding=rounding, seed=role.seed)
        return Operand(rounded if axis == 1 else rounded.t(), None)
    if how.scale is ScaleGroup.BLOCK:
        return Operand(_rounded_tiles(source, fmt, axis, role, rounding), None)
    if how.scale is ScaleGroup.NONE:
        return Operand(_rounded(source, fmt, rounding, role.seed), None)
    if how.scale is ScaleGroup.TENSOR:
        largest = largest_magnitude(source) if magnitude is None else magnitude
    else:
        largest = source.abs().amax(dim=axis, keepdim=True)
    scale = scale_for(largest, fmt)
    values = _rounded(source.float() * scale, fmt, rounding, role.seed)
    return Operand(values, scale.reciprocal().flatten())


def largest_magnitude(source: Tensor) -> Tensor:
    """Return the largest magnitude of a tensor, a single number; 0 for one without elements."""
    if source.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=source.device)
    low, high = torch.aminmax(source.detach())
    return torch.maximum(high, -low).float()


def scale_for(largest: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the scale that brings a largest magnitude to the largest number of a format, float32."""
    return (fmt.max / largest.double().clamp(min=SMALLEST_MAGNITUDE)).float()


def _rounded(source: Tensor, fmt: FloatFormat, rounding: Rounding, seed: int) -> Tensor:
    """Return the numbers of `source` rounded to a format, in the smallest dtype that holds them all."""
    dtype = torch.float16 if fmt.mantissa_bits > 7 else torch.bfloat16
    out = torch.empty_like(source, dtype=dtype)
    return round_to(source, fmt, out=out, overflow=Overflow.SATURATE if fmt.bits <= 8 else None, rounding=rounding,
                    seed=seed)  # fmt: skip


def _rounded_tiles(source: Tensor, fmt: FloatFormat, axis: int, role: Role, rounding: Rounding) -> Tensor:
    """Return a matrix, float32, each of whose tiles was scaled, rounded and scaled back; the last may be smaller."""
    rows, columns = source.shape
    height = BLOCK if role.is_weight or axis == 0 else 1
    width = BLOCK if role.is_weight or axis == 1 else 1
    padded = torch.nn.functional.pad(source.float(), (0, -columns % width, 0, -rows % height))
    tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
    scale = scale_for(tiles.abs().amax(dim=(1, 3), keepdim=True), fmt)
    numbers = round_to(tiles * scale, fmt, overflow=Overflow.SATURATE, rounding=rounding, seed=role.seed)
    return (numbers / scale).view_as(padded)[:rows, :columns]
