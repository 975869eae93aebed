"""Recorder: everything that is installed while a training program is watched, and the trace that comes of it.

    with Recorder(steps=3) as recorder:
        train()
    trace = recorder.trace()

Installed are: a dispatch mode (in this thread and in those started while it watches), global hooks on modules and
optimizers, and the patches of `mezzotint.trace.protocol`. All of it is taken back on the way out, whatever happened.
After `steps` steps, the next backward pass raises `Enough`, which ends a program as Ctrl-C would.
"""

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from time import perf_counter
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mezzotint.errors import AuditError
from mezzotint.patches import Guard, Patches
from mezzotint.torch_internals import tensors  # declare what is read
from mezzotint.torch_internals.python import wrap_threads
from mezzotint.torch_internals.registry import Feature, notes, require
from mezzotint.trace.addresses import address_of
from mezzotint.trace.gradients import weights_of
from mezzotint.trace.lanes import Lane, Lanes, Place, Region
from mezzotint.trace.mode import RecordingMode, Tape, call_of, dtype_name, sweep
from mezzotint.trace.module_names import ModuleNames
from mezzotint.trace.protocol import Protocol
from mezzotint.trace.ranges import tally_of
from mezzotint.trace.record import MASTER_MARK, Operation, ParameterRecord, StepRecord, Trace, parameter_producer
from mezzotint.trace.sites import Sites
from mezzotint.trace.traits import COLLECTIVES, UNDERSTOOD
from mezzotint.trace.updates import Moving, moving_weights

_ABOUT_HOOKS = "Using `torch.compile.*when there are global hooks"

# Python keeps one list of what runs after a fork and never drops from it, so one function serves all recorders.
_active: list["Recorder"] = []


