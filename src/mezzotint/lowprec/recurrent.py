"""LSTM layers of the CPU in low precision: oneDNN's float32 layer on upcast inputs, its results rounded.

Torch calls this one operation for a whole layer where oneDNN is in use; everywhere else an LSTM is made of products and
elementwise operations, which have kernels of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.lowprec.calls import count
from mezzotint.lowprec.choice import Path
from mezzotint.lowprec.gate import is_ours, upcast

FORWARD, BACKWARD = "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"
ORIGINALS = (FORWARD, BACKWARD)


def kernels(originals: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return the kernels that replace torch's for the CPU, by name of the operation."""
    return {name: _layer(name, originals[name]) for name in ORIGINALS}


def _layer(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def layer(source: Tensor, *rest: Any) -> Any:
        dtype = source.dtype
        if not is_ours(dtype):
            return original(source, *rest)
        count(name, Path.UPCAST)
        results = original(source.float(), *(upcast(item) if isinstance(item, Tensor) else item for item in rest))
        # the workspace, which backward reads, is made of bytes
        return tuple(
            result.to(dtype) if isinstance(result, Tensor) and result.dtype is torch.float32 else result
            for result in results
        )

    return layer
