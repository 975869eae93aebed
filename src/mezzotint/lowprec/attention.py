"""Fused attention of the CPU in low precision: torch's float32 kernel on upcast inputs.

bfloat16's forward is left to torch: it takes 1.1 times float32's time even where products are emulated.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.lowprec.calls import count
from mezzotint.lowprec.choice import Path
from mezzotint.lowprec.gate import is_ours, upcast

FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
ORIGINALS = (FORWARD, BACKWARD)


def kernels(originals: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return the kernels that replace torch's for the CPU, by name of the operation."""
    return {FORWARD: _attention(originals[FORWARD]), BACKWARD: _attention_backward(originals[BACKWARD])}


def _attention(original: Callable[..., Any]) -> Callable[..., Any]:
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
        if not (is_ours(query.dtype) and query.dtype is torch.float16):
            return original(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        count(FORWARD, Path.UPCAST)
        out, logsumexp = original(
            *(t.float() for t in (query, key, value)), dropout_p, is_causal, attn_mask=upcast(attn_mask), scale=scale
        )
        return out.to(query.dtype), logsumexp

    return attention


def _attention_backward(original: Callable[..., Any]) -> Callable[..., Any]:
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
        if not is_ours(query.dtype):
            return original(*tensors, logsumexp, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        count(BACKWARD, Path.UPCAST)
        grads = original(
            *(t.float() for t in tensors),
            logsumexp.float(),
            dropout_p,
            is_causal,
            attn_mask=upcast(attn_mask),
            scale=scale,
        )
        return tuple(grad.to(query.dtype) for grad in grads)

    return backward