def observer(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a hook that changes nothing: the engine's fused updates need not step aside for it."""
    hook.observes_only = True  # type: ignore[attr-defined]
    return hook


class Enough(BaseException):
    """Raised inside the watched program when as many steps as wanted were seen."""


class BusyError(AuditError):
    """Another recorder is at work, and does not give way; `is_command`: that of the command `mezzotint audit`."""

    def __init__(self, text: str, *, is_command: bool = False) -> None:
        super().__init__(text)
        self.is_command = is_command


class Recorder:
    """Watches one training program. `steps` is None to watch until the end; `has_ranges` measures every output.

    A fault of our own ends the recording, not the program (`guard`), and is among the notes. A recorder with
    `gives_way` only monitors: it calls that function, which ends it, when another one is to begin.

    `names` are module names to go on with; `optimizers` those that exist, which are looked for if not given. Without
    `hears_optimizers` the owner calls `before_optimizer` and `after_optimizer`: hooks cannot be added from within one.
    """

    is_command = False

    def __init__(
        self,
        *,
        steps: int | None = None,
        has_ranges: bool = True,
        names: ModuleNames | None = None,
        optimizers: Sequence[Optimizer] | None = None,
        hears_optimizers: bool = True,
        guard: Guard | None = None,
        gives_way: Callable[[], None] | None = None,
    ) -> None:
        self._guard = guard or Guard("the audit", self.stop)
        self._gives_way = gives_way
        self._max_steps = steps
        self._has_ranges = has_ranges
        self._hears_optimizers = hears_optimizers
        self._patches = Patches(self._guard)
        self._removers: list[Callable[[], None]] = []
        self._mode: RecordingMode | None = None
        self._lanes = Lanes()
        self._names = names or ModuleNames()
        self._tape = Tape(self._lanes, self._names, Sites(), has_ranges=has_ranges, guard=self._guard)
        self._protocol = Protocol(
            self._tape, on_backward=self._before_backward, on_step=self._after_step, optimizers=optimizers
        )
        self._steps: list[StepRecord] = []
        self._step_start = (0, 0.0)
        self._has_backward = False
        self._pending: list[Any] = []
        self._unmoved: dict[str, bool] = {}
        self._weights: dict[int, tuple[int, str, Tensor]] = {}
        self._parameters: list[ParameterRecord] = []
        self._filter: Any = None
        self._compiled: set[str] = set()
        self._missing: list[str] = []  # what is not known because torch misses a private name
        self.notes: list[str] = []

    # context

    def __enter__(self) -> "Recorder":
        """Install everything. Raises BusyError when another recorder is at work that does not give way."""
        for other in list(_active):
            if other._gives_way is not None and self._gives_way is None:
                other._gives_way()
        if any(other._guard.fault is None for other in _active):  # one that failed to end records nothing
            raise BusyError(
                "a recorder is at work already; leave the outer audit before the next",
                is_command=any(other.is_command for other in _active),
            )
        require(Feature.RECORDING, AuditError)
        self._missing = notes(Feature.RECORDING)
        _stop_in_forked_children()
        _active.append(self)
        with self._guard:
            self._install()
        if self._guard.fault is not None:
            self.__exit__(None, None, None)
        return self

    def _install(self) -> None:
        self._open_regions()
        self._protocol.install()
        hook = self._guard.hook
        # torch calls its own step hooks for every optimizer class, but wraps each class once, when it is first built
        self._removers += [
            register_module_forward_pre_hook(hook(self._enter_module)).remove,
            register_module_forward_hook(hook(self._leave_module), always_call=True).remove,
        ]
        if self._hears_optimizers:
            self._removers += [
                register_optimizer_step_pre_hook(hook(self.before_optimizer)).remove,
                register_optimizer_step_post_hook(hook(self.after_optimizer)).remove,
            ]
        wrap_threads(self._patches, self._in_thread)
        self._patches.wrap(torch, "compile", self._compile)
        warnings.filterwarnings("ignore", message=_ABOUT_HOOKS)
        self._filter = warnings.filters[0]
        self._know_weights()  # of modules that have their names from an earlier recorder
        self._step_start = (0, perf_counter())
        sweep()
        mode = RecordingMode(self._tape)
        if self._gives_way is None:
            mode.__enter__()  # type: ignore[no-untyped-call]
        else:
            mode.enter_below()
        self._mode = mode

    def __exit__(self, *error: Any) -> None:
        """Take everything back, whatever fails on the way."""
        with self._guard:
            if len(error) == 3 and isinstance(error[1], Exception) and self._tape.is_active:
                self._protocol.note_error(error[1], self._lanes.mine())
        self.stop()
        with self._guard:
            if self._mode is not None and self._gives_way is None:
                self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
            elif self._mode is not None:
                self._mode.leave()
            self._mode = None
        if self._filter in warnings.filters:
            warnings.filters.remove(self._filter)  # type: ignore[attr-defined]
        for remove in reversed(self._removers):
            with self._guard:
                remove()
        self._removers.clear()
        with self._guard:
            self._patches.undo()
        with self._guard:
            self._protocol.remove()
        if self in _active:
            _active.remove(self)

    def stop(self) -> None:
        """Record nothing more; what is installed stays until the context ends."""
        self._tape.is_active = False

    def begin_places_at(self, code: CodeType) -> None:
        """Make the lines above this code, which calls the program, no part of any operation's place."""
        self._tape.sites.add_barrier(code)

    @property
    def num_steps(self) -> int:
        """The number of steps that have ended."""
        return len(self._steps)

    @property
    def num_operations(self) -> int:
        """The number of operations that have ended."""
        return len(self._tape.log)

    def known_tensors(self) -> Iterator[tuple[Tensor | None, tuple[Tensor, ...]]]:
        """Yield every weight that was met, and the buffers of every module that was called."""
        for _, _, weight in self._weights.values():
            yield weight, ()
        for module in list(self._names.modules()):
            yield None, tuple(one for one in tensors.buffers_of(module).values() if one is not None)

    @property
    def has_seen_operations(self) -> bool:
        """Whether anything at all was recorded."""
        return bool(self._tape.log)

    def _open_regions(self) -> None:
        """Take over autocast regions that were entered before."""
        lane = self._lanes.mine()
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                dtype = dtype_name(torch.get_autocast_dtype(device))
                lane.regions.append(Region(device, dtype, torch.is_autocast_cache_enabled(), (), False))

    def _compile(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = args[0] if args else kwargs.get("model")
        self._compiled.add(
            type(made).__name__ if isinstance(made, nn.Module) else getattr(made, "__qualname__", "a function")
        )
        return original(*args, **kwargs)

    def _in_thread(self, original: Callable[..., Any], thread: threading.Thread) -> None:
        with RecordingMode(self._tape):
            original(thread)

    # modules

    def _enter_module(self, module: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        lane = self._lanes.mine()
        known = self._names.find(module)
        if known is None:
            parent = lane.owners[-1] if lane.owners else None
            known = self._names.name(
                module, parent if isinstance(parent, nn.Module) else None, sys._getframe(1) if parent is None else None
            )
            self._know_weights()
        lane.modules.append(known)
        lane.owners.append(module)

    def _leave_module(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        lane = self._lanes.mine()
        while lane.owners:  # a pre-hook that raised left its module standing
            owner = lane.owners.pop()
            lane.modules.pop()
            if owner is module:
                break

    def _know_weights(self, optimizer: Any = None) -> None:
        """Give every weight that is reachable a number and a name."""
        found = list(weights_of(optimizer)) if optimizer is not None else []
        for module in list(self._names.modules()):
            found.extend(weight for weight in tensors.parameters_of(module).values() if weight is not None)
        makers = self._tape.makers
        masters = self._masters_among(found)
        for weight in found:
            if id(weight) in self._weights:
                continue
            index = len(self._weights)
            name = self._names.parameters.get(id(weight)) or masters.get(id(weight), f"parameter {index}")
            self._weights[id(weight)] = (index, name, weight)
            address = _address(weight)
            if address:
                makers[address] = parameter_producer(index)
                self._tape.updates.names[address] = (name, "weight")

    def _masters_among(self, found: list[Tensor]) -> dict[int, str]:
        """Name float32 copies after the compact weights that they stand for, told by the order of their shapes."""
        copies = [one for one in found if id(one) not in self._names.parameters and one.dtype is torch.float32]
        compact = [
            (weight, name)
            for _, name, weight in self._weights.values()
            if weight.dtype in (torch.bfloat16, torch.float16)
        ]
        if not copies or [one.shape for one in copies] != [weight.shape for weight, _ in compact]:
            return {}
        return {id(one): f"{name}{MASTER_MARK}" for one, (_, name) in zip(copies, compact, strict=True)}

    # steps

    def _before_backward(self) -> None:
        if not self._tape.is_active:
            return  # a forked child, whose steps are its own
        if self._max_steps is not None and len(self._steps) >= self._max_steps:
            raise Enough
        self._has_backward = True
        self._tape.updates.release()
        self._tape.replays.release()

    @observer
    def before_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Note the state in which an optimizer finds weights and gradients; returns a step\'s arguments, if changed."""
        lane = self._lanes.mine()
        facts = self._protocol.before_step(optimizer, lane)
        first = len(self._tape.log)
        self._know_weights(optimizer)
        samples: list[tuple[Tensor, Tensor, str]] = []
        moving: list[Moving] = []
        with lane.paused(), torch.no_grad():
            for weight in weights_of(optimizer):
                _, name, _ = self._weights[id(weight)]
                sample = self._tape.updates.sample(weight) if self._has_ranges else None
                if sample is not None:
                    samples.append((weight, sample, name))
            if self._gives_way is not None:  # a monitor looks for weights that have stopped
                moving = moving_weights(optimizer, {id(one): sample for one, sample, _ in samples})
            self._record_weights(optimizer)
        self._pending.append((facts, first, samples, moving))
        lane.base, lane.update_depth = len(lane.modules), lane.update_depth + 1
        place = next((p for p, value in enumerate(args) if p and callable(value)), None)
        if place is not None:
            return (*args[:place], self._outside_update(args[place], lane), *args[place + 1 :]), kwargs
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._outside_update(kwargs["closure"], lane)}
        return None

    def _outside_update(self, closure: Callable[[], Any], lane: Lane) -> Callable[[], Any]:
        """Return a closure whose operations count as forward and backward, though an optimizer calls it."""

        def watched() -> Any:
            depth, lane.update_depth = lane.update_depth, 0
            try:
                return closure()
            finally:
                lane.update_depth = depth

        return watched

    @observer
    def after_optimizer(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """Note what an optimizer did."""
        lane = self._lanes.mine()
        lane.update_depth = max(0, lane.update_depth - 1)
        if not self._pending:
            return
        facts, first, samples, moving = self._pending.pop()
        place = Place("", self._tape.sites.here(sys._getframe(1)))
        with lane.paused(), torch.no_grad():
            for weight, sample, name in samples:
                self._tape.updates.compare(weight, sample, name, place)
            for one in moving:
                self._unmoved[self._weights[id(one.weight)][1]] = not one.has_moved()
            for weight, states in getattr(optimizer, "state", {}).items():
                if isinstance(weight, Tensor) and id(weight) in self._weights and isinstance(states, dict):
                    self._know_states(weight, states)
            self._add_states(optimizer)
        self._protocol.after_step(facts, first, lane, depth=3)

    def _know_states(self, weight: Tensor, states: dict[str, Any]) -> None:
        name = self._weights[id(weight)][1]
        for key, value in states.items():
            if isinstance(value, Tensor):
                self._tape.updates.names.setdefault(_address(value), (f"{name}: {key}", "state"))

    def _record_weights(self, optimizer: Any) -> None:
        """Note dtypes and ranges of weights and gradients as the optimizer finds them; the last time counts."""
        for weight in weights_of(optimizer):
            index, name, _ = self._weights[id(weight)]
            grad = weight.grad
            record = ParameterRecord(
                index=index,
                name=name,
                shape=tuple(weight.shape),
                dtype=dtype_name(weight.dtype),
                grad_dtype=dtype_name(grad.dtype) if grad is not None else None,
                optimizer=type(optimizer).__name__,
                states={},
                weight=tally_of(weight) if self._has_ranges else None,
                grad=tally_of(grad) if self._has_ranges and grad is not None else None,
            )
            while len(self._parameters) <= index:
                self._parameters.append(record)
            self._parameters[index] = record

    def _add_states(self, optimizer: Any) -> None:
        for weight in weights_of(optimizer):
            states = optimizer.state.get(weight, {})
            found = {key: dtype_name(v.dtype) for key, v in states.items() if isinstance(v, Tensor)}
            index = self._weights[id(weight)][0]
            record = self._parameters[index]
            self._parameters[index] = _with_states(record, found)

    def _after_step(self, optimizer: str, is_skipped: bool, loss: float | None) -> None:
        """End a step; an optimizer that steps right after another, without a backward pass between, extends it."""
        first, start = self._step_start
        if not self._has_backward and self._steps:
            last = self._steps[-1]
            self._steps[-1] = _extended(last, len(self._tape.log), optimizer)
            return
        self._has_backward = False
        now = perf_counter()
        self._steps.append(
            StepRecord(
                index=len(self._steps),
                first=first,
                end=len(self._tape.log),
                seconds=now - start,
                optimizers=(optimizer,),
                is_skipped=is_skipped,
                loss=loss,
            )
        )
        self._step_start = (len(self._tape.log), now)
        self._tape.step_first = len(self._tape.log)
        self._tape.replays.release()
        self._tape.step = len(self._steps)

    def end_step(self) -> None:
        """End a step that no torch optimizer ended, if there was a backward pass: an update made by hand."""
        if self._has_backward:
            self._protocol.end_step_by_hand()

    # result

    def trace(self) -> Trace:
        """Return what was recorded; the program may still be under way."""
        calls = [call_of(entry) for entry in self._tape.entries]
        operations = [
            Operation(
                index=index,
                step=step,
                call=calls[entry.index],
                producers=producers,
                numbers=numbers,
                seconds=seconds,
                thread=thread,
                error=error,
            )
            for index, (entry, step, producers, numbers, seconds, thread, error) in enumerate(self._tape.log)
        ]
        return Trace(
            facts=_machine(),
            calls=calls,
            operations=operations,
            events=list(self._protocol.events),
            steps=list(self._steps),
            parameters=self._known_parameters(),
            updates=self._tape.updates.records(),
            births=list(self._tape.births.found),
            modules=self._names.classes(),
            notes=[*self.notes, *self._missing, *self._notes()],
            scaled_reads=list(self._tape.scaled_reads),
            refused_formats=list(self._tape.refused_formats),
            unmoved=dict(self._unmoved),
            roundings=self._tape.replays.records(),
        )

    def _notes(self) -> list[str]:
        """Return what was not seen, as far as the recorder knows."""
        notes = [] if self._guard.fault is None else [self._guard.fault]
        if self._tape.is_full:
            notes.append(f"the recording holds {len(self._tape.log)} operations and stopped there; give it fewer steps")
        skipped = 0 if self._tape.ranges is None else self._tape.ranges.num_skipped
        if skipped:
            notes.append(f"{skipped} outputs have no range: they had no numbers that can be read")
        return [*notes, *self._about_collectives(), *self._about_compiled()]

    def _about_collectives(self) -> list[str]:
        unknown = {
            entry.index: entry.traits.op
            for entry in self._tape.entries
            if entry.traits.op.startswith(COLLECTIVES) and not entry.traits.name.startswith(UNDERSTOOD)
        }
        if not unknown:
            return []
        number = sum(noted[0].index in unknown for noted in self._tape.log)
        kinds = ", ".join(sorted(set(unknown.values())))[:200]
        return [f"{number} collectives of kinds not understood: {kinds}, so `reduce` is not known"]

    def _about_compiled(self) -> list[str]:
        compiled = set(self._compiled)
        for name, kind in self._names.classes().items():
            if kind == "OptimizedModule":
                compiled.add(name)
        if not compiled and any((entry.node or "").startswith("CompiledFunction") for entry in self._tape.entries):
            compiled.add("a function")
        if not compiled:
            return []
        return [
            f"{', '.join(sorted(compiled))} ran under torch.compile: of its graphs only the kernels that they "
            "call one by "
            "one (products, convolutions, attention) were seen; what is fused into one kernel was not"
        ]

    def _known_parameters(self) -> list[ParameterRecord]:
        stepped = {record.index: record for record in self._parameters}
        return [
            stepped.get(index)
            or ParameterRecord(
                index=index, name=name, shape=tuple(weight.shape), dtype=dtype_name(weight.dtype), grad_dtype=None,
                optimizer=None, states={}, weight=None, grad=None,
            )
            for index, name, weight in self._weights.values()
        ]  # fmt: skip


def _with_states(record: ParameterRecord, states: dict[str, str]) -> ParameterRecord:
    return replace(record, states=states)


def _extended(step: StepRecord, end: int, optimizer: str) -> StepRecord:
    return replace(step, end=end, optimizers=(*step.optimizers, optimizer))


def _address(tensor: Tensor) -> int:
    try:
        return address_of(tensor)
    except (RuntimeError, NotImplementedError):
        return 0


def _machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _after_fork() -> None:
    """Stop recording in a forked child: a DataLoader's worker, say."""
    for recorder in _active:
        recorder._tape.is_active = False
    _active.clear()


@cache
def _stop_in_forked_children() -> None:
    """Stop recorders in children that this process forks, from now on; done once per process."""
    os.register_at_fork(after_in_child=_after_fork)
