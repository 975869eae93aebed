"""CPU kernels that compute low-precision products in float32: convert, multiply by torch's float32 kernel, round once.

The numerics are a tensor core's: compact operands, float32 accumulation, one rounding of the result. The kernels sit
at the CPU dispatch key, below autograd, so saved tensors stay compact and backward, checkpointing, vmap and inference
mode are served alike. Whatever is not for us (another dtype, mixed dtypes, the gate shut) goes to torch's own kernel.

The matrix products pass it on by their public `out=` overload: a kernel handle would hold Python's global lock for the
whole product, which starves loader threads. Attention has no such overload, so float32 attention gradients hold the
lock while these kernels are registered.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
Gate = Mapping[torch.dtype, int]
_library: torch.library.Library | None = None


def register(gate: Gate) -> None:
    """Register the kernels, once per process, to act on the dtypes whose count in `gate` is above 0."""
    global _library  # noqa: PLW0603 - the registration is a fact about the process, and must outlive every caller
    if _library is not None:
        return
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    # the originals have to be looked up before ours stand in their place
    flash_forward = _original("aten::_scaled_dot_product_flash_attention_for_cpu")
    flash_backward = _original("aten::_scaled_dot_product_flash_attention_for_cpu_backward")
    kernels = {
        "mm": _mm(gate),
        "bmm": _bmm(gate),
        "addmm": _addmm(gate),
        "baddbmm": _baddbmm(gate),
        "_scaled_dot_product_flash_attention_for_cpu": _attention(gate, flash_forward),
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward(gate, flash_backward),
    }
    with warnings.catch_warnings():
        # torch warns once per process that a kernel is overridden, which is what we are here for
        warnings.simplefilter("ignore", UserWarning)
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    _library = library


def _original(name: str) -> Callable[..., Any]:
    kernel = torch.library.get_kernel(name, "CPU")
    return lambda *args, **kwargs: kernel.call_boxed(_CPU_KEYS, *args, **kwargs)


_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def _mm(gate: Gate) -> Callable[..., Tensor]:
    product = aten.mm.out

    def mm(left: Tensor, right: Tensor) -> Tensor:
        dtype = left.dtype
        if gate.get(dtype, 0) and right.dtype is dtype and left.dim() == 2 == right.dim():
            left, right = left.float(), right.float()
            return product(left, right, out=left.new_empty((left.shape[0], right.shape[1]))).to(dtype)  # type: ignore[no-any-return]
        return product(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]

    return mm


def _bmm(gate: Gate) -> Callable[..., Tensor]:
    product = aten.bmm.out

    def bmm(left: Tensor, right: Tensor) -> Tensor:
        dtype = left.dtype
        if gate.get(dtype, 0) and right.dtype is dtype:
            return product(left.float(), right.float(), out=left.new_empty(0, dtype=torch.float32)).to(dtype)  # type: ignore[no-any-return]
        return product(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]

    return bmm


def _addmm(gate: Gate) -> Callable[..., Tensor]:
    return _added(gate, aten.addmm.out)


def _baddbmm(gate: Gate) -> Callable[..., Tensor]:
    return _added(gate, aten.baddbmm.out)


def _added(gate: Gate, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def added(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        dtype = left.dtype
        if gate.get(dtype, 0) and right.dtype is dtype and bias.dtype is dtype:
            out = left.new_empty(0, dtype=torch.float32)
            return product(bias.float(), left.float(), right.float(), beta=beta, alpha=alpha, out=out).to(dtype)
        return product(bias, left, right, beta=beta, alpha=alpha, out=left.new_empty(0))

    return added


def _attention(gate: Gate, original: Callable[..., Any]) -> Callable[..., Any]:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        # bfloat16 is left to torch: its forward takes 1.05 of float32's time even where its products are emulated
        if not (gate.get(query.dtype, 0) and query.dtype is torch.float16):
            return original(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        out, logsumexp = original(
            *(t.float() for t in (query, key, value)), dropout_p, is_causal, attn_mask=_float(attn_mask), scale=scale
        )
        return out.to(query.dtype), logsumexp

    return attention


def _attention_backward(gate: Gate, original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Any:
        tensors = (grad_out, query, key, value, out)
        if not gate.get(query.dtype, 0):
            return original(*tensors, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        grads = original(
            *(t.float() for t in tensors),
            logsumexp.float(),
            dropout_p,
            is_causal,
            attn_mask=_float(attn_mask),
            scale=scale,
        )
        return tuple(grad.to(query.dtype) for grad in grads)

    return backward


def _float(mask: Tensor | None) -> Tensor | None:
    return mask.float() if mask is not None and mask.dtype in (torch.bfloat16, torch.float16) else mask
