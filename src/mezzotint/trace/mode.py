"""The dispatch mode that sees every ATen operation below autograd and autocast, and notes it in a few microseconds.

The mode runs the operation itself, once, with the arguments it was given, and returns what it returned: a watched run
computes the same bits. What repeats is kept once (`_Entry`); each execution is a small tuple. No tensor outlives its
step for the recorder's sake: tensors are known by their addresses, and an address that is used again has been written
again, by an operation that was seen.
"""

import sys
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from mezzotint.patches import Guard
from mezzotint.torch_internals import autograd
from mezzotint.torch_internals.dispatch import TorchDispatchMode, is_of_tracing, mode_stack, pop_mode, push_mode
from mezzotint.trace.addresses import address_of
from mezzotint.trace.births import Births, runs_in_float32
from mezzotint.trace.lanes import NOWHERE, Lane, Lanes, Place
from mezzotint.trace.module_names import ModuleNames
from mezzotint.trace.ranges import Ranges, TensorRange
from mezzotint.trace.record import FLOATING, UNKNOWN, Call, Kind, Phase, TensorMeta
from mezzotint.trace.replays import Replays
from mezzotint.trace.sites import Sites
from mezzotint.trace.traits import Traits, flops_of, traits_of
from mezzotint.trace.updates import REPLACING, Updates

MAX_MEASURED = 8
"""Operations on lists of tensors (foreach) have ranges measured only up to this many outputs: weights, gradients and
states are measured by name when the optimizer steps."""

MAX_OPERATIONS = 1_000_000
"""Operations that a recording keeps, some 300 bytes each; a recording without an end stops there and says so."""

_current_task = autograd.current_graph_task
_current_node = autograd.current_node
_next_node = autograd.next_sequence_number
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_UPDATING = (Phase.OPTIMIZER, Phase.OTHER, Phase.FORWARD)  # a module's forward counts and averages in its buffers


@dataclass(slots=True, eq=False)
class Entry:
    """A call as it is being recorded: what becomes a `Call`, and one running range for each measured output."""

    index: int
    traits: Traits
    phase: Phase
    place: Place
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    autocast: str | None
    node: str | None
    flops: int | None
    ranges: tuple[TensorRange | None, ...]


# of an operation that is about to run: traits, inputs, numbers, phase, place, node, metas, producers, watched
_Seen = tuple[Traits, list[Tensor], list[float], Phase, Place, str | None, Any, tuple[int, ...], Any]

# (entry, step, producers, numbers, seconds, thread, error)
Noted = tuple[Entry, int, tuple[int, ...], tuple[float, ...], float, int, str | None]


class RecordingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations into `log`; one per thread, all sharing a `Tape`."""

    supports_higher_order_operators = True

    def __init__(self, tape: "Tape") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape
        self._has_left = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile compile: what it fuses is seen as the kernels it calls."""
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Save the wrapper that would keep dynamo out: with compile internals ignored, it never comes in."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and note it."""
        tape = self._tape
        if not tape.is_active or tape.guard.fault is not None:
            return func(*args, **(kwargs or {}))
        lane = None
        try:
            if types and tape.is_foreign(types):
                return NotImplemented  # the subclass takes it apart, and its parts come back here
            lane = tape.lanes.mine()
        except Exception as error:
            tape.guard.fail(error)
        if lane is None or lane.pause_depth:
            return func(*args, **(kwargs or {}))
        return tape.run(func, args, kwargs or {}, lane)

    def enter_below(self) -> None:
        """Enter under all modes of the program, so that those may leave in their own order."""
        above = _popped()
        push_mode(self)
        for mode in reversed(above):
            push_mode(mode)

    def leave(self) -> None:
        """Leave from wherever the mode is. Where another thread has entered it, it stays there until a `sweep`."""
        self._has_left = True
        sweep()


def sweep() -> None:
    """Take modes that were left, by other threads too, off this thread's stack."""
    if any(isinstance(mode, RecordingMode) and mode._has_left for mode in mode_stack()):
        for mode in reversed(_popped()):
            if not (isinstance(mode, RecordingMode) and mode._has_left):
                push_mode(mode)


def _popped() -> list[TorchDispatchMode]:
    """Take all modes but those of torch's own tracing off this thread's stack, the top one first."""
    modes = [one for one in mode_stack() if not is_of_tracing(one)]
    return [pop_mode() for _ in modes]


