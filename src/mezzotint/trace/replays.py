"""What rounding did to a result: grids, decisions and differences in low precision, computed again in float32.

A few small operations on low precision tensors are kept with their arguments until the next backward pass. Where one
decides (topk, argmax, a comparison) or subtracts what is nearly equal, its operands are computed again in float32, from
the float32 tensors that they were cast from. Nothing of the watched program is written, and no random number is drawn.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzotint.kernels.memory import has_numbers
from mezzotint.torch_internals.autocast import disable_autocast
from mezzotint.torch_internals.autograd import version_of
from mezzotint.trace.addresses import address_of
from mezzotint.trace.record import Kind, Rounding

if TYPE_CHECKING:
    from mezzotint.trace.mode import Entry

_LOW = (torch.bfloat16, torch.float16)
_MAX_ELEMENTS = 1 << 22  # of a tensor that is kept or computed again
_MAX_BYTES = 1 << 27  # held by everything that is kept
_MAX_MACS = 1 << 26  # of a matmul that is computed again
_MAX_CHECKS = 3  # executions of one call that are looked at
_DEPTH = 16
_CANCELLED = 4.0  # operands this many times larger than their difference
_OFF_GRID = 0.3  # error, in distances of neighbours, from which on it is noted
_NOTHING = 1e-4  # of its operands: a difference that float32 does not resolve well either
_WRONG = 0.05  # relative error of a result from which on it is noted

_PLAIN = frozenset(
    {"add", "sub", "rsub", "mul", "div", "neg", "pow", "square", "sqrt", "rsqrt", "exp", "log", "sigmoid",
     "tanh", "relu", "reciprocal", "abs", "softplus", "clamp", "clamp_min", "clamp_max", "minimum", "maximum", "where",
     "masked_fill",
     "_softmax", "_log_softmax", "_safe_softmax", "logsumexp", "cumsum", "sum", "mean", "var", "std", "prod", "norm",
     "linalg_vector_norm", "amax", "amin", "clone", "cat", "stack", "flip", "roll", "index", "gather", "index_select",
     "scalar_tensor", "repeat", "lerp", "addcmul", "addcdiv"}
)  # fmt: skip
_MATMULS = frozenset({"mm", "bmm", "mv", "dot", "addmm", "baddbmm"})
_CHOICES = frozenset({"topk", "sort", "argmax", "argmin", "max", "min", "kthvalue"})
_COMPARISONS = frozenset({"gt", "ge", "lt", "le"})
_DISTANCES = frozenset({"_euclidean_dist", "_cdist_forward", "cdist", "dist", "pairwise_distance"})
_DIFFERENCES = frozenset({"sub", "rsub", "add", "addmm", "baddbmm"})
_GRIDS = frozenset({"linspace", "arange"})
_GRID_STEPS = frozenset({"add", "sub", "rsub", "mul", "div", "neg", "clone"})

_Key = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class _Kept:
    """An operation that can be run again: the tensors among its arguments with their versions, and its output."""

    entry: "Entry"
    func: Callable[..., Any]
    args: Any
    kwargs: Any
    versions: list[tuple[Tensor, int]]
    output: Tensor
    nbytes: int


class Replays:
    """Keeps what may have to be computed again, and what was found."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, _Kept] = OrderedDict()
        self._nbytes = 0
        # operation -> how many numbers are evenly spaced, and what they are in float32 where that differs
        self._grids: dict[int, tuple[int, Tensor | None]] = {}
        self._checks: dict[int, int] = {}
        self._found: dict[tuple[int, str], Rounding] = {}
        self._has_cast = False

    def release(self) -> None:
        """Let go of everything that is kept."""
        self._kept.clear()
        self._grids.clear()
        self._nbytes = 0

    def records(self) -> list[Rounding]:
        """Return what was found, in the order of operations."""
        return sorted(self._found.values(), key=lambda one: one.operation)

    def note(
        self, index: int, entry: "Entry", func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor],
        producers: Sequence[int], out: Any,
    ) -> None:  # fmt: skip
        """Look at an operation that has run, outside backward, and keep it if later ones may need it again."""
        traits = entry.traits
        if traits.written or traits.is_random:
            return
        name = traits.name
        is_low = isinstance(out, Tensor) and out.dtype in _LOW
        if name in _GRIDS or name == "affine_grid_generator" or (self._grids and len(producers) <= 2):
            self._follow_grid(index, entry, func, args, kwargs, inputs, producers, out)
        if inputs and inputs[0].dtype in _LOW and (name in _CHOICES or name in _COMPARISONS):
            self._check(index, entry, inputs, lambda: self._decided(index, name, func, args, kwargs, out))
        if not is_low or not _is_small(out):
            return
        if name in _DISTANCES or (name in _DIFFERENCES and len(inputs) > 1):
            self._check(index, entry, inputs, lambda: self._cancelled(index, name, func, args, kwargs, inputs, out))
        is_cast_of_weight = traits.kind is Kind.CAST and producers and producers[0] < -1
        is_repeatable = traits.is_view or traits.kind is Kind.CAST or name in _PLAIN or name in _MATMULS
        if is_repeatable and not is_cast_of_weight:
            self._keep(entry, func, args, kwargs, inputs, out)

    # keeping and computing again

    def _keep(self, entry: "Entry", func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor], out: Tensor) -> None:
        if not inputs or not all(_is_small(one) for one in inputs):
            return
        held = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in (*inputs, out)}
        nbytes = sum(held.values())
        if nbytes > _MAX_BYTES // 4:
            return
        key = _key(out)
        if entry.traits.is_view and key == _key(inputs[0]):
            return  # the same numbers under another name: what made them is kept
        old = self._kept.pop(key, None)
        self._nbytes += nbytes - (old.nbytes if old is not None else 0)
        plain_args, plain_kwargs = _detached(args), {name: _detached(value) for name, value in kwargs.items()}
        versions = [(one.detach(), version_of(one)) for one in inputs]
        self._kept[key] = _Kept(entry, func, plain_args, plain_kwargs, versions, out.detach(), nbytes)
        while self._nbytes > _MAX_BYTES:
            _, first = self._kept.popitem(last=False)
            self._nbytes -= first.nbytes

    def _wide(self, tensor: Tensor, *, has_matmuls: bool, depth: int = _DEPTH) -> Tensor:
        """Return what a low precision tensor would be in float32; its own numbers where that is not known."""
        if tensor.dtype not in _LOW:
            return tensor
        kept = self._kept.get(_key(tensor)) if depth else None
        if kept is None or any(version_of(one) != version for one, version in kept.versions):
            return tensor.float()
        name = kept.entry.traits.name
        if kept.entry.traits.kind is Kind.CAST and kept.versions[0][0].dtype is torch.float32:
            self._has_cast = True
            return kept.versions[0][0]
        if name in _MATMULS and (not has_matmuls or _macs([one for one, _ in kept.versions]) > _MAX_MACS):
            return tensor.float()

        def widened(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._wide(value, has_matmuls=has_matmuls, depth=depth - 1)
            if isinstance(value, torch.dtype):
                return torch.float32 if value in _LOW else value
            return [widened(item) for item in value] if isinstance(value, (list, tuple)) else value

        made = kept.func(
            *[widened(value) for value in kept.args], **{key: widened(value) for key, value in kept.kwargs.items()}
        )
        return made if isinstance(made, Tensor) and made.shape == tensor.shape else tensor.float()

    def _check(self, index: int, entry: "Entry", inputs: Sequence[Tensor], look: Callable[[], None]) -> None:
        """Look at the first executions of a call."""
        number = self._checks.get(entry.index, 0)
        if number >= _MAX_CHECKS or not all(_is_small(one) for one in inputs):
            return
        self._checks[entry.index] = number + 1
        try:
            with torch.no_grad(), disable_autocast():
                look()
        except (RuntimeError, TypeError, NotImplementedError, IndexError):
            return  # it does not run in float32: nothing is known

    # what is looked for

    def _decided(self, index: int, name: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Compare a decision with the one that float32 would have made."""
        self._has_cast = False
        wide = [self._wide(one, has_matmuls=False) if isinstance(one, Tensor) else one for one in args]
        if not self._has_cast:
            return
        chosen, other = _choice(out), _choice(func(*wide, **kwargs))
        if chosen is None or other is None or chosen.shape != other.shape:
            return
        if name in ("topk", "sort") and chosen.dim():
            dim = kwargs.get("dim", args[2] if name == "topk" and len(args) > 2 else -1)
            if name == "sort" and len(args) > 1 and type(args[1]) is int:
                dim = args[1]
            if name == "topk":
                chosen, other = chosen.sort(dim).values, other.sort(dim).values
            differs = (chosen != other).any(dim)
        else:
            differs = chosen != other
        self._add(index, "decision", int(differs.numel()), int(differs.sum()), None)

    def _cancelled(
        self, index: int, name: str, func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor], out: Tensor
    ) -> None:
        """Measure the error of a difference that is far smaller than its operands."""
        if out.numel() < 2 or not all(one.dtype in _LOW for one in inputs):
            return
        if name not in _DISTANCES:
            size = float(out.float().abs().mean())
            operands = inputs[:1] if name in _MATMULS else inputs[:2]
            if not all(float(one.float().abs().mean()) > _CANCELLED * size for one in operands):
                return
            if name in _MATMULS and _macs(inputs) > _MAX_MACS:
                return
        wide_args = [self._wide(one, has_matmuls=True) if isinstance(one, Tensor) else one for one in args]
        wide = func(*wide_args, **kwargs)
        largest = max(float(one.float().abs().mean()) for one in inputs)
        if float(wide.abs().mean()) < _NOTHING * largest:
            return  # nothing is left in float32 either: operands that are meant to be equal
        norm = float(wide.norm())
        error = float((out.float() - wide).norm())
        if norm > 0 and isfinite(error) and error > _WRONG * norm:
            self._add(index, "cancellation", int(out.numel()), 0, error / norm)

    def _follow_grid(
        self, index: int, entry: "Entry", func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor],
        producers: Sequence[int], out: Any,
    ) -> None:  # fmt: skip
        """Count the distinct numbers of what is evenly spaced."""
        name = entry.traits.name
        if not isinstance(out, Tensor) or not _is_small(out):
            return
        if name == "affine_grid_generator":
            if out.dtype in _LOW and out.dim() == 4:
                with torch.no_grad(), disable_autocast():
                    wide = func(args[0].float(), *args[1:], **kwargs)
                for got, full in ((out[0, 0, :, 0], wide[0, 0, :, 0]), (out[0, :, 0, 1], wide[0, :, 0, 1])):
                    self._compare_grid(index, _distinct(got), _distinct(full))
            return
        wide_of: dict[int, Tensor] = {}
        if name in _GRIDS:
            asked = out.numel()
        else:
            known = [one for one in producers if one in self._grids]
            others = [
                one for one, producer in zip(inputs, producers, strict=True)
                if producer not in self._grids and one.numel() > 1
            ]  # fmt: skip
            is_step = entry.traits.is_view or entry.traits.is_copy or name in _GRID_STEPS
            if len(known) != 1 or others or not is_step:
                return
            asked, wide_input = self._grids[known[0]]
            if wide_input is not None:
                wide_of = {id(one): wide_input for one, maker in zip(inputs, producers, strict=True) if maker in known}
        if out.dtype not in _LOW or asked < 2:
            self._grids[index] = asked, None
            return

        def widened(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return torch.float32 if value in _LOW else value
            return wide_of.get(id(value), value.float()) if isinstance(value, Tensor) else value

        try:
            with torch.no_grad(), disable_autocast():
                wide = func(*[widened(one) for one in args], **{key: widened(one) for key, one in kwargs.items()})
        except (RuntimeError, TypeError):
            return
        self._grids[index] = asked, wide
        if not entry.traits.is_view and out.numel() >= asked and not bool((wide == wide.round()).all()):
            step = float(wide.max() - wide.min()) / (asked - 1)
            off = float((out.float() - wide).abs().max())
            self._compare_grid(index, _distinct(out), asked, off / step if step else 0.0)

    def _compare_grid(self, index: int, distinct: int, asked: int, off: float = 0.0) -> None:
        if distinct < asked or off > _OFF_GRID:
            self._add(index, "grid", asked, max(0, asked - distinct), off)

    def _add(self, index: int, kind: str, total: int, changed: int, error: float | None) -> None:
        self._found[index, kind] = Rounding(
            operation=index, kind=kind, total=total, changed=changed, relative_error=error
        )


def _key(tensor: Tensor) -> _Key:
    return address_of(tensor), tensor.dtype, tensor.shape, tuple(tensor.stride())


def _is_small(tensor: Tensor) -> bool:
    return has_numbers(tensor) and tensor.numel() <= _MAX_ELEMENTS and not tensor.is_inference()


def _distinct(tensor: Tensor) -> int:
    return int(torch.unique(tensor.detach().float()).numel())


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return [_detached(item) for item in value] if isinstance(value, (list, tuple)) else value


def _macs(tensors: Sequence[Tensor]) -> int:
    """Return an upper bound of the multiplications of a matmul: its two largest operands, less their common length."""
    sizes = sorted((one.numel() for one in tensors), reverse=True)[:2]
    length = max(1, min(one.shape[-1] for one in tensors if one.dim()))
    return sizes[0] * sizes[-1] // length


def _choice(out: Any) -> Tensor | None:
    """Return the indices, or the truth values, that an operation decided on."""
    found = out[-1] if isinstance(out, (list, tuple)) else out
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None
