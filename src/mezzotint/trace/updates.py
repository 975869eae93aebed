"""Lost updates: which share of the changes that a weight, a state or an average was to receive rounding threw away.

A tensor in a compact format that is updated in place is followed exactly: the operation is run a second time on float32
copies of what it read, and an element is lost if that would have moved it and the stored one stayed. Float32 weights
are followed on a sample, for the question what would be lost if they were stored in a compact format.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzotint.kernels.memory import has_numbers
from mezzotint.torch_internals.autocast import disable_autocast
from mezzotint.trace.addresses import address_of
from mezzotint.trace.record import Site, UpdateRecord

if TYPE_CHECKING:
    from mezzotint.trace.lanes import Place
    from mezzotint.trace.mode import Tape
    from mezzotint.trace.traits import Traits

_LOW = (torch.bfloat16, torch.float16)
_SOUGHT = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_WHOLE = 65536  # elements up to which a weight is looked at whole
_LINE = 16  # float32 elements in a line of memory
_PART = 64  # of the lines of a large weight, one in so many is looked at
_PLAIN = ("add", "sub", "mul", "div", "lerp", "addcmul", "addcdiv", "axpby")
REPLACING = frozenset({"mul", "add", "sub", "lerp"})
"""Operations by which an average is computed anew: `ema = decay * ema + (1 - decay) * weight`."""
_UPDATES = frozenset(
    [f"{name}_" for name in _PLAIN] + [f"_foreach_{name}_" for name in _PLAIN]
)  # and whatever begins with `_fused_`
_DECAYS = frozenset({"mul_", "_foreach_mul_"})
_AFTER_DECAY = frozenset({"add_", "addcmul_", "_foreach_add_", "_foreach_addcmul_"})


@dataclass(slots=True, eq=False)
class Watched:
    """An update that is about to run: its arguments in float32, and the tensors that it writes, as they were."""

    args: Any
    kwargs: Any
    stored: list[Tensor]
    before: list[Tensor | None]


@dataclass(slots=True, eq=False)
class _Decay:
    """The first half of an average's update, whose result what is added next goes on from in float32 too."""

    addresses: list[int]
    wide: list[Tensor]
    before: list[Tensor | None]


@dataclass(slots=True, eq=False)
class _Total:
    """What was found about one tensor so far."""

    name: str
    role: str
    dtype: str
    op: str
    site: Site
    module: str
    is_sampled: bool
    steps: set[int] = field(default_factory=set)
    count: int = 0
    lost: int = 0
    would_be_lost: dict[str, int] = field(default_factory=dict)


