"""Memory of one training step, as the allocator saw it, and of the state that stays.

The step's figures come from the allocator's own events (torch.profiler), sorted by time and added up. They see the
temporaries of C++ code, repeat exactly from run to run, and do not move with what malloc caches, as resident memory
does. Buffers that code outside torch allocates are not in them.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from mezzotint.engine.engine import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMemory:
    """Bytes above what was held before the step.

    `activations_bytes` are held when forward has ended: what is saved for backward, and the outputs. `peak_bytes` is
    the highest point until the end of backward, gradients and temporaries included.
    """

    activations_bytes: int
    peak_bytes: int


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
    marks: list[int] = []
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with _quiet_stderr():
        profiler.start()
    try:
        loss = forward()
        marks.append(time.time_ns())
        backward(loss)
    finally:
        with _quiet_stderr():
            profiler.stop()
    events = sorted(
        (event.start_ns(), event.nbytes())  # type: ignore[union-attr]
        for event in profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    )
    held = peak = at_forward_end = 0
    for when, num_bytes in events:
        held += num_bytes
        peak = max(peak, held)
        if when <= marks[0]:
            at_forward_end = held
    return StepMemory(activations_bytes=at_forward_end, peak_bytes=peak)


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
    backward(loss)
    torch.cuda.synchronize()
    return StepMemory(activations_bytes=held, peak_bytes=torch.cuda.max_memory_allocated() - before)


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
