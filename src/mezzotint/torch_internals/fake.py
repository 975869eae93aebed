"""Tensors without data, which stand for tensors of a simulated GPU."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.patches import Patches
from mezzotint.torch_internals.registry import Feature, Internal, declare, find, value

_MODULE = "torch._subclasses.fake_tensor"
LOGGER = _MODULE
"""The logger on which torch prints tracebacks of errors that it raises too."""


def _value(name: str, purpose: str, otherwise: Any = None) -> Any:
    return value(f"{_MODULE}.{name}", purpose, needed_by=(Feature.GHOST,), otherwise=otherwise)


if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException  # noqa: PLC0414  told to be exported
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException  # noqa: PLC0414  told to be exported
    from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # noqa: PLC0414  told to be exported
    from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode  # noqa: PLC0414  told to be exported
    from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException  # noqa: PLC0414  told to be exported
else:
    _NoTensor = type("_NoTensor", (), {})
    _NoError = type("_NoError", (MezzotintError,), {})
    FakeTensor = _value("FakeTensor", "tensors without data", _NoTensor)
    FakeTensorMode = _value("FakeTensorMode", "computing with tensors without data", object)
    DynamicOutputShapeException = _value("DynamicOutputShapeException", "shapes that depend on numbers", _NoError)
    DataDependentOutputException = _value("DataDependentOutputException", "results that depend on numbers", _NoError)
    UnsupportedOperatorException = _value("UnsupportedOperatorException", "operators without a fake kernel", _NoError)

_value("init_gpu_context", "not starting a GPU's driver for tensors without data")


def _has_internals() -> bool:
    names = ("in_kernel_invocation", "avoid_device_init")
    mode = find(f"{_MODULE}.FakeTensorMode")
    if mode is None or find(f"{_MODULE}.FakeTensor") is None:
        return False
    try:
        one = mode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
        made = FakeTensor(one, torch.empty(2, device="meta"), torch.device("cpu"))
    except TypeError:
        return False
    is_known = all(hasattr(one, name) for name in names)
    return is_known and made.fake_device == torch.device("cpu")


declare(
    Internal(
        f"{_MODULE}.FakeTensorMode.in_kernel_invocation",
        "making a tensor without data for a device, and asking for that device",
        needed_by=(Feature.GHOST,),
        check=_has_internals,
    )
)


def leave_drivers_alone(patches: Patches) -> None:
    """Keep torch from starting a GPU's driver before it makes a tensor without data."""
    patches.replace(find(_MODULE), "init_gpu_context", lambda _device: None)


_FOREACH = ("torch.optim.optimizer._foreach_supported_types", "torch.utils._foreach_utils._foreach_supported_types")
for _path in _FOREACH:
    value(_path, "the tensor types that optimizers and clipping take many at once", needed_by=(Feature.GHOST,))


def take_many_at_once(patches: Patches) -> None:
    """Let optimizers and clipping take lists of tensors without data at once, as they do with real ones."""
    for path in _FOREACH:
        owner, _, name = path.rpartition(".")
        patches.replace(find(owner), name, [*find(path), FakeTensor])


value("torch._C._swap_tensor_impl", "changing the tensor under a parameter", needed_by=(Feature.GHOST,))


def swap_tensors(one: Tensor, other: Tensor) -> None:
    """Exchange what is under two tensor objects in C++."""
    torch._C._swap_tensor_impl(one, other)


value("torch._C._nn._parse_to", "the arguments of Tensor.to and Module.to", needed_by=(Feature.GHOST,))


def wrap_parsing_of_devices(patches: Patches, around: Callable[..., Any]) -> None:
    """Make the arguments of `Module.to` go through `around` as they are parsed."""
    patches.wrap(torch._C._nn, "_parse_to", around)


value("torch._prims_common.suggest_memory_format", "the layout of a convolution's result", needed_by=(Feature.GHOST,))


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Return the layout in which results of a convolution of `tensor` lie."""
    found: torch.memory_format = find("torch._prims_common.suggest_memory_format")(tensor)
    return found


value("torch.utils._device.CURRENT_DEVICE", "the default device", needed_by=(Feature.GHOST,))


def default_device() -> Any:
    """Return the device that `torch.set_default_device` set, None where it set none."""
    return find("torch.utils._device.CURRENT_DEVICE")


value("torch.cuda._is_compiled", "whether this build of torch has CUDA", needed_by=(Feature.GHOST,))
value("torch._C._ensureCUDADeviceGuardSet", "making C++ look for a device guard", needed_by=(Feature.GHOST,))


def is_cuda_build() -> bool:
    """Return whether this build of torch has CUDA."""
    return bool(torch.cuda._is_compiled())


def use_registered_guard() -> None:
    """Make C++ use the device guard that was registered for CUDA."""
    torch._C._ensureCUDADeviceGuardSet()
