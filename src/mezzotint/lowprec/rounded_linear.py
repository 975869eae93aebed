"""RoundedLinear: a linear layer whose three products multiply inputs of a given format, on any device.

    forward           out         = inputs (T, K)       times weight (N, K)^T      summed over K
    input gradient    grad_inputs = grad_out (T, N)     times weight (N, K)        summed over N
    weight gradient   grad_weight = grad_out (T, N)^T   times inputs (T, K)        summed over T

The inputs are rounded, the products of rounded numbers are exact in float32, and float32 sums are rounded once to the
format that the layer computes in. That is what hardware does which sums in float32; Hopper's tensor cores keep about 14
bits of a float8 sum (DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.5.2), so equal bits with any one GPU are
not claimed. What is kept for backward is the unrounded input, which other layers keep too, and the weight itself; they
are rounded again there, as blocks and rows lie along another axis.

Delayed scales come from the largest magnitudes of past steps, which the layer keeps: see `RoundedLinear`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mezzotint.formats.inputs import InputRounding, ScaleGroup
from mezzotint.lowprec.operands import Operand, largest_magnitude
from mezzotint.lowprec.packed import Snap, product

INPUTS, WEIGHT, GRADIENT = range(3)


class RoundedLinear(nn.Linear):
    """torch's linear layer under an InputRounding; made of an existing one by `round_products`.

    `magnitudes` is a buffer (3, history + 1), float32, that no state_dict holds: for inputs, weight and output
    gradients, the largest magnitudes of the current step and of past ones. `roll_magnitudes` ends a step.
    """

    rounding: InputRounding
    magnitudes: Tensor | None

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output in the dtype that autocast asks for, or that of the inputs."""
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        out: Tensor = _Products.apply(  # type: ignore[no-untyped-call]
            inputs.to(dtype), self.weight, self.bias, self.rounding, self.magnitudes, torch.is_grad_enabled()
        )
        return out

    def extra_repr(self) -> str:
        """Return what torch's layer says, and the rounding."""
        return f"{super().extra_repr()}, products={self.rounding}"

    def roll_magnitudes(self) -> None:
        """Make the current step a past one, and forget the oldest; magnitudes that are not finite count as none."""
        if self.magnitudes is not None:
            self.magnitudes.copy_(self.magnitudes.nan_to_num(0.0, posinf=0.0).roll(1, dims=1))
            self.magnitudes[:, 0] = 0.0


def round_products(layer: nn.Linear, rounding: InputRounding) -> None:
    """Turn a linear layer, in place, into one whose products round their inputs; its parameters stay what they are."""
    layer.__class__ = RoundedLinear
    assert isinstance(layer, RoundedLinear)
    layer.rounding = rounding
    history = torch.zeros(3, rounding.history + 1, device=layer.weight.device) if rounding.history else None
    layer.register_buffer("magnitudes", history, persistent=False)


def unround_products(layer: RoundedLinear) -> None:
    """Turn a layer that `round_products` changed back into torch's linear layer."""
    del layer.magnitudes, layer.rounding
    layer.__class__ = nn.Linear  # type: ignore[assignment]


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        how: InputRounding,
        magnitudes: Tensor | None,
        is_noted: bool,
    ) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])
        past = [
            _magnitude(how, magnitudes, INPUTS, flat, is_noted=is_noted),
            _magnitude(how, magnitudes, WEIGHT, weight, is_noted=is_noted),
        ]
        with torch.autocast(inputs.device.type, enabled=False):
            left = Operand(source=flat, how=how, axis=1, magnitude=past[INPUTS])
            right = Operand(source=weight.t(), how=how, axis=0, is_weight=True, magnitude=past[WEIGHT])
            out = multiply(left, right, bias, inputs.dtype)
        ctx.save_for_backward(inputs, weight, *(m for m in past if m is not None))
        ctx.how, ctx.magnitudes, ctx.bias_dtype = how, magnitudes, None if bias is None else bias.dtype
        return out.view(*inputs.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, *past = ctx.saved_tensors
        how: InputRounding = ctx.how
        of_inputs, of_weight = past or (None, None)
        flat, grad = inputs.reshape(-1, inputs.shape[-1]), grad_out.reshape(-1, grad_out.shape[-1])
        needs_inputs, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_grad = _magnitude(how, ctx.magnitudes, GRADIENT, grad, is_noted=True)
        grad_inputs = grad_weight = None
        with torch.autocast(inputs.device.type, enabled=False):
            seed = _seed(grad) if how.is_stochastic else 0
            if needs_inputs:
                left = Operand(source=grad, how=how, axis=1, is_gradient=True, magnitude=of_grad, seed=seed)
                right = Operand(source=weight, how=how, axis=0, is_weight=True, magnitude=of_weight)
                grad_inputs = multiply(left, right, None, inputs.dtype).view_as(inputs)
            if needs_weight:
                left = Operand(source=grad.t(), how=how, axis=1, is_gradient=True, magnitude=of_grad, seed=seed + 1)
                right = Operand(source=flat, how=how, axis=0, magnitude=of_inputs)
                grad_weight = multiply(left, right, None, inputs.dtype).to(weight.dtype)
            grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        return grad_inputs, grad_weight, grad_bias, None, None, None


def multiply(left: Operand, right: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the product of rounded operands (M, K) and (K, N), summed in float32 and rounded once to `dtype`."""
    if left.source.is_cpu:
        # rounded while they are packed, or before where packing cannot
        (first, first_how), (second, second_how) = (_for_packing(operand) for operand in (left, right))
        made = product(first, second, bias, left_how=first_how, right_how=second_how, out_dtype=dtype)
        if made is not None:
            return made
    (first, first_scale), (second, second_scale) = left.rounded(), right.rounded()
    out = first.float() @ second.float()
    if first_scale is not None:
        out *= first_scale.reciprocal()[:, None]
    if second_scale is not None:
        out *= second_scale.reciprocal()
    if bias is not None:
        out += bias
    return out.to(dtype)


def _for_packing(operand: Operand) -> tuple[Tensor, Snap]:
    how = operand.snap()
    if how is not None:
        return operand.source.detach(), how
    values, scale = operand.rounded()
    return values, Snap(0, None, scale)


def _seed(source: Tensor) -> int:
    """Return a number made of all bits of a tensor, for its random rounding.

    Torch's generators are left alone: a run that rounds at random shares its dropout masks with one that does not.
    """
    words = source.detach().view(torch.int16 if source.element_size() == 2 else torch.int32)
    return 2 * int(words.sum(dtype=torch.int64))


def _magnitude(
    how: InputRounding, magnitudes: Tensor | None, role: int, source: Tensor, *, is_noted: bool
) -> Tensor | None:
    """Return the magnitude that a scale of the whole tensor is made of; where scales are delayed, note this one.

    A first step has no past, so it takes its own.
    """
    if how.scale is not ScaleGroup.TENSOR:
        return None
    current = largest_magnitude(source)
    if magnitudes is None:
        return current
    past = magnitudes[role, 1:].amax()
    if is_noted:
        magnitudes[role, 0] = torch.maximum(magnitudes[role, 0], current)
    return torch.where(past > 0, past, current)
