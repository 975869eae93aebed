"""RMSNorm that keeps its input as it is stored, and one float32 number a row, for backward.

torch's own operation on the CPU is a chain: under bfloat16 it keeps the float32 copy of the input and the normalised
one, 8 bytes an element. Here it is 2, and those are usually the very tensor that the layer before made. All arithmetic
is float32 and the result is rounded once; a float32 weight is read as float32, whatever the input.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.modules.reach import KINDS, is_served, rows_of, widened


class RMSNorm(nn.Module):
    """torch.nn.RMSNorm's arguments, parameters and state_dict; the output has the dtype of the input.

    `normalized_shape` are the sizes of the last axes, over all of which a root mean square is taken. `eps` is added to
    the mean of squares; None is that of float32 (of float64 for float64 inputs).
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: int | list[int] | tuple[int, ...] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        if elementwise_affine:
            self.weight = nn.Parameter(torch.empty(self.normalized_shape, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input. Raises ValueError where its last axes are not `normalized_shape`."""
        num_axes = len(self.normalized_shape)
        if x.shape[-num_axes:] != self.normalized_shape:
            raise ValueError(
                f"an input of shape {tuple(x.shape)} does not end in normalized_shape={self.normalized_shape}; "
                "build the norm for the input's last axes"
            )
        if self.weight is None and num_axes > 1:
            return rms_norm(x.flatten(-num_axes), None, self.eps).view(x.shape)
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        """Return the arguments, as torch shows them."""
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight, of the shape and dtype of `x`.

    The mean is over the last axes, as many as `weight` has; without a weight over the last one. `eps` None is the
    distance from 1 to the next float32 number (float64, for float64 inputs).

    >>> rms_norm(torch.tensor([3.0, -4.0]))
    tensor([ 0.8485, -1.1314])

    Raises ValueError for a weight whose shape is not that of the last axes, and for inputs that are not floating point.
    """
    shape = x.shape[-1:] if weight is None else weight.shape
    if x.dim() == 0 or x.shape[x.dim() - len(shape) :] != shape:
        raise ValueError(
            f"an input of shape {tuple(x.shape)} has no last axes of the weight's shape, {tuple(shape)}; "
            "pass a weight for the axes to normalise over"
        )
    if not x.is_floating_point():
        raise ValueError(f"an input of {x.dtype} cannot be normalised; pass floating-point numbers")
    if is_served(x, weight):
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        out: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return out
    return F.rms_norm(widened(x), shape, None if weight is None else widened(weight), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        width = x.shape[-1] if weight is None else weight.numel()
        rows, row_bytes = rows_of(x, width)
        factors = _factors(weight, width)
        out = torch.empty(x.shape, dtype=x.dtype)
        rstd = torch.empty(len(rows), dtype=torch.float32)
        _norms().rms_forward(
            x=rows.data_ptr(),
            x_bytes=row_bytes,
            kind=KINDS[x.dtype],
            num_rows=len(rows),
            width=width,
            weight=factors.data_ptr(),
            eps=eps,
            out=out.data_ptr(),
            rstd=rstd.data_ptr(),
            num_threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(x, weight, rstd)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        # hooks for saved tensors may have changed the dtype
        is_one_kind = grad.dtype is x.dtype and rstd.dtype is torch.float32 and rstd.is_contiguous()
        # with grad mode on, somebody is going to differentiate the gradients
        if torch.is_grad_enabled() or not (is_one_kind and is_served(grad, x, weight, rstd)):
            return *_plain_gradients(grad, x, weight, ctx.eps), None
        needs_x, needs_weight, _ = ctx.needs_input_grad
        width = x.shape[-1] if weight is None else weight.numel()
        (rows, row_bytes), (grad_rows, grad_bytes) = rows_of(x, width), rows_of(grad, width)
        factors = _factors(weight, width)
        grad_x = torch.empty(x.shape, dtype=x.dtype) if needs_x else None
        parts = torch.zeros(_norms().num_parts(len(rows)), width, dtype=torch.float32)
        total = torch.zeros(width, dtype=torch.float32) if needs_weight else None
        _norms().rms_backward(
            grad=grad_rows.data_ptr(),
            grad_bytes=grad_bytes,
            x=rows.data_ptr(),
            x_bytes=row_bytes,
            kind=KINDS[x.dtype],
            num_rows=len(rows),
            width=width,
            weight=factors.data_ptr(),
            rstd=rstd.data_ptr(),
            grad_x=0 if grad_x is None else grad_x.data_ptr(),
            parts=parts.data_ptr(),
            grad_weight=0 if total is None else total.data_ptr(),
            num_threads=torch.get_num_threads(),
        )
        return grad_x, None if total is None else total.view(weight.shape).to(weight.dtype), None


def _factors(weight: Tensor | None, width: int) -> Tensor:
    """Return the weight as the kernels read it, dense float32."""
    return torch.ones(width) if weight is None else weight.detach().float().contiguous()


def _plain_gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Return both gradients by torch operations, which can be differentiated again and mapped over."""
    num_axes = 1 if weight is None else weight.dim()
    axes = list(range(-num_axes, 0))
    wide, wide_grad = widened(x), widened(grad)
    rstd = torch.rsqrt(wide.square().mean(axes, keepdim=True) + eps)
    hat = wide * rstd
    weighted = wide_grad if weight is None else wide_grad * widened(weight)
    grad_x = rstd * (weighted - hat * (weighted * hat).mean(axes, keepdim=True))
    if weight is None:
        return grad_x.to(x.dtype), None
    products = wide_grad * hat
    count = math.prod(x.shape[: x.dim() - num_axes])
    grad_weight = products.reshape(count, *weight.shape).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


@cache
def _norms() -> Any:
    """Return the compiled kernels; importing them takes half a second, so it waits for the first call."""
    from mezzotint.kernels import norms

    return norms
