"""Where NaN and infinity are born: which operation made them of finite numbers, and whether float32 would too."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mezzotint.kernels.memory import has_numbers
from mezzotint.kernels.tensors import is_measurable, range_stats
from mezzotint.torch_internals.autocast import disable_autocast
from mezzotint.trace.record import UNKNOWN, Birth

if TYPE_CHECKING:
    from mezzotint.trace.mode import Entry

_LOW = (torch.float16, torch.bfloat16)
_MAX_BIRTHS = 200


class Births:
    """Collects births. An operation is looked at only when its output holds something that is not finite."""

    def __init__(self) -> None:
        self.found: list[Birth] = []
        self._not_finite: set[int] = set()  # operations whose output was not finite
        self._seen: set[int] = set()

    def pass_on(self, index: int, producers: Sequence[int]) -> None:
        """Note that an operation which was not measured hands on what is not finite."""
        if self._not_finite and not self._not_finite.isdisjoint(producers):
            self._not_finite.add(index)

    def check(
        self,
        index: int,
        entry: "Entry",
        func: Any,
        args: Any,
        kwargs: Any,
        inputs: Sequence[Tensor],
        producers: Sequence[int],
        output: Tensor,
    ) -> None:
        """Note operation `index`, whose `output` is not finite, if its inputs were."""
        self._not_finite.add(index)
        if entry.index in self._seen or len(self.found) >= _MAX_BIRTHS or _asks_for_it(args, kwargs):
            return
        written = {id(args[place]) for place in entry.traits.written if isinstance(place, int) and place < len(args)}
        ranges = []
        others = any(one.is_floating_point() and id(one) not in written for one in inputs)
        for tensor, producer in zip(inputs, producers, strict=True):
            if producer in self._not_finite:
                return
            if id(tensor) in written and (producer == UNKNOWN or (producer < UNKNOWN and not others)):
                return  # what was there before is gone, and nobody saw whether it was finite
            if id(tensor) in written or not tensor.is_floating_point():
                continue
            if not is_measurable(tensor):
                continue
            stats = range_stats(tensor)
            if not stats.is_finite:
                return
            ranges.append((str(tensor.dtype).removeprefix("torch."), stats.smallest, stats.amax))
        self._seen.add(entry.index)
        wide, wide_amax = _in_float32(entry, func, args, kwargs, inputs)
        found = range_stats(output)
        self.found.append(
            Birth(
                operation=index,
                nans=found.nans,
                infinities=found.infinities,
                inputs=tuple(ranges),
                wide=wide,
                wide_amax=wide_amax,
            )
        )


def _asks_for_it(args: Any, kwargs: Any) -> bool:
    """Whether an infinity or NaN is among the arguments: a mask, a sentinel."""
    return any(isinstance(value, float) and not math.isfinite(value) for value in (*args, *kwargs.values()))


def _in_float32(
    entry: "Entry", func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor]
) -> tuple[str, float | None]:
    """Return what the operation gives in float32, and the largest magnitude there."""
    if not any(dtype in _LOW for dtype, _ in (*entry.inputs, *entry.outputs)):
        return "not finite", None
    if entry.traits.is_copy:  # a cast: its input is what float32 holds
        amax = max((range_stats(tensor).amax for tensor in inputs if is_measurable(tensor)), default=None)
        return "finite", amax
    if entry.traits.is_random or entry.traits.written:
        return "unknown", None
    try:
        with torch.no_grad(), disable_autocast():
            out = func(*[_widened(value) for value in args], **{k: _widened(v) for k, v in kwargs.items()})
    except (RuntimeError, TypeError, NotImplementedError):
        return "unknown", None
    wide = [value for value in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(value, Tensor)]
    stats = [range_stats(value) for value in wide if is_measurable(value)]
    if not stats:
        return "unknown", None
    is_finite = all(one.is_finite for one in stats)
    return "finite" if is_finite else "not finite", max(one.amax for one in stats)


def runs_in_float32(func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor], error: Exception) -> bool:
    """Whether an operation that raised does not with copies of its operands in float32: it refused their formats."""
    if isinstance(error, torch.OutOfMemoryError) or not any(one.dtype in _LOW for one in inputs):
        return False
    if not all(has_numbers(one) for one in inputs if one.numel()):
        return False
    try:
        with torch.no_grad(), disable_autocast():
            func(*[_copied(value) for value in args], **{key: _copied(value) for key, value in kwargs.items()})
    except Exception:  # of any kind: it fails for another reason
        return False
    return True


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32, copy=True) if value.is_floating_point() else value.detach().clone()
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _LOW else value
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _LOW else value
    if isinstance(value, torch.dtype):
        return torch.float32 if value in _LOW else value
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(item) for item in value)
    return value
