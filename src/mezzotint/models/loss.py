"""The cross-entropy of a language model in float32, without float32 logits as a whole.

`cross_entropy` under CUDA autocast computes its log-softmax in the dtype of the logits, so it gets float32. That is
done in chunks of rows, recomputed in backward, so the float32 logits never exist as a whole. Computing the gradient in
forward instead would save the second pass over the head, but that gradient would not carry the loss scale yet, and in
float16 what is below 6e-8 would be lost before scaling could save it. So it is with the chunked `linear_cross_entropy`
of torch 2.13, whose loss of float16 rows is float16 too, so that a scale of 65536 makes every gradient NaN; and float32
rows it multiplies in float32 whatever autocast says (measured on the CPU).

The head's gradients are summed over these chunks in float32: in bfloat16 they would be off by 1 % after 64 of them.

Shapes: N rows, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100  # target of a token that does not count


def chunked_loss(
    rows_ND: Tensor, weight_VD: Tensor | None, targets_N: Tensor, chunk_rows: int, *, ignore_index: int = IGNORED
) -> Tensor:
    """Return the mean cross-entropy of rows against targets, in float32, holding `chunk_rows` float32 rows at a time.

    `rows_ND` are logits (N, V), or with a weight hidden states (N, D) whose logits are `rows @ weight.T`. Each chunk is
    computed again in backward instead of being kept. The weight's gradient is summed over the chunks in float32.
    """
    total = torch.zeros((), dtype=torch.float32, device=rows_ND.device)
    needs_grad = rows_ND.requires_grad or (weight_VD is not None and weight_VD.requires_grad)
    is_recomputed = torch.is_grad_enabled() and needs_grad
    if weight_VD is not None:
        # each chunk casts the float32 weight for itself, so that gradients meet in float32; a view, because autocast
        # would cast a parameter once for all chunks and sum their gradients in the dtype of that cast
        weight_VD = _wide(weight_VD).view_as(weight_VD)
    for rows, targets in zip(torch.split(rows_ND, chunk_rows), torch.split(targets_N, chunk_rows), strict=True):
        if is_recomputed:
            total = total + checkpoint(
                _summed_loss, rows, weight_VD, targets, ignore_index, use_reentrant=False, preserve_rng_state=False
            )
        else:
            total = total + _summed_loss(rows, weight_VD, targets, ignore_index)
    return total / (targets_N != ignore_index).sum()


def _summed_loss(rows: Tensor, weight_VD: Tensor | None, targets: Tensor, ignore_index: int) -> Tensor:
    logits = rows if weight_VD is None else F.linear(rows, weight_VD.to(rows.dtype))
    return F.cross_entropy(_wide(logits), targets, ignore_index=ignore_index, reduction="sum")


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32; float64 stays float64, for references."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
