"""Memory of one training step, as the allocator saw it, and of the state that stays.

The step's figures come from the allocator's own events (torch.profiler), sorted by time and added up. They see the
temporaries of C++ code, repeat exactly from run to run, and do not move with what malloc caches, as resident memory
does. Buffers that code outside torch allocates are not in them.
"""

import gc
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mezzotint.engine.engine import Engine
from mezzotint.torch_internals.profiler import allocation
from mezzotint.torch_internals.registry import Feature, require
from mezzotint.training.step_profile import StepProfile, summarise


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Bytes above what was held before the step.

    `activations_bytes` are held when forward has ended: what is saved for backward, and the outputs; of them,
    `cast_cache_bytes` are autocast's copies of weights. `gradients_bytes` are held when backward has ended.
    `peak_bytes` is the highest point until then, gradients and temporaries included.
    """

    activations_bytes: int
    peak_bytes: int
    gradients_bytes: int = 0
    cast_cache_bytes: int = 0
    profile: StepProfile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMemory:
    """Bytes that stay between steps, by class, and the number of parameters that they belong to."""

    weights_bytes: int
    masters_bytes: int
    optimizer_bytes: int
    num_parameters: int

    @property
    def bytes_per_parameter(self) -> float:
        """All classes together, per parameter."""
        return (self.weights_bytes + self.masters_bytes + self.optimizer_bytes) / self.num_parameters


def measure_step(
    forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], None], device: torch.device
) -> StepMemory:
    """Run `forward`, which returns the loss, and `backward` of it, and return what they allocated on `device`."""
    if device.type == "cuda":
        return _measure_cuda(forward, backward)
    with _profiled() as recorded:
        loss = forward()
        forward_end = time.time_ns()
        cast_bytes = _cast_weight_bytes(loss)
        backward(loss)
    held = peak = at_forward_end = 0
    for when, num_bytes in recorded.allocations:
        held += num_bytes
        peak = max(peak, held)
        if when <= forward_end:
            at_forward_end = held
    return StepMemory(
        activations_bytes=at_forward_end,
        peak_bytes=peak,
        gradients_bytes=max(held, 0),
        cast_cache_bytes=cast_bytes,
        profile=recorded.profile,
    )


@dataclass(slots=True)
class MeasuredCall:
    """What `measure_call` measured: the highest point above what was held before, and where the time went."""

    peak_bytes: int | None = None
    profile: StepProfile | None = None


@contextmanager
def measure_call() -> Iterator[MeasuredCall]:
    """Measure what runs inside: on the CPU, or on CUDA where memory is in use there."""
    measured = MeasuredCall()
    if torch.cuda.is_available() and torch.cuda.memory_allocated() > 0:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with _profiled(on_cuda=True) as recorded:
            yield measured
            torch.cuda.synchronize()
        measured.peak_bytes = torch.cuda.max_memory_allocated() - before
        measured.profile = recorded.profile
        return
    with _profiled() as recorded:
        yield measured
    measured.profile = recorded.profile
    held = peak = 0
    for _, num_bytes in recorded.allocations:
        held += num_bytes
        peak = max(peak, held)
    measured.peak_bytes = peak


@dataclass(slots=True)
class _Recorded:
    """Time in ns and bytes of the CPU allocator's events, in order, and the profile, when the context has ended."""

    allocations: list[tuple[int, int]] = field(default_factory=list)
    profile: StepProfile | None = None


@contextmanager
def _profiled(*, on_cuda: bool = False) -> Iterator[_Recorded]:
    """Record the allocator's events and the operations inside.

    Python's collector waits: when it would free old cycles depends on everything that ran before.
    """
    require(Feature.MEMORY)
    recorded = _Recorded()
    was_collecting = gc.isenabled()
    gc.disable()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    profiler = profile(activities=kinds, profile_memory=not on_cuda, record_shapes=True, acc_events=True)
    early = torch.empty(1)
    with _quiet_stderr():
        profiler.start()
        del early  # a block it does not know: it warns of one a second at most, and this one nobody sees
    try:
        yield recorded
    finally:
        with _quiet_stderr():
            profiler.stop()
        if was_collecting:
            gc.enable()
    if not on_cuda:
        recorded.allocations += _of_own_blocks(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    recorded.profile = summarise(profiler.key_averages(group_by_input_shape=True), on_device=on_cuda)


def _of_own_blocks(tree: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """Yield time and bytes of the events of blocks that were allocated among them, in order.

    Blocks that existed before are left out: the profiler knows the size of some, by what lay at their address in an
    earlier measurement.
    """
    found = []
    waiting = list(tree)
    while waiting:
        node = waiting.pop()
        waiting.extend(node.children)
        if node.tag == allocation() and node.extra_fields.device.type == "cpu":
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    alive: set[int] = set()
    for when, address, num_bytes in sorted(found, key=lambda event: event[0]):
        if num_bytes >= 0:
            alive.add(address)
        elif address in alive:
            alive.remove(address)
        else:
            continue
        yield when, num_bytes


def _cast_weight_bytes(loss: torch.Tensor) -> int:
    """Return what casts of parameters take that wait for backward, found in the graph of the loss."""
    seen: set[Any] = set()
    waiting = [loss.grad_fn]
    total = 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [next_node for next_node, _ in node.next_functions]
        parameter = getattr(following[0], "variable", None) if node.name() == "ToCopyBackward0" else None
        if parameter is not None:
            total += parameter.numel() * 2  # autocast's formats have 16 bits
        waiting.extend(following)
    return total


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence standard error: the profiler's C++ part writes lines of its own there, which no setting stops."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def _measure_cuda(forward: Callable[[], torch.Tensor], backward: Callable[[torch.Tensor], None]) -> StepMemory:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = forward()
    held = torch.cuda.memory_allocated() - before
    cast_bytes = _cast_weight_bytes(loss)
    backward(loss)
    torch.cuda.synchronize()
    return StepMemory(
        activations_bytes=held,
        peak_bytes=torch.cuda.max_memory_allocated() - before,
        gradients_bytes=max(torch.cuda.memory_allocated() - before, 0),
        cast_cache_bytes=cast_bytes,
    )


def state_memory(engine: Engine) -> StateMemory:
    """Return what weights, float32 copies or compensations, and optimizer states of `engine` take."""
    weights = list(dict.fromkeys(p for module in engine.models.values() for p in module.parameters()))
    kept = [tensor for part in engine.shadowed_weights().values() for tensor in part.state_dict()["tensors"]]
    states = [
        value
        for optimizer in engine.optimizers.values()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return StateMemory(
        weights_bytes=_num_bytes(weights),
        masters_bytes=_num_bytes(kept),
        optimizer_bytes=_num_bytes(states),
        num_parameters=sum(p.numel() for p in weights),
    )


def _num_bytes(tensors: list[torch.Tensor] | list[torch.nn.Parameter]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
