"""Numbers that are known on the ghost GPU although its tensors have none: what came from the CPU or from a constant.

A small tensor that is moved to the ghost, or made there by `arange`, `zeros` and the like, has a twin: a real tensor on
the CPU. An operation whose inputs all have twins runs on them too, and gives its result one. So lengths, class labels,
padding masks and what is computed from them alone are told truly, also where a shape depends on them. What meets a
weight, a random number or a large tensor is unknown, and an unknown value that is written into a tensor makes it so.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mezzotint.torch_internals.dispatch import disable_torch_dispatch
from mezzotint.torch_internals.fake import FakeTensor
from mezzotint.torch_internals.tensors import storage_number

MAX_KNOWN = 1 << 16
"""Integers and booleans with more elements than this have no twin."""
MAX_KNOWN_FLOATS = 256
"""The same for floating point, where a twin is rarely asked for."""

_CPU = torch.device("cpu")
_RANDOM = torch.Tag.nondeterministic_seeded
_CONSTANT = frozenset(
    {"arange", "zeros", "ones", "full", "eye", "linspace", "scalar_tensor", "zeros_like", "ones_like", "full_like",
     "new_zeros", "new_ones", "new_full", "tril_indices", "triu_indices", "empty", "empty_like", "new_empty"}
)  # fmt: skip
_MADE_KNOWN = _CONSTANT | {"_to_copy"}
# a gradient scaler's "found infinity" stays what it was: 0
_LEFT_AS_KNOWN = frozenset({"_amp_foreach_non_finite_check_and_unscale_"})
_FROM_LIKE = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
)
_EMPTY = frozenset({"empty", "empty_like", "new_empty"})


class Twin:
    """A real tensor beside a ghost. `is_true` is one list for all views of a storage: false after an unknown write."""

    __slots__ = ("address", "is_true", "real")

    def __init__(self, real: Tensor, is_true: list[bool], address: int) -> None:
        self.real, self.is_true, self.address = real, is_true, address


def twin_of(tensor: Any) -> Tensor | None:
    """Return the real tensor beside a ghost, None where its numbers are not known; a real tensor is its own twin."""
    if not isinstance(tensor, FakeTensor):
        return tensor if isinstance(tensor, Tensor) else None
    twin = getattr(tensor, "_ghost_twin", None)
    if twin is None or not twin.is_true[0] or twin.address != storage_number(tensor.untyped_storage()):
        return None
    return twin.real if twin.real.shape == tensor.shape else None


def forget(tensor: Any) -> None:
    """Make the numbers of a ghost, and of all that shares its memory, unknown."""
    twin = getattr(tensor, "_ghost_twin", None)
    if twin is not None:
        twin.is_true[0] = False


def remember(ghost: FakeTensor, real: Tensor, base: Any = None) -> None:
    """Say what the numbers of a ghost are; `base` is the ghost of which it is a view."""
    if not _is_small(real) or ghost.layout is not torch.strided:
        return
    twin = getattr(base, "_ghost_twin", None)
    is_true = twin.is_true if twin is not None else [True]
    ghost._ghost_twin = Twin(real, is_true, storage_number(ghost.untyped_storage()))  # type: ignore[attr-defined]


def follow(func: Any, name: str, args: Any, kwargs: Any, out: Any, writes: frozenset[int | str]) -> None:
    """Give the results of an operation their twins, or make unknown what it wrote.

    `args` are those of the call, real tensors still real; `writes` names the arguments that are written to.
    """
    if name not in _MADE_KNOWN and not any(hasattr(one, "_ghost_twin") for one in _tensors(args, kwargs)):
        return
    if name in _LEFT_AS_KNOWN:
        return
    results = out if isinstance(out, (tuple, list)) else (out,)
    is_small = all(_is_small(one) for one in results if isinstance(one, Tensor))
    reals = results_of(func, name, args, kwargs) if is_small else None
    if reals is None:
        if writes:
            _forget_written(args, kwargs, writes)
        elif func.is_view:  # it could be written through
            forget(args[0])
        return
    if writes:
        return  # the twins were written to as well
    base = args[0] if func.is_view and args else None
    for ghost, real in zip(results, reals if isinstance(reals, (tuple, list)) else (reals,), strict=False):
        if isinstance(ghost, FakeTensor) and isinstance(real, Tensor) and ghost.shape == real.shape:
            remember(ghost, real, base)


def _forget_written(args: Any, kwargs: Any, writes: frozenset[int | str]) -> None:
    for place in writes:
        written = args[place] if isinstance(place, int) and place < len(args) else kwargs.get(place)
        for one in written if isinstance(written, (list, tuple)) else (written,):
            forget(one)


def _is_small(tensor: Tensor) -> bool:
    is_float = tensor.is_floating_point() or tensor.is_complex()
    return tensor.numel() <= (MAX_KNOWN_FLOATS if is_float else MAX_KNOWN)


def results_of(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run an operation on twins. Return None where a number is not known, or the CPU cannot do it."""
    if _RANDOM in func.tags:
        return None
    total = 0
    given = []
    for value in args:
        known = _known(value) if name not in _FROM_LIKE or value is not args[0] else _shape_only(value)
        if known is None and value is not None:
            return None
        given.append(known)
    named = {}
    for key, value in kwargs.items():
        known = _CPU if isinstance(value, torch.device) else False if key == "pin_memory" else _known(value)
        if known is None and value is not None:
            return None
        named[key] = known
    for one in _tensors(given, named):
        total += one.numel()
    if total > 4 * MAX_KNOWN:
        return None
    try:
        with disable_torch_dispatch():
            found = func(*given, **named)
            return found.zero_() if name in _EMPTY else found  # what nobody has written may be anything
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


def _known(value: Any) -> Any:
    """Return an argument with twins for ghosts, None where one has none."""
    if isinstance(value, Tensor):
        return twin_of(value)
    if isinstance(value, (list, tuple)) and any(isinstance(one, Tensor) for one in value):
        found = [twin_of(one) if isinstance(one, Tensor) else one for one in value]
        return None if any(a is None and b is not None for a, b in zip(found, value, strict=True)) else found
    if isinstance(value, torch.device):
        return _CPU
    return value


def _shape_only(value: Any) -> Any:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if value.numel() <= MAX_KNOWN else None


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            for one in value:
                if isinstance(one, Tensor):
                    yield one
