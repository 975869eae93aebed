"""SwiGLU that keeps its two inputs, as they are stored, for backward.

As a chain of torch operations, `silu(gate) * up` keeps `silu(gate)`, too, and rounds it on the way. Here all arithmetic
is float32 and the result is rounded once.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.modules.reach import KINDS, is_served, rows_of, widened

_CHUNK = 8192  # the row length of what lies densely in memory


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), three linear layers; `dim` to `hidden_dim` and back.

    Parameters have the names and the initialisation of `mezzotint.models.gpt.FeedForward`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.up = nn.Linear(dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(hidden_dim, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, of the shape of `x`: (..., dim)."""
        out: Tensor = self.out(swiglu(self.gate(x), self.up(x)))
        return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up of tensors of any shape that broadcast, in their promoted dtype.

    >>> swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.4621])

    Raises ValueError for inputs that are not floating point, and for shapes that do not broadcast.
    """
    dtype = torch.promote_types(gate.dtype, up.dtype)
    if not (gate.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"gates of {gate.dtype} and {up.dtype} are refused; pass floating-point numbers")
    if not _broadcast(gate.shape, up.shape):
        raise ValueError(
            f"gate {tuple(gate.shape)} and up {tuple(up.shape)} do not broadcast; pass tensors of one shape"
        )
    if gate.shape == up.shape and gate.dtype is up.dtype and is_served(gate, up):
        out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return out
    return (F.silu(widened(gate)) * widened(up)).to(dtype)


def _broadcast(one: torch.Size, other: torch.Size) -> bool:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return one == other or all(n == m or 1 in (n, m) for n, m in pairs)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty(gate.shape, dtype=gate.dtype)
        width, ((gates, gate_bytes), (ups, up_bytes)) = _rows(gate, up)
        _gates().swiglu_forward(
            gate=gates.data_ptr(),
            gate_bytes=gate_bytes,
            up=ups.data_ptr(),
            up_bytes=up_bytes,
            kind=KINDS[gate.dtype],
            width=width,
            count=gate.numel(),
            out=out.data_ptr(),
            num_threads=torch.get_num_threads(),
        )
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        # hooks for saved tensors may have changed the dtype
        is_one_kind = grad.dtype is gate.dtype is up.dtype
        # with grad mode on, somebody is going to differentiate the gradients
        if torch.is_grad_enabled() or not (is_one_kind and is_served(grad, gate, up)):
            return _plain_gradients(grad, gate, up)
        grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
        width, ((grads, grad_bytes), (gates, gate_bytes), (ups, up_bytes)) = _rows(grad, gate, up)
        _gates().swiglu_backward(
            grad=grads.data_ptr(),
            grad_bytes=grad_bytes,
            gate=gates.data_ptr(),
            gate_bytes=gate_bytes,
            up=ups.data_ptr(),
            up_bytes=up_bytes,
            kind=KINDS[gate.dtype],
            width=width,
            count=gate.numel(),
            grad_gate=grad_gate.data_ptr(),
            grad_up=grad_up.data_ptr(),
            num_threads=torch.get_num_threads(),
        )
        return grad_gate, grad_up


def _rows(*tensors: Tensor) -> tuple[int, list[tuple[Tensor, int]]]:
    """Return the width of rows, and each tensor in rows of it with the bytes between them.

    Dense tensors are cut without regard to their axes; the last row may be short.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return _CHUNK, [(tensor, _CHUNK * tensor.element_size()) for tensor in tensors]
    width = tensors[0].shape[-1]
    return width, [rows_of(tensor, width) for tensor in tensors]


def _plain_gradients(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return both gradients by torch operations, which can be differentiated again and mapped over."""
    wide_grad, wide_gate = widened(grad), widened(gate)
    opened = torch.sigmoid(wide_gate)
    slope = opened * (1 + wide_gate * torch.sigmoid(-wide_gate))
    grad_gate = wide_grad * widened(up) * slope
    return grad_gate.to(gate.dtype), (wide_grad * wide_gate * opened).to(up.dtype)


@cache
def _gates() -> Any:
    """Return the compiled kernels; importing them takes half a second, so it waits for the first call."""
    from mezzotint.kernels import gates

    return gates
