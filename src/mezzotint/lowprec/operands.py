"""Operands of a product as a tensor core of another format would read them: rounded numbers, and their scales.

The scale is the largest number of the format over the largest magnitude, found in float64 and stored in float32, with
magnitudes taken as at least 1e-12, as torchao's float8 does; numbers beyond the largest saturate. A magnitude that is
not finite leaves its operand NaN, as the gradient then is anyway.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mezzotint.formats.inputs import BLOCK, InputRounding, ScaleGroup
from mezzotint.formats.rounding import Overflow, Rounding
from mezzotint.formats.spec import BlockFormat, FloatFormat
from mezzotint.kernels.tensors import round_to, round_to_blocks, target_address
from mezzotint.lowprec.packed import Snap

SMALLEST_MAGNITUDE = 1e-12
FLOAT32_EXPONENTS = 8
MX_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A matrix and how its numbers are to be rounded.

    `axis` is the one that the product sums over, 0 or 1: blocks lie along it, and numbers along it share the scale of a
    row or column. `magnitude`, a single number, replaces the largest magnitude of the tensor for delayed scales.
    `is_gradient` and `is_weight` say what it is; `seed` chooses the random bits of stochastic rounding.
    """

    source: Tensor
    how: InputRounding
    axis: int
    is_gradient: bool = False
    is_weight: bool = False
    magnitude: Tensor | None = None
    seed: int = 0

    @property
    def fmt(self) -> FloatFormat | BlockFormat:
        """The format of the numbers."""
        return self.how.format_of(is_gradient=self.is_gradient)

    @property
    def rounding(self) -> Rounding:
        """Gradients alone are rounded at random, where anything is."""
        return Rounding.STOCHASTIC if self.how.is_stochastic and self.is_gradient else Rounding.NEAREST_EVEN

    def scale(self) -> Tensor | None:
        """Return what the numbers are multiplied by before they are rounded, float32: one, or one for each line."""
        if isinstance(self.fmt, BlockFormat) or self.how.scale not in (ScaleGroup.TENSOR, ScaleGroup.ROW):
            return None
        if self.how.scale is ScaleGroup.ROW:
            return scale_for(_magnitudes(self.source, self.axis), self.fmt)
        largest = largest_magnitude(self.source) if self.magnitude is None else self.magnitude
        return scale_for(largest, self.fmt).view(1)

    def snap(self) -> Snap | None:
        """Return the rounding as packing does it, or None where it cannot."""
        fmt = self.fmt
        if self.rounding is Rounding.STOCHASTIC or self.how.scale is ScaleGroup.BLOCK:
            return None
        if isinstance(fmt, BlockFormat):
            if fmt.has_tensor_scale or fmt.block_size != MX_BLOCK:
                return None
            return Snap(target_address(fmt.element, Overflow.SATURATE), fmt.element.max_exponent)
        if fmt.exponent_bits == FLOAT32_EXPONENTS:
            return None
        return Snap(target_address(fmt, _overflow(fmt)), None, self.scale())

    def rounded(self) -> tuple[Tensor, Tensor | None]:
        """Return the rounded numbers, in a dtype that holds them, and the scale that they still carry."""
        fmt, rounding = self.fmt, self.rounding
        if isinstance(fmt, BlockFormat):
            # laid along the summed axis, the blocks of a transpose need no second one
            laid = self.source if self.axis == 1 else self.source.t().contiguous()
            near = round_to_blocks(laid, fmt, rounding=rounding, seed=self.seed)
            return near if self.axis == 1 else near.t(), None
        if self.how.scale is ScaleGroup.BLOCK:
            return self._rounded_tiles(fmt), None
        scale = self.scale()
        if scale is None:
            return self._rounded(self.source, fmt), None
        return self._rounded(self.source.float() * (scale if self.axis == 0 else scale[:, None]), fmt), scale

    def _rounded(self, source: Tensor, fmt: FloatFormat) -> Tensor:
        """Return numbers rounded to a format, in the smaller dtype of the two that hold them all."""
        dtype = torch.float16 if fmt.mantissa_bits > 7 else torch.bfloat16
        out = torch.empty_like(source, dtype=dtype)
        return round_to(source, fmt, out=out, overflow=_overflow(fmt), rounding=self.rounding, seed=self.seed)

    def _rounded_tiles(self, fmt: FloatFormat) -> Tensor:
        """Return the matrix, float32, each of whose tiles was scaled, rounded and scaled back; the last are smaller."""
        rows, columns = self.source.shape
        height = BLOCK if self.is_weight or self.axis == 0 else 1
        width = BLOCK if self.is_weight or self.axis == 1 else 1
        padded = torch.nn.functional.pad(self.source.float(), (0, -columns % width, 0, -rows % height))
        tiles = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        scale = scale_for(_magnitudes(tiles, (1, 3)), fmt)[:, None, :, None]
        numbers = round_to(tiles * scale, fmt, overflow=_overflow(fmt), rounding=self.rounding, seed=self.seed)
        return (numbers / scale).view_as(padded)[:rows, :columns]


def largest_magnitude(source: Tensor) -> Tensor:
    """Return the largest magnitude of a tensor, a single number; 0 for one without elements."""
    if source.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=source.device)
    low, high = torch.aminmax(source.detach())
    return torch.maximum(high, -low).float()


def scale_for(largest: Tensor, fmt: FloatFormat) -> Tensor:
    """Return the scales that bring largest magnitudes to the largest number of a format, float32."""
    return (fmt.max / largest.double().clamp(min=SMALLEST_MAGNITUDE)).float()


def _magnitudes(source: Tensor, axes: int | tuple[int, ...]) -> Tensor:
    """Return the largest magnitudes along axes, float32; 0 where there is nothing."""
    if source.numel() == 0:
        return source.sum(axes).float()
    return torch.maximum(source.amax(axes), -source.amin(axes)).float()


def _overflow(fmt: FloatFormat) -> Overflow:
    """Return what becomes of numbers beyond the largest: 8 bits and fewer saturate, float16 has its infinity."""
    return Overflow.SATURATE if fmt.bits <= 8 else Overflow.INFINITY
