"""Memory of a run on a ghost GPU: the caching allocator replayed, by class, with the moment of the peak.

Classes: weights (buffers too), copies of weights that autocast keeps, gradients, optimizer states, activations that
forward saved for backward, temporaries, inputs, and cuBLAS' workspace. The engine adds gradients that meet out of place
for fake tensors and in place on a GPU; such a sum takes the memory of what it replaces.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mezzotint.ghost.allocator import CachingAllocator
from mezzotint.ghost.owners import GRADIENTS, STATES, WEIGHTS
from mezzotint.ghost.storages import MemoryEvent
from mezzotint.plan.recording import GhostRun
from mezzotint.trace.record import Kind, Operation, Phase

CAST_CACHE, ACTIVATIONS, TEMPORARIES, INPUTS, WORKSPACE = (
    "cast weights", "activations", "temporaries", "inputs and other", "workspace",
)  # fmt: skip
CLASSES = (WEIGHTS, STATES, GRADIENTS, CAST_CACHE, ACTIVATIONS, TEMPORARIES, INPUTS, WORKSPACE)
MIB = 1 << 20

# what driver and libraries take beside the allocator, in bytes: 0.3 to 0.6 GiB by card and driver, reported by users
CONTEXT_BYTES = 512 * MIB
_MAX_POINTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Memory that was held at the peak: bytes of one class made by one module's operation."""

    role: str
    module: str
    op: str
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Memory of one step in bytes. `peak_allocated` is what `torch.cuda.max_memory_allocated` would say.

    `at_peak` are the bytes by class at that moment, `peak_operation` the operation under way, `holders` what held most.
    `timeline` has points of (operation, bytes by class) over the step. `needed` adds the context of the driver to what
    is reserved; the card fits it if `fits`.
    """

    peak_allocated: int
    peak_reserved: int
    at_peak: Mapping[str, int]
    peak_operation: int
    peak_phase: str
    peak_module: str
    holders: tuple[Holder, ...]
    timeline: tuple[tuple[int, tuple[int, ...]], ...]
    capacity: int | None
    num_storages: int

    @property
    def needed(self) -> int:
        """What the card must have: reserved memory and the driver's context."""
        return self.peak_reserved + CONTEXT_BYTES

    @property
    def fits(self) -> bool | None:
        """Whether the card has it; None where its memory is not known."""
        return None if self.capacity is None else self.needed <= self.capacity


@dataclass(slots=True)
class _Live:
    role: str
    nbytes: int
    operation: int


def plan_memory(run: GhostRun, *, first: int | None = None, end: int | None = None) -> MemoryPlan:
    """Replay a run's memory; the peak is the highest from operation `first` to `end` (the last whole step, else all).

    The first step is never the last word: optimizer states appear in it, and free blocks are used again later.
    """
    return _replay(run, *_span(run, first, end))


def largest_batch(plan: MemoryPlan, batch: int) -> int | None:
    """Return the largest batch that fits the card, if memory beyond weights, gradients and states grows with it."""
    if plan.capacity is None or batch < 1:
        return None
    grows = sum(plan.at_peak.get(role, 0) for role in (ACTIVATIONS, TEMPORARIES, INPUTS))
    if not grows:
        return None
    fixed = plan.needed - grows
    return max(0, int((plan.capacity - fixed) / (grows / batch)))


def _span(run: GhostRun, first: int | None, end: int | None) -> tuple[int, int]:
    steps = run.trace.steps
    if first is None:
        first = steps[-1].first if steps else 0
    if end is None:
        end = steps[-1].end if steps else len(run.trace.operations)
    return first, end


