"""The gate that kernels look at on every call: which dtypes are ours at the moment.

It is process-wide and counts, so contexts nest, and a backward that runs in another thread finds it open.
"""

import threading

import torch
from torch import Tensor

LOW_DTYPES = (torch.bfloat16, torch.float16)

_lock = threading.Lock()
_open = dict.fromkeys(LOW_DTYPES, 0)
_packs = dict.fromkeys(LOW_DTYPES, False)


def enter(dtypes: tuple[torch.dtype, ...]) -> None:
    """Open the gate for some dtypes, once more."""
    with _lock:
        for dtype in dtypes:
            _open[dtype] += 1


def leave(dtypes: tuple[torch.dtype, ...]) -> None:
    """Take back one `enter`."""
    with _lock:
        for dtype in dtypes:
            _open[dtype] -= 1


def is_ours(dtype: torch.dtype) -> bool:
    """Return whether operations of a dtype are for our kernels now."""
    return _open.get(dtype, 0) > 0


def packs(dtype: torch.dtype) -> bool:
    """Return whether products of a dtype are converted while they are packed."""
    return _packs[dtype]


def set_packs(dtype: torch.dtype, value: bool) -> None:
    """Say how products of a dtype are computed."""
    _packs[dtype] = value


def upcast(tensor: Tensor | None) -> Tensor | None:
    """Return a low-precision tensor as float32, anything else as it is."""
    return tensor.float() if tensor is not None and tensor.dtype in _open else tensor
