"""Which tensors compiled kernels take, and how they are handed over: as rows of dense numbers, by address.

Everything else (other devices, fake tensors, what `torch.compile`, `vmap` and forward-mode differentiation trace) is
computed by torch operations with the same formula.
"""

from functools import cache

import torch
from torch import Tensor

from mezzotint.kernels.constants import BFLOAT16, FLOAT16, FLOAT32
from mezzotint.kernels.memory import is_plain
from mezzotint.torch_internals.autograd import is_forward_mode
from mezzotint.torch_internals.transforms import is_inside_transform, tracing_state

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


def is_served(*tensors: Tensor | None) -> bool:
    """Return whether compiled kernels compute on these tensors, all that are given, here and now."""
    # what is traced for later, what is mapped over or differentiated by functions, and dual numbers
    if torch.compiler.is_compiling() or tracing_state() is not None:
        return False
    if is_inside_transform() or is_forward_mode():
        return False
    return all(
        tensor is None
        or (
            tensor.dtype in KINDS
            and tensor.dim() > 0
            and tensor.numel() > 0
            and is_plain(tensor)
            and _has_instructions(tensor.dtype)
        )
        for tensor in tensors
    )


@cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Return whether the processor multiplies and adds in one step and converts the dtype; if not, torch is faster."""
    from mezzotint.kernels import tiles

    return bool(tiles.HAS_FMA and (tiles.HAS_HALF or dtype is not torch.float16))


def rows_of(tensor: Tensor, width: int) -> tuple[Tensor, int]:
    """Return a tensor as rows of `width` dense numbers, and how many bytes lie between two; copied only if it must."""
    rows = tensor.reshape(-1, width)
    if width > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    return rows, rows.stride(0) * rows.element_size()


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32; float64 stays float64."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()
