"""Autocast, loss scaling and clipping."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad

from mezzotint.patches import Patches
from mezzotint.torch_internals.registry import Feature, Internal, declare, value

disable_autocast: Callable[[], AbstractContextManager[Any]] = value(
    "torch._C._DisableAutocast",
    "computing in float32 what an operation should have given",
    noted_in=(Feature.RECORDING,),
    lost="operations could not be repeated without autocast",
    unknown="findings of MZ211, MZ241, MZ242 and MZ243 may be missing",
    otherwise=nullcontext,
)

_CLIP = "_group_tensors_by_device_and_dtype"
declare(
    Internal(
        f"torch.nn.utils.clip_grad.{_CLIP}",
        "every call that clips gradients, however it was imported",
        noted_in=(Feature.RECORDING,),
        lost="clipping could not be watched",
        unknown="MZ221 is judged only for clipping by hand, and other findings on clipping are not judged",
    )
)


def wrap_clipping(patches: Patches, around: Callable[..., Any]) -> None:
    """Make the function that torch's clipping functions group gradients with go through `around`."""
    patches.wrap(clip_grad, _CLIP, around)


declare(
    Internal(
        "torch.amp.GradScaler._scale",
        "the loss scale, without waiting for the GPU",
        noted_in=(Feature.RECORDING,),
        lost="the loss scale could not be read",
        unknown="the history of the loss scale is not judged",
        check=lambda: "_scale" in vars(GradScaler("cpu")),
    )
)


def scale_of(scaler: Any) -> Tensor | None:
    """Return the tensor that holds a scaler's loss scale; None before its first use, and where scaling is off."""
    held = getattr(scaler, "_scale", None)
    return held if isinstance(held, Tensor) else None
