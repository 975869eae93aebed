"""What C++ is told about the device of a ghost: CUDA, or meta while autograd does its bookkeeping.

Autograd's engine wants an accelerator as soon as it hears of one, autocast casts only what it hears to be on one, and
both ask the same question of the same tensors. A fake tensor has no device of its own in C++, so the answer can differ:
one flag, the face, is meta inside autograd's kernels, inside the engine, and where a custom function makes its node.

Autograd's kernels are reached through Python kernels at a dispatch key that lies between autograd and CUDA's autocast
and that nothing uses here (autocast of IPU or HPU). They set the face, go on to autograd, and set it back. Composite
operations have no kernel of autograd's and fall through, so they see CUDA as they would on a GPU.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mezzotint.errors import GhostError
from mezzotint.torch_internals import dispatch

_KEYS = ("AutocastIPU", "AutocastHPU")
# `Tensor._make_subclass`, which makes parameters, needs a detach that C++ does by itself
_LEFT_ALONE = frozenset({"aten::detach", "aten::_make_dual", "aten::_unpack_dual"})


class Face:
    """The flag. `is_meta` says which device C++ is told."""

    __slots__ = ("is_meta",)

    def __init__(self) -> None:
        self.is_meta = False


class Faces:
    """The Python kernels around autograd's, registered while the ghost GPU is on."""

    def __init__(self, face: Face) -> None:
        self._face = face
        self._libraries: list[Any] = []
        self._key_name = ""
        self._saved: tuple[bool, bool] = (False, False)
        self.key: Any = None

    @property
    def excluded(self) -> Any:
        """A guard class' argument: the key, for calls that go below it."""
        return dispatch.DispatchKeySet(self.key)

    def install(self) -> None:
        """Register the kernels and switch the key on in this thread. Raises GhostError where no key is free."""
        self._key_name = next((name for name in _KEYS if self._claim(name)), "")
        if not self._key_name:
            raise GhostError(f"torch {torch.__version__} has no unused dispatch key between autograd and autocast")
        self.key = getattr(dispatch.DispatchKey, self._key_name)
        self._saved = dispatch.is_key_included(self.key), dispatch.is_key_excluded(self.key)
        after = dispatch.keys_after(self.key)
        has_kernel = dispatch.has_kernel_at
        libraries: dict[str, Any] = {}
        for name in dispatch.operator_names():
            namespace, _, rest = name.partition("::")
            base, _, overload = rest.partition(".")
            if f"{namespace}::{base}" in _LEFT_ALONE or not has_kernel(name, "Autograd"):
                continue
            if namespace not in libraries:
                libraries[namespace] = dispatch.dispatch_library("IMPL", namespace, self._key_name)
                self._libraries.append(libraries[namespace])
            packet = getattr(getattr(torch.ops, namespace), base, None)
            if packet is None:
                continue
            operation = getattr(packet, overload or "default")
            libraries[namespace].impl(rest, self._key_name, self._kernel(operation, after), True)
        dispatch.set_key_excluded(self.key, False)
        dispatch.set_key_included(self.key, True)

    def remove(self) -> None:
        """Take everything back."""
        if self.key is not None:
            included, excluded = self._saved
            dispatch.set_key_included(self.key, included)
            dispatch.set_key_excluded(self.key, excluded)
        while self._libraries:
            self._libraries.pop().reset()
        self.key = None

    def _claim(self, name: str) -> bool:
        """Make operations without a kernel fall through at the key; False where the key has kernels already."""
        has_kernel = dispatch.has_kernel_at
        if any(has_kernel(op, name) for op in ("aten::mm", "aten::add.Tensor", "aten::linear")):
            return False
        try:
            library = dispatch.dispatch_library("IMPL", "_", name)
            library.fallback_fallthrough()
        except (RuntimeError, AttributeError):
            return False
        self._libraries.append(library)
        return True

    def _kernel(self, operation: Any, after: Any) -> Callable[..., Any]:
        base = dispatch.schema_of(operation).name.partition("::")[2]
        if dispatch.allows_numbers_as_tensors(base):
            return partial(_around_with_numbers, self, operation, after)
        return partial(_around, self._face, operation, after)


def _around(face: Face, operation: Any, after: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    was_meta = face.is_meta
    face.is_meta = True
    try:
        return operation.redispatch(keys & after, *args, **kwargs)
    finally:
        face.is_meta = was_meta


def _around_with_numbers(faces: Faces, operation: Any, after: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """Like `_around`, for `x * 2`: redispatching refuses a number where the schema says Tensor; calling does not.

    Making a tensor of the number would change type promotion: it would no longer count as a number.
    """
    face = faces._face
    was_meta = face.is_meta
    face.is_meta = True
    try:
        if len(args) >= 2 and isinstance(args[0], torch.Tensor) and isinstance(args[1], torch.Tensor):
            return operation.redispatch(keys & after, *args, **kwargs)
        excluded = dispatch.DispatchKeySet(faces.key) | dispatch.DispatchKeySet(dispatch.DispatchKey.AutocastCUDA)
        with dispatch.exclude_keys(excluded), dispatch.disable_torch_function():
            return operation(*args, **kwargs)
    finally:
        face.is_meta = was_meta