def _replay(run: GhostRun, first: int, end: int) -> MemoryPlan:
    operations = run.trace.operations
    roles = _roles(run, end)
    allocator = CachingAllocator()
    live: dict[int, _Live] = {}
    now: Counter[str] = Counter()
    peak, at_peak, peak_operation = -1, Counter[str](), first
    held: list[tuple[str, int, int]] = []
    timeline: list[tuple[int, tuple[int, ...]]] = []
    has_begun = False
    for event in _in_place(run):
        if event.operation >= end:
            break
        if not has_begun and event.operation >= first:
            allocator.reset_peaks()
            has_begun = True
        if event.nbytes > 0:
            allocator.allocate(event.storage, event.nbytes)
            size = allocator.size_of(event.storage)
            role = roles.get(event.storage, INPUTS)
            live[event.storage] = _Live(role, size, event.operation)
            now[role] += size
        else:
            one = live.pop(event.storage)
            now[one.role] -= one.nbytes
            allocator.release(event.storage)
        if event.operation < first:
            continue
        if allocator.allocated > peak:
            peak, at_peak, peak_operation = allocator.allocated, now.copy(), event.operation
            if event.nbytes >= peak // 1000:
                held = [(one.role, one.operation, one.nbytes) for one in live.values()]
        timeline.append((event.operation, tuple(now[role] for role in CLASSES)))
    if peak < 0:
        peak, at_peak = allocator.allocated, now.copy()
    place = operations[peak_operation].call if peak_operation < len(operations) else None
    return MemoryPlan(
        peak_allocated=peak,
        peak_reserved=allocator.peak_reserved,
        at_peak={role: at_peak[role] for role in CLASSES if at_peak[role]},
        peak_operation=peak_operation,
        peak_phase=str(place.phase) if place is not None else "",
        peak_module=place.module if place is not None else "",
        holders=_holders(held, operations),
        timeline=_thinned(timeline),
        capacity=run.spec.memory_bytes,
        num_storages=len(roles),
    )


def _in_place(run: GhostRun) -> Iterator[MemoryEvent]:
    """Yield the events, with the engine's sums of gradients in the memory of what they replace.

    Such a sum is an `add` in backward whose result is as large as what is released right after it.
    """
    events, operations = run.memory, run.trace.operations
    index = 0
    while index < len(events):
        event = events[index]
        after = events[index + 1] if index + 1 < len(events) else None
        if (
            after is not None
            and event.nbytes > 0
            and after.nbytes == -event.nbytes
            and after.operation <= event.operation + 1
            and event.operation < len(operations)
            and operations[event.operation].call.op == "aten.add.Tensor"
            and operations[event.operation].call.phase is Phase.BACKWARD
        ):
            yield MemoryEvent(after.storage, after.nbytes, event.operation)
            yield event
            index += 2
            continue
        yield event
        index += 1


def _roles(run: GhostRun, end: int) -> dict[int, str]:
    """Return the class of every storage."""
    operations = run.trace.operations
    freed: dict[int, int] = {}
    for event in run.memory:
        if event.nbytes < 0:
            freed[event.storage] = event.operation
    starts = backward_starts(operations)
    roles: dict[int, str] = {}
    for event in run.memory:
        if event.nbytes < 0 or event.storage in roles:
            continue
        roles[event.storage] = _role(run, event, freed.get(event.storage, len(operations)), operations, starts)
    return roles


def _role(run: GhostRun, event: MemoryEvent, freed: int, operations: Sequence[Operation], starts: Sequence[int]) -> str:
    if event.storage == -1:
        return WORKSPACE
    owner = run.owners.get(event.storage)
    if owner is not None:
        return owner
    if event.operation >= len(operations):
        return INPUTS
    operation = operations[event.operation]
    call = operation.call
    if call.phase is Phase.OTHER:
        return INPUTS
    if call.kind is Kind.CAST and call.phase is Phase.FORWARD and operation.producers and operation.producers[0] < -1:
        return CAST_CACHE
    if call.phase in (Phase.FORWARD, Phase.RECOMPUTE):
        begun = next((start for start in starts if start > event.operation), len(operations))
        if call.phase is Phase.RECOMPUTE or freed > begun:
            return ACTIVATIONS
    return TEMPORARIES


def backward_starts(operations: Sequence[Operation]) -> list[int]:
    """Return the first operation of each backward pass."""
    found = []
    was_backward = False
    for operation in operations:
        is_backward = operation.call.phase in (Phase.BACKWARD, Phase.RECOMPUTE)
        if is_backward and not was_backward:
            found.append(operation.index)
        was_backward = is_backward
    return found


def _holders(held: Sequence[tuple[str, int, int]], operations: Sequence[Operation]) -> tuple[Holder, ...]:
    totals: Counter[tuple[str, str, str]] = Counter()
    for role, index, nbytes in held:
        call = operations[index].call if index < len(operations) else None
        totals[role, call.module if call is not None else "", call.name if call is not None else ""] += nbytes
    return tuple(
        Holder(role=role, module=module, op=op, nbytes=nbytes) for (role, module, op), nbytes in totals.most_common(40)
    )


def _thinned(points: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Keep at most so many points, of each stretch the one with most memory."""
    stretch = max(1, -(-len(points) // _MAX_POINTS))
    return tuple(
        max(points[start : start + stretch], key=lambda point: sum(point[1]))
        for start in range(0, len(points), stretch)
    )