class Tape:
    """The recording itself: entries, operations in order, and who wrote which address."""

    def __init__(
        self, lanes: Lanes, names: ModuleNames, sites: Sites, *, has_ranges: bool, guard: Guard | None = None
    ) -> None:
        self.is_active = True
        self.is_full = False
        self.guard = guard or Guard("the recording", self.stop)
        self.lanes = lanes
        self.names = names
        self.sites = sites
        self.ranges = Ranges() if has_ranges else None
        self.births = Births()
        self.updates = Updates(self)
        self.replays = Replays()
        self.step = 0
        self.graph_depth = 0  # backward passes under way that build a graph themselves
        self.entries: list[Entry] = []
        self.log: list[Noted] = []
        self.makers: dict[int, int] = {}
        self.created: dict[int, int] = {}  # address -> the operation that made a new tensor there
        self.step_first = 0  # the first operation of the current step
        self.errors: list[tuple[int, BaseException]] = []
        self.refused_formats: list[int] = []  # operations that raised, and do not with their operands in float32
        self.scaled_gradients: set[int] = set()  # addresses of gradients that still carry the loss scale
        self.scaled_reads: list[int] = []  # operations outside backward that read them
        self._known: dict[Any, Entry] = {}
        self._traits: dict[Any, Traits] = {}
        self._foreign: dict[Any, bool] = {}

    def is_foreign(self, types: Any) -> bool:
        """Whether a tensor subclass handles the operation itself."""
        key = tuple(types)
        found = self._foreign.get(key)
        if found is None:
            found = self._foreign[key] = any(
                issubclass(t, Tensor) and t not in _PLAIN and t.__name__ != "FakeTensor" for t in key
            )
        return found

    def traits(self, func: Any) -> Traits:
        """Return what is known about an operation."""
        found = self._traits.get(func)
        if found is None:
            found = self._traits[func] = traits_of(func)
        return found

    def stop(self) -> None:
        """Record nothing more."""
        self.is_active = False

    def run(self, func: Any, args: Any, kwargs: Any, lane: Lane) -> Any:
        """Run one operation, note it, and return what it returned; a fault of ours ends the recording only."""
        try:
            traits = self._traits.get(func) or self.traits(func)
            seen = None if traits.is_marker else self._before(func, traits, args, kwargs, lane)
        except Exception as error:
            self.guard.fail(error)
            seen = None
        if seen is None:
            return func(*args, **kwargs)
        start = perf_counter()
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            seconds = perf_counter() - start
            with self.guard:
                self._note_failed(seen, func, args, kwargs, lane, seconds, error)
            raise
        try:
            self._after(seen, func, args, kwargs, lane, perf_counter() - start, out)
        except Exception as error:
            self.guard.fail(error)
        return out

    def _before(self, func: Any, traits: Traits, args: Any, kwargs: Any, lane: Lane) -> _Seen:
        inputs, numbers = _tensors_and_numbers(args)
        if kwargs:
            more, more_numbers = _tensors_and_numbers(kwargs.values())
            inputs += more
            numbers += more_numbers
        phase, place, node = self._where(lane)
        metas = tuple([(t.dtype, t.shape) for t in inputs])
        producers = self._producers(inputs)
        watched = None
        if traits.written and phase in _UPDATING:
            watched = self.updates.before(traits, args, kwargs)
        return traits, inputs, numbers, phase, place, node, metas, producers, watched

    def _note_failed(
        self, seen: _Seen, func: Any, args: Any, kwargs: Any, lane: Lane, seconds: float, error: Exception
    ) -> None:
        traits, inputs, numbers, phase, place, node, metas, producers, _ = seen
        entry = self._entry(func, traits, phase, place, metas, (), (), node, lane, args, kwargs, None)
        self.log.append((entry, self.step, producers, tuple(numbers), seconds, lane.thread, str(error)))
        self.errors.append((len(self.log) - 1, error))
        if runs_in_float32(func, args, kwargs, inputs, error):
            self.refused_formats.append(len(self.log) - 1)

    def _after(self, seen: _Seen, func: Any, args: Any, kwargs: Any, lane: Lane, seconds: float, out: Any) -> None:
        traits, inputs, numbers, phase, place, node, metas, producers, watched = seen
        if self.scaled_gradients and phase is not Phase.BACKWARD:
            self._note_scaled_read(inputs)
        outputs = _written(traits, args, kwargs) if traits.written else _outputs(out)
        entry = self._entry(
            func, traits, phase, place, metas, tuple([(t.dtype, t.shape) for t in outputs]), outputs, node, lane, args,
            kwargs, out,
        )  # fmt: skip
        index = len(self.log)
        self.log.append((entry, self.step, producers, tuple(numbers), seconds, lane.thread, None))
        if index >= MAX_OPERATIONS:
            self.is_full = True
            self.stop()
        self._note_addresses(index, outputs, is_new=not traits.written and not traits.is_view)
        if self.ranges is not None:
            self._measure(index, entry, func, args, kwargs, inputs, producers, outputs, out)
        if watched is not None:
            self.updates.after(watched, traits, func, place)
        elif phase is Phase.OTHER and not traits.written and traits.name in REPLACING and inputs:
            self.updates.replaced(traits, func, args, kwargs, inputs[0], out, place)

    def _measure(
        self, index: int, entry: Entry, func: Any, args: Any, kwargs: Any, inputs: list[Tensor],
        producers: tuple[int, ...], outputs: list[Tensor], out: Any,
    ) -> None:  # fmt: skip
        """Add the numbers of the outputs to their ranges, and look at what made them."""
        assert self.ranges is not None
        for t, found in zip(outputs, entry.ranges, strict=False):
            if found is None:
                self.births.pass_on(index, producers)
            elif self.ranges.add(t, found):
                self.births.check(index, entry, func, args, kwargs, inputs, producers, t)
        if entry.phase is Phase.FORWARD or entry.phase is Phase.OTHER:
            self.replays.note(index, entry, func, args, kwargs, inputs, producers, out)

    def _note_addresses(self, index: int, outputs: list[Tensor], *, is_new: bool) -> None:
        makers, created = self.makers, self.created
        try:
            for t in outputs:
                address = address_of(t)
                if is_new:
                    created[address] = index
                if makers.get(address, UNKNOWN) >= UNKNOWN:  # weights keep their name
                    makers[address] = index
        except (RuntimeError, NotImplementedError):
            pass  # sparse and other tensors without an address have no known producer

    def _note_scaled_read(self, inputs: list[Tensor]) -> None:
        try:
            if any(address_of(t) in self.scaled_gradients for t in inputs):
                self.scaled_reads.append(len(self.log))
        except (RuntimeError, NotImplementedError):
            pass

    def _where(self, lane: Lane) -> tuple[Phase, Place, str | None]:
        """Return the phase and the place of the operation that is about to run."""
        modules = lane.modules
        number = _next_node()
        if _current_task() == -1:
            site = self.sites.here(sys._getframe(4))
            is_new_node = number > lane.next_node
            place = Place(modules[-1] if modules else "", site)
            if is_new_node:
                lane.remember(number, place)
            if lane.update_depth and len(modules) <= lane.base:
                return Phase.OPTIMIZER, place, None
            if modules or (is_new_node and torch.is_grad_enabled()):
                return Phase.FORWARD, place, None
            return Phase.OTHER, place, None
        node: Any = _current_node()
        name = None if node is None else type(node).__name__
        site = self.sites.here(sys._getframe(4))
        if len(modules) > lane.base or (torch.is_grad_enabled() and not self.graph_depth):
            found = Place(modules[-1], site) if len(modules) > lane.base else self._made(node, name, lane)
            place = Place(found.module, site or found.site)
            if number > lane.next_node:
                lane.remember(number, place)
            return Phase.RECOMPUTE, place, None
        place = self._made(node, name, lane)
        if site:
            place = Place(place.module, site)  # the backward of a Function of the user's own, or a hook
        if number > lane.next_node:
            lane.remember(number, place)
        return Phase.BACKWARD, place, name

    def _made(self, node: Any, name: str | None, lane: Lane) -> Place:
        """Return where the forward operation was that an autograd node belongs to."""
        if node is None:
            return NOWHERE
        if name == "AccumulateGrad":
            owner = self.names.parameters.get(id(node.variable), "")
            return Place(owner.rpartition(".")[0], ())
        return self.lanes.place_of(autograd.sequence_number_of(node), lane)

    def _producers(self, inputs: list[Tensor]) -> tuple[int, ...]:
        makers = self.makers
        try:
            return tuple([makers.get(address_of(t), UNKNOWN) for t in inputs])
        except (RuntimeError, NotImplementedError):
            return (UNKNOWN,) * len(inputs)

    def _entry(
        self, func: Any, traits: Traits, phase: Phase, place: Place, inputs: Any, metas: Any, outputs: Any,
        node: str | None, lane: Lane, args: Any, kwargs: Any, out: Any,
    ) -> Entry:  # fmt: skip
        region = lane.region
        autocast = region.dtype if region is not None else None
        key = (func, phase, place.module, id(place.site), inputs, metas, autocast, node)
        entry = self._known.get(key)
        if entry is None:
            largest = max((shape.numel() for _, shape in (*inputs, *metas)), default=0)
            if traits.name.startswith("_foreach_"):
                largest = sum(shape.numel() for _, shape in metas)
            ranges = tuple(
                TensorRange(dtype_name(dtype))
                if (traits.num_results is None or place_in < traits.num_results)
                and self._is_measured(traits, inputs, dtype, len(metas))
                else None
                for place_in, (dtype, _) in enumerate(metas)
            )
            entry = self._known[key] = Entry(
                len(self.entries), traits, phase, place, inputs, metas, autocast, node,
                flops_of(traits, args, kwargs, out, largest) if metas else None, ranges,
            )  # fmt: skip
            self.entries.append(entry)
        return entry

    def _is_measured(self, traits: Traits, inputs: Any, dtype: torch.dtype, num_outputs: int) -> bool:
        """Whether an output has numbers of its own: not those of its inputs in another order or a wider format."""
        is_widened = (
            traits.is_copy
            and inputs
            and all(given.is_floating_point and given.itemsize < dtype.itemsize for given, _ in inputs)
        )
        return (
            not is_widened
            and not traits.is_arranged
            and self.ranges is not None
            and not traits.is_view
            and not traits.is_unwritten
            and dtype.is_floating_point
            and num_outputs <= MAX_MEASURED
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name of a dtype without the prefix."""
    return str(dtype).removeprefix("torch.")


def call_of(entry: Entry) -> Call:
    """Return an entry as the value that a trace holds."""
    inputs, outputs = _metas(entry.inputs), _metas(entry.outputs)
    kind = entry.traits.kind
    if entry.traits.is_copy and kind is Kind.COMPUTE and _is_conversion(inputs, outputs):
        kind = Kind.CAST
    if kind is Kind.CAST and not _is_conversion(inputs, outputs):
        kind = Kind.COMPUTE  # `_to_copy` between devices or layouts
    return Call(
        index=entry.index,
        op=entry.traits.op,
        kind=kind,
        phase=entry.phase,
        module=entry.place.module,
        site=entry.place.site,
        inputs=inputs,
        outputs=outputs,
        autocast=entry.autocast,
        node=entry.node,
        is_in_place=bool(entry.traits.written),
        flops=entry.flops,
        tallies=tuple(None if found is None or not found.count else found.tally() for found in entry.ranges),
    )


def _metas(pairs: Any) -> tuple[TensorMeta, ...]:
    return tuple(TensorMeta(dtype_name(dtype), tuple(shape)) for dtype, shape in pairs)


def _is_conversion(inputs: tuple[TensorMeta, ...], outputs: tuple[TensorMeta, ...]) -> bool:
    """Whether numbers go from one dtype to another, one of them a floating-point format."""
    dtypes = {meta.dtype for meta in (*inputs, *outputs)}
    return len(dtypes) > 1 and not dtypes.isdisjoint(FLOATING)


def _tensors_and_numbers(values: Any) -> tuple[list[Tensor], list[float]]:
    tensors: list[Tensor] = []
    numbers: list[float] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif type(value) is float or type(value) is int:
            numbers.append(value)
        elif isinstance(value, (list, tuple)):
            tensors.extend([item for item in value if isinstance(item, Tensor)])
    return tensors, numbers


def _outputs(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, (list, tuple)):
        found: list[Tensor] = []
        for item in out:
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple)):
                found.extend(part for part in item if isinstance(part, Tensor))
        return found
    return []


def _written(traits: Traits, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an in-place or `out=` operation wrote."""
    found: list[Tensor] = []
    for place in traits.written:
        value = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
        found.extend(_outputs(value))
    return found