class Updates:
    """Follows in-place updates outside backward.

    `mul_` and `add_` on the same tensor right after one another are an average's update: the second is compared with
    what both give in float32, from what was stored before the first.
    """

    def __init__(self, tape: "Tape") -> None:
        self._tape = tape
        self._totals: dict[tuple[Any, ...], _Total] = {}
        self._decay: _Decay | None = None
        self.names: dict[int, tuple[str, str]] = {}  # address -> name and role of weights and optimizer states

    def before(self, traits: "Traits", args: Any, kwargs: Any) -> Watched | None:
        """Copy what an update reads, if it writes a tensor in a compact format."""
        if traits.name not in _UPDATES and not traits.name.startswith("_fused_"):
            return None
        written = _written(traits, args)
        if not any(tensor.dtype in _LOW and self._lasts(tensor) for tensor in written):
            return None
        copies: dict[int, Tensor] = {}
        decay, self._decay = self._decay, None
        if decay is not None:
            if traits.name in _AFTER_DECAY and [address_of(one) for one in written] == decay.addresses:
                copies = {id(one): wide for one, wide in zip(written, decay.wide, strict=True)}
            else:
                decay = None
        wide_args = [_copied(value, copies) for value in args]
        wide_kwargs = {key: _copied(value, copies) for key, value in kwargs.items()}
        if decay is not None:
            return Watched(wide_args, wide_kwargs, written, decay.before)
        before = [
            tensor.detach().clone() if tensor.dtype in _LOW and self._lasts(tensor) else None for tensor in written
        ]
        return Watched(wide_args, wide_kwargs, written, before)

    def replaced(
        self, traits: "Traits", func: Callable[..., Any], args: Any, kwargs: Any, old: Tensor, new: Any, place: "Place"
    ) -> None:
        """Follow a compact tensor that is replaced by a changed one, in every step at the same place."""
        if not isinstance(new, Tensor) or new.dtype not in _LOW or new.dtype is not old.dtype or new.shape != old.shape:
            return
        if not self._lasts(old) or not has_numbers(new) or not place.site:
            return
        maker = self._tape.created.get(address_of(old), -1)
        if maker < 0:
            return
        made_at = self._tape.log[maker][0].place.site
        here = place.site[0]
        if not made_at or (made_at[0].path, made_at[0].function) != (here.path, here.function):
            return  # it does not come from here: no average, but somebody's data
        copies: dict[int, Tensor] = {}
        with torch.no_grad(), disable_autocast():
            intended = func(
                *[_copied(one, copies) for one in args], **{k: _copied(v, copies) for k, v in kwargs.items()}
            )
        should_move = intended != old.float()
        lost = should_move & (new == old)
        key = (f"tensor {list(new.shape)}", "copy", traits.name, id(place.site), 0)
        total = self._totals.get(key)
        if total is None:
            dtype = str(new.dtype).removeprefix("torch.")
            total = self._totals[key] = _Total(key[0], "copy", dtype, traits.op, place.site, place.module, False)
        total.steps.add(self._tape.step)
        total.count += int(should_move.sum())
        total.lost += int(lost.sum())

    def _lasts(self, tensor: Tensor) -> bool:
        """Whether a tensor with numbers was there before this step: a passing result may be rounded as it likes."""
        if not has_numbers(tensor):
            return False
        address = address_of(tensor)
        return address in self.names or self._tape.created.get(address, -1) < self._tape.step_first

    def after(self, watched: Watched, traits: "Traits", func: Callable[..., Any], place: "Place") -> None:
        """Compare what was stored with what float32 would have got."""
        try:
            with torch.no_grad(), disable_autocast():
                func(*watched.args, **watched.kwargs)
        except (RuntimeError, TypeError):
            return  # the operation does not take float32 copies: nothing is known
        wide = _written(traits, watched.args)
        for tensor, old, intended in zip(watched.stored, watched.before, wide, strict=True):
            if old is None:
                continue
            should_move = intended != old.float()
            lost = should_move & (tensor == old)
            name, role = self.names.get(address_of(tensor), (f"tensor {list(tensor.shape)}", "copy"))
            key = (name, role, traits.name, id(place.site), address_of(tensor) if role == "copy" else 0)
            total = self._totals.get(key)
            if total is None:
                dtype = str(tensor.dtype).removeprefix("torch.")
                total = self._totals[key] = _Total(name, role, dtype, traits.op, place.site, place.module, False)
            total.steps.add(self._tape.step)
            total.count += int(should_move.sum())
            total.lost += int(lost.sum())
        if traits.name in _DECAYS:
            self._decay = _Decay([address_of(one) for one in watched.stored], wide, watched.before)

    def release(self) -> None:
        """Let go of the copies of a decay that nothing was added to."""
        self._decay = None

    def sample(self, weight: Tensor) -> Tensor | None:
        """Return a copy of a sample of a float32 weight: whole lines of memory, one in 64 of a large one."""
        if weight.dtype is not torch.float32 or not has_numbers(weight) or not weight.is_contiguous():
            return None
        return _sampled(weight).clone()

    def compare(self, weight: Tensor, old: Tensor, name: str, place: "Place") -> None:
        """Add what the change of a weight since `sample` would have become in compact formats."""
        if not has_numbers(weight) or not weight.is_contiguous():
            return
        new = _sampled(weight)
        change = new - old
        moved = change != 0
        key = (name, "weight", "step", 0, 0)
        total = self._totals.get(key)
        if total is None:
            is_sampled = old.numel() != weight.numel()
            total = self._totals[key] = _Total(
                name, "weight", "float32", "optimizer.step", place.site, name.rpartition(".")[0], is_sampled
            )
        total.steps.add(self._tape.step)
        total.count += int(moved.sum())
        for format_name, dtype in _SOUGHT.items():
            stored = old.to(dtype)
            stays = ((stored.float() + change).to(dtype) == stored) & moved
            total.would_be_lost[format_name] = total.would_be_lost.get(format_name, 0) + int(stays.sum())

    def records(self) -> list[UpdateRecord]:
        """Return what was found."""
        for key, total in self._totals.items():
            if total.role == "copy" and key[-1] in self.names:  # a state that got its name after its first update
                total.name, total.role = self.names[key[-1]]
        return [
            UpdateRecord(
                name=total.name,
                role=total.role,
                dtype=total.dtype,
                op=total.op,
                site=total.site,
                module=total.module,
                steps=len(total.steps),
                count=total.count,
                lost=total.lost,
                would_be_lost=dict(total.would_be_lost),
                is_sampled=total.is_sampled,
            )
            for total in self._totals.values()
            if total.count
        ]


