"""Why memory is held at the peak: activations that a variable keeps from step to step, gradients before their cast."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mezzotint.ghost.owners import GRADIENTS
from mezzotint.plan.memory import MIB, MemoryPlan, backward_starts
from mezzotint.plan.recording import GhostRun
from mezzotint.trace.places import user_line
from mezzotint.trace.record import LOW_PRECISION, Call, Kind, Operation, Phase

_SHARE = 100  # what is less than a hundredth of the peak is not worth a sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """A storage: its bytes, the operation that made it and the one before which it was released (None: it was not)."""

    storage: int
    nbytes: int
    made: int
    freed: int | None

    def is_live_at(self, operation: int) -> bool:
        """Whether it takes memory while an operation runs."""
        return self.made <= operation and (self.freed is None or self.freed > operation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """An activation that only a variable of the program holds at the peak: bytes and the call that made it."""

    nbytes: int
    call: Call

    @property
    def sentence(self) -> str:
        """What is held, from which line, and what to do."""
        line = user_line(self.call.site)
        place = f" at {line.path}:{line.line}" if line is not None else ""
        return (
            f"a tensor of {self.nbytes / MIB:,.0f} MiB made by {self.call.name}{place} is held at the peak although "
            "nothing reads it any more: its variable keeps it until the next step's forward has made another one; "
            "`del` the variable after its last use"
        )


def kept_activation(run: GhostRun, plan: MemoryPlan) -> Kept | None:
    """Return the largest activation that a variable alone holds at the peak of the last step.

    Such a variable is bound anew in each step: the tensor of the step before is released in the forward pass that made
    the next one by the same call, and that pass does not read it. What the optimizer owns, what is read after the peak,
    and what is less than a hundredth of the peak, is left out.
    """
    operations, steps = run.trace.operations, run.trace.steps
    if not steps:
        return None
    largest: Kept | None = None
    for before, after in _bound_anew(run, steps[-1].first, steps[-1].end):
        for one in (before, after):
            if (
                one.nbytes >= max(MIB, plan.peak_allocated // _SHARE, largest.nbytes + 1 if largest else 0)
                and one.is_live_at(plan.peak_operation)
                and _last_read(operations, one) < plan.peak_operation
            ):
                largest = Kept(nbytes=one.nbytes, call=operations[one.made].call)
    return largest


def uncast_gradients(run: GhostRun, plan: MemoryPlan) -> int:
    """Return the bytes at the peak of low-precision gradients that are being cast to the dtype of their weights."""
    operations = run.trace.operations
    casts = {
        operations[one.made].producers[0]
        for one in _stays(run)
        if one.made < len(operations)
        and operations[one.made].call.kind is Kind.CAST
        and operations[one.made].producers
        and run.owners.get(one.storage) == GRADIENTS
    }
    return sum(
        one.nbytes
        for one in _stays(run)
        if one.is_live_at(plan.peak_operation)
        and one.made < len(operations)
        and operations[one.made].call.phase is Phase.BACKWARD
        and any(meta.dtype in LOW_PRECISION for meta in operations[one.made].call.outputs)
        and casts & _aliases(operations, one.made, plan.peak_operation)
    )


def _stays(run: GhostRun) -> list[Stay]:
    freed = {event.storage: event.operation for event in run.memory if event.nbytes < 0}
    return [
        Stay(storage=one.storage, nbytes=one.nbytes, made=one.operation, freed=freed.get(one.storage))
        for one in run.memory
        if one.nbytes > 0
    ]


def _bound_anew(run: GhostRun, first: int, end: int) -> Iterator[tuple[Stay, Stay]]:
    """Yield tensors of one call, one after the other, where a variable held the earlier one until the later was made.

    The later one was made in operations `first` to `end`.
    """
    operations = run.trace.operations
    starts = backward_starts(operations)
    previous: dict[tuple[int, int], Stay] = {}
    for one in _stays(run):
        if one.made >= end:
            return
        call = operations[one.made].call
        if call.phase is not Phase.FORWARD or one.storage in run.owners or one.storage < 0:
            continue
        key = call.index, one.nbytes
        before = previous.get(key)
        previous[key] = one
        if before is None or one.made < first or before.freed is None or before.freed < one.made:
            continue
        start = next((index for index in starts if before.made < index < one.made), None)
        following = next((index for index in starts if index > one.made), len(operations))
        if start is None or before.freed >= following:
            continue
        if _last_read(operations, before) < _next_forward(operations, start):
            yield before, one


def _next_forward(operations: Sequence[Operation], start: int) -> int:
    return next(one.index for one in operations[start:] if one.call.phase is Phase.FORWARD)


def _last_read(operations: Sequence[Operation], stay: Stay) -> int:
    """Return the last operation that reads a storage, through views too."""
    names = _aliases(operations, stay.made, len(operations))
    end = len(operations) if stay.freed is None else stay.freed
    return max(
        (one.index for one in operations[stay.made + 1 : end] if not names.isdisjoint(one.producers)),
        default=stay.made,
    )


def _aliases(operations: Sequence[Operation], made: int, end: int) -> set[int]:
    """Return the operation that made a tensor, and those that made views of it or wrote to it."""
    found = {made}
    for one in operations[made + 1 : end]:
        is_alias = one.call.kind is Kind.VIEW or one.call.is_in_place
        if is_alias and one.producers and one.producers[0] in found:
            found.add(one.index)
    return found
