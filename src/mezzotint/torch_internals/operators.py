"""Operators of ATen by name: a table may name one that the installed torch does not have."""

from typing import Any

import torch

from mezzotint.torch_internals.registry import Absent, Internal, declare


class _Aten:
    """`torch.ops.aten`, with a stand-in for operators that are missing: it equals nothing, and raises when called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            found = getattr(torch.ops.aten, name)
        except AttributeError:
            found = Absent(f"torch.ops.aten.{name}")
        setattr(self, name, found)
        return found


aten: Any = _Aten()
"""Every operator by name: `aten._grouped_mm`."""


def scaled_matmul() -> Any:
    """Return the matmul of float8 numbers with scales, None where torch has none."""
    return getattr(torch, "_scaled_mm", None)


def onednn_bfloat16_question() -> Any:
    """Return the function that tells whether oneDNN computes in bfloat16 here, None where torch has none."""
    return getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)


declare(Internal("torch.ops.mkldnn._is_mkldnn_bf16_supported", "whether oneDNN computes in bfloat16 here"))
declare(Internal("torch._scaled_mm", "timing float8 matmuls; without it, they are not timed"))
