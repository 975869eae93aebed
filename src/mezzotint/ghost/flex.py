"""FlexAttention on a ghost GPU: a fused kernel where the program compiles it, written-out attention where it does not.

PyTorch's own goes through a compiler or through `vmap`, and neither can follow ghosts. What the user's functions do to
scores costs nothing in the fused kernel, which is planned as FlashAttention is; a mask that lets at most so much
through as a causal one counts as causal. How much it lets through is asked of the mask on a grid of positions.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzotint.patches import Patches
from mezzotint.torch_internals.flex import replace_in_flex
from mezzotint.torch_internals.operators import aten

if TYPE_CHECKING:
    from mezzotint.ghost.session import ghost_gpu

_LOW = (torch.float16, torch.bfloat16)
_CAUSAL = 0.6
_GRID = 32
_LARGEST_HEAD = 256


def patch_flex(patches: Patches, gpu: "ghost_gpu") -> None:
    """Replace the operator, and the `vmap` that makes masks."""

    def attention(
        query: Tensor, key: Tensor, value: Tensor, _score_mod: Any, mask: tuple[Any, ...], scale: float, *_rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        low = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        if low is not None:
            query, key, value = (one.to(low) for one in (query, key, value))
        share = _share(mask[-1], query.shape[-2], key.shape[-2])
        if gpu.regions.is_inside:
            note = f"flex_attention is planned as fused attention; its mask lets {share:.0%} through"
            out = _fused(query, key, value, scale, is_causal=share <= _CAUSAL)
        else:
            note = "flex_attention without torch.compile writes its scores out"
            out = _written_out(query, key, value, scale)
        if note not in gpu.notes:
            gpu.notes.append(note)
        statistics = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        return out, statistics, statistics

    replace_in_flex(patches, attention, _broadcast, _dense)


def _broadcast(
    function: Callable[..., Tensor], prefix: tuple[int | None, ...], *_args: Any, **_kwargs: Any
) -> Callable[..., Tensor]:
    """Return a function of all positions that calls a function of one, by broadcasting instead of `vmap`."""

    def over_all(*args: Any) -> Tensor:
        scores, (b, h, q, kv) = args[: len(prefix)], args[len(prefix) : len(prefix) + 4]
        out = function(
            *scores, b[:, None, None, None], h[None, :, None, None], q[None, None, :, None], kv[None, None, None, :]
        )
        return out.expand(b.numel(), h.numel(), q.numel(), kv.numel())

    return over_all


def _dense(num_blocks: Tensor, columns: Tensor, num_columns: int) -> Tensor:
    """Return rows of zeros and ones from the columns of the ones; PyTorch's own goes through `vmap`."""
    places = torch.arange(columns.shape[-1], device=columns.device)
    kept = torch.where(places < num_blocks[..., None], columns, num_columns).long()
    out = torch.zeros(*num_blocks.shape, num_columns + 1, dtype=torch.int32, device=columns.device)
    return out.scatter(-1, kept, torch.ones_like(kept, dtype=torch.int32))[..., :num_columns].contiguous()


def _share(mask_mod: Callable[..., Tensor], rows: int, columns: int) -> float:
    """Return the share of positions that a mask lets through, on a grid; all where it cannot be asked on the CPU."""
    try:
        with torch.device("cpu"):
            zero = torch.zeros((), dtype=torch.long)
            q = torch.linspace(0, rows - 1, min(rows, _GRID)).long()
            kv = torch.linspace(0, columns - 1, min(columns, _GRID)).long()
            found = mask_mod(zero, zero, q[:, None], kv[None, :])
            return float(found.float().expand(len(q), len(kv)).mean())
    except Exception:  # a user's function, which may want tensors that are not here
        return 1.0


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, *, is_causal: bool) -> Tensor:
    size = query.shape[-1]
    if query.dtype in _LOW and size <= _LARGEST_HEAD and size == value.shape[-1]:
        out: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, scale=scale)[0]
        return out
    groups = query.shape[-3] // key.shape[-3]
    key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    needs_grad = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
        query, key, value, None, needs_grad, 0.0, is_causal, scale=scale
    )[0]


def _written_out(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    groups = query.shape[-3] // key.shape[-3]
    if groups > 1:
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query @ key.transpose(-2, -1)).float() * scale
    scores = torch.where(torch.ones_like(scores, dtype=torch.bool), scores, -torch.inf)
    return scores.softmax(-1).to(query.dtype) @ value