@dataclass(slots=True, eq=False)
class Moving:
    """A weight that an optimizer is about to step: a sample of it, and where the gradient is not 0 there."""

    weight: Tensor
    before: Tensor
    is_asked: Tensor

    def has_moved(self) -> bool:
        """Return whether any number with a gradient other than 0 has changed."""
        if not has_numbers(self.weight) or not self.weight.is_contiguous():
            return True  # not known
        return bool(((_sampled(self.weight) != self.before) & self.is_asked).any())


def moving_weights(optimizer: Any, known: Mapping[int, Tensor]) -> list[Moving]:
    """Return the weights that a step with a learning rate other than 0 is to move; `known` are samples, by id.

    Weights whose gradient is not finite, or not dense, are left out: nothing is known of them.
    """
    found = []
    for group in getattr(optimizer, "param_groups", ()):
        rate = group.get("lr", 1.0)
        if not float(rate):
            continue
        for weight in group["params"]:
            grad = weight.grad
            if grad is None or not (has_numbers(weight) and has_numbers(grad) and weight.is_floating_point()):
                continue
            if not weight.is_contiguous() or not grad.is_contiguous() or grad.shape != weight.shape:
                continue
            gradient = _sampled(grad)
            is_asked = gradient != 0
            if bool(is_asked.any()) and bool(gradient.isfinite().all()):
                before = known.get(id(weight))
                found.append(Moving(weight, _sampled(weight).clone() if before is None else before, is_asked))
    return found


def _sampled(weight: Tensor) -> Tensor:
    flat = weight.detach().view(-1)
    if flat.numel() <= _WHOLE:
        return flat
    stride = _LINE * _PART
    return flat.as_strided((flat.numel() // stride, _LINE), (stride, 1))


def _listed(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [item for item in value if isinstance(item, Tensor)] if isinstance(value, (list, tuple)) else []


def _copied(value: Any, copies: dict[int, Tensor]) -> Any:
    """Return arguments with each tensor copied once, the compact ones into float32."""
    if isinstance(value, Tensor):
        known = copies.get(id(value))
        if known is None:
            known = copies[id(value)] = value.detach().float() if value.dtype in _LOW else value.detach().clone()
        return known
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, copies) for item in value)
    return value


def _written(traits: "Traits", args: Any) -> list[Tensor]:
    """Return the tensors that an operation writes, in the order of its arguments."""
    return [
        tensor
        for place in traits.written
        for tensor in _listed(args[place] if isinstance(place, int) and place < len(args) else None)
    ]
