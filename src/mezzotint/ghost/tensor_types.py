"""`torch.cuda.FloatTensor` and its kin, and devices given as numbers, which builds without CUDA do not know."""

from typing import Any

import torch
from torch import Tensor

from mezzotint.patches import Patches
from mezzotint.torch_internals.fake import FakeTensor, wrap_parsing_of_devices

_DTYPES = {
    "ByteTensor": torch.uint8, "CharTensor": torch.int8, "ShortTensor": torch.int16, "IntTensor": torch.int32,
    "LongTensor": torch.int64, "HalfTensor": torch.float16, "BFloat16Tensor": torch.bfloat16,
    "FloatTensor": torch.float32, "DoubleTensor": torch.float64, "BoolTensor": torch.bool,
}  # fmt: skip


class _GhostType(type):
    """The type of `torch.cuda.FloatTensor`: it makes ghosts, and ghosts of its dtype are instances of it."""

    dtype: torch.dtype

    def __call__(cls, *args: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Tensor):
            return args[0].to("cuda", cls.dtype)
        if len(args) == 1 and not isinstance(args[0], (int, torch.Size)):
            return torch.tensor(args[0], dtype=cls.dtype, device="cuda")
        return torch.empty(*args, dtype=cls.dtype, device="cuda")

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_cuda and value.dtype is cls.dtype

    def __str__(cls) -> str:
        return f"torch.cuda.{cls.__name__}"


def patch_types(patches: Patches) -> None:
    """Replace the types, `Tensor.type` and `torch.set_default_tensor_type`."""
    types = {name: _GhostType(name, (), {"dtype": dtype, "is_cuda": True}) for name, dtype in _DTYPES.items()}
    by_name: dict[Any, Any] = {f"torch.cuda.{name}": kind for name, kind in types.items()}
    for name, kind in types.items():
        if hasattr(torch.cuda, name):
            patches.replace(torch.cuda, name, kind)
    names = {dtype: name for name, dtype in _DTYPES.items()}
    original = torch.Tensor.type

    def tensor_type(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        wanted = by_name.get(dtype, dtype) if isinstance(dtype, str) else dtype
        if isinstance(wanted, _GhostType):
            return self.to("cuda", wanted.dtype)
        if wanted is None and isinstance(self, FakeTensor):
            return f"torch.{'cuda.' if self.is_cuda else ''}{names.get(self.dtype, 'Tensor')}"
        return original(self, dtype, *args, **kwargs)

    patches.replace(torch.Tensor, "type", tensor_type)

    def set_default(original: Any, kind: Any) -> None:
        wanted = by_name.get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(wanted, _GhostType):
            original(kind)
            return
        torch.set_default_dtype(wanted.dtype)
        torch.set_default_device("cuda")
        # unlike a default device, a default type holds for the old constructors too
        for name, default in types.items():
            patches.replace(torch, name, default)
        patches.replace(torch, "Tensor", _with_tensor(wanted))

    patches.wrap(torch, "set_default_tensor_type", set_default)
    wrap_parsing_of_devices(patches, _parse_to)


def _with_tensor(default: Any) -> Any:
    """Return `torch.Tensor` whose constructor makes a ghost."""

    class _Tensor(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return Tensor(*args, **kwargs) if kwargs else default(*args)

        def __instancecheck__(cls, value: Any) -> bool:
            return isinstance(value, Tensor)

        def __subclasscheck__(cls, kind: Any) -> bool:
            return issubclass(kind, Tensor)

        def __getattr__(cls, name: str) -> Any:
            return getattr(Tensor, name)

    return _Tensor("Tensor", (), {})


def _parse_to(original: Any, *args: Any, **kwargs: Any) -> Any:
    if args and type(args[0]) is int:
        args = (torch.device("cuda", args[0]), *args[1:])
    if type(kwargs.get("device")) is int:
        kwargs["device"] = torch.device("cuda", kwargs["device"])
    return original(*args, **kwargs)


_TAKE_DEVICE = frozenset({torch.Tensor.to, torch.Tensor.cuda})


def with_devices(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Return arguments with a device that is given as a number spelled out: C++ would ask for an accelerator."""
    if kwargs and type(kwargs.get("device")) is int:
        kwargs = {**kwargs, "device": torch.device("cuda", kwargs["device"])}
    if len(args) > 1 and type(args[1]) is int and func in _TAKE_DEVICE:
        args = (args[0], torch.device("cuda", args[1]), *args[2:])
    return args, kwargs
