"""A trace as the rules look at it: steps, ancestry of tensors, places, and the policy it is judged by."""

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

from mezzotint.findings import Finding, Severity
from mezzotint.formats.catalog import find_format
from mezzotint.formats.spec import FloatFormat
from mezzotint.policy.policy import Policy
from mezzotint.trace.places import user_line
from mezzotint.trace.record import Call, Event, Frame, Kind, Operation, Phase, Site, Trace

PRODUCTS = frozenset(
    {
        "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "linear", "matmul", "_scaled_mm",
        "_grouped_mm", "convolution", "convolution_backward", "conv1d", "conv2d", "conv3d", "mkldnn_convolution",
        "mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_cudnn_rnn", "_cudnn_rnn_backward", "cudnn_convolution",
        "mkldnn_linear", "linear_backward", "einsum", "bilinear", "_trilinear", "addr",
    }
)  # fmt: skip
_ATTENTION = "scaled_dot_product"

# operations that hand on the same numbers, cast or laid out differently
RELAYED = frozenset(
    {"_to_copy", "to", "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "transpose", "t", "permute",
     "slice", "select", "clone", "detach", "alias", "contiguous", "repeat", "as_strided", "unbind", "split", "chunk",
     "copy_", "lift_fresh", "gather", "index_select", "index", "_reshape_alias", "unfold", "narrow", "cat", "stack",
     "flip", "roll", "split_with_sizes", "flatten", "movedim", "masked_fill"}
)  # fmt: skip


class TraceView:
    """What rules ask of a trace."""

    def __init__(self, trace: Trace, policy: Policy, *, is_declared: bool) -> None:
        self.trace = trace
        self.policy = policy
        self.is_declared = is_declared

    @cached_property
    def first(self) -> dict[int, Operation]:
        """The first execution of each call, by the call's index."""
        found: dict[int, Operation] = {}
        for operation in self.trace.operations:
            found.setdefault(operation.call.index, operation)
        return found

    @cached_property
    def counts(self) -> dict[int, int]:
        """How often each call was executed."""
        return self.trace.counts()

    @cached_property
    def consumers(self) -> dict[int, list[int]]:
        """The operations that read what an operation wrote."""
        found: dict[int, list[int]] = {}
        for operation in self.trace.operations:
            for producer in set(operation.producers):
                if producer >= 0:
                    found.setdefault(producer, []).append(operation.index)
        return found

    @cached_property
    def backward_places(self) -> set[tuple[str, Site, str | None]]:
        """Module, lines and format of every product in backward: of those in forward that are trained."""
        return {
            (one.call.module, one.call.site, one.call.format)
            for one in self.first.values()
            if one.call.phase is Phase.BACKWARD and is_product(one.call)
        }

    def operation(self, index: int) -> Operation | None:
        """Return an operation by its index, None for what came from outside."""
        return self.trace.operations[index] if 0 <= index < len(self.trace.operations) else None

    def calls(self, *names: str, phases: Iterable[Phase] | None = None) -> Iterator[Operation]:
        """Yield the first execution of each call with one of these names, in the order of execution."""
        wanted = None if phases is None else frozenset(phases)
        for operation in self.first.values():
            call = operation.call
            if (not names or call.name in names) and (wanted is None or call.phase in wanted):
                yield operation

    def events(self, *names: str) -> Iterator[Event]:
        """Yield the events with one of these names."""
        return (event for event in self.trace.events if event.name in names)

    def ancestors(
        self, operation: Operation, *, through: Callable[[Call], bool], depth: int = 30
    ) -> Iterator[Operation]:
        """Yield what an operation's inputs came from, back through calls that `through` accepts."""
        seen: set[int] = set()
        level = list(operation.producers)
        for _ in range(depth):
            following: list[int] = []
            for index in level:
                found = self.operation(index)
                if found is None or index in seen:
                    continue
                seen.add(index)
                yield found
                if through(found.call):
                    following.extend(found.producers)
            level = following

    def finding(
        self,
        rule: str,
        severity: Severity,
        message: str,
        *,
        operation: Operation | None = None,
        event: Event | None = None,
        site: Site | None = None,
        module: str | None = None,
        advice: str | None = None,
        fix: str | None = None,
        evidence: dict[str, Any] | None = None,
    ) -> Finding:
        """Return a finding with the place filled in from an operation, an event or a site."""
        call = operation.call if operation is not None else None
        where = site or (call.site if call is not None else None) or (event.site if event is not None else None) or ()
        frame = user_line(where)
        return Finding(
            code=rule,
            severity=severity,
            message=message,
            path=frame.path if frame else None,
            line=frame.line if frame else None,
            module=module or (call.module if call is not None else None) or (event.module if event else None) or None,
            op=call.op if call is not None else None,
            phase=str(call.phase) if call is not None else None,
            evidence={**(evidence or {}), **_callers(where, frame)},
            advice=advice,
            fix=fix,
        )


def _callers(site: Site, frame: Frame | None) -> dict[str, Any]:
    """Return the lines that led to a place, as evidence."""
    others = [f"{one.path}:{one.line}" for one in site if one != frame]
    return {"called_from": others} if others else {}


def is_product(call: Call) -> bool:
    """Whether an operation multiplies matrices: what autocast lowers."""
    return call.name.removesuffix("_") in PRODUCTS or _ATTENTION in call.name


def is_relay(call: Call) -> bool:
    """Whether an operation hands on the numbers it reads."""
    return call.kind in (Kind.VIEW, Kind.CAST) or call.name in RELAYED


def spec(dtype: str) -> FloatFormat:
    """Return the format that a floating-point dtype stores."""
    return find_format(dtype)


def is_in(site: Site, other: Site) -> bool:
    """Whether two places share a line."""
    return bool({(one.path, one.line) for one in site} & {(one.path, one.line) for one in other})
