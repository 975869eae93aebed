"""MZ27x: what rounding changed, measured by computing it again in float32."""

from collections.abc import Iterator

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.dtype_flow import DIFFERENCE_OF_SQUARES
from mezzotint.rules.trace.view import TraceView, is_product, is_relay
from mezzotint.trace.record import Call, Kind, Operation, Phase, Rounding

_NOTICED = 0.01  # share of rows that choose otherwise, of numbers that collapse
_EQUAL = frozenset({"eq", "ne"})
_USES = 4  # operations from a decision to what it is used for


def _found(view: TraceView, kind: str) -> Iterator[tuple[Rounding, Operation]]:
    """Yield what was measured, the worst execution of each call."""
    worst: dict[int, tuple[Rounding, Operation]] = {}
    for one in view.trace.roundings:
        operation = view.operation(one.operation)
        if one.kind != kind or operation is None:
            continue
        known = worst.get(operation.call.index)
        if known is None or _size(one) > _size(known[0]):
            worst[operation.call.index] = one, operation
    yield from worst.values()


def _size(one: Rounding) -> float:
    return one.changed / max(1, one.total) or one.relative_error or 0.0


def _low_dtype(call: Call) -> str:
    return next((meta.dtype for meta in (*call.outputs, *call.inputs) if meta.is_low), "low precision")


def _collapsed_grid(view: TraceView) -> Iterator[Finding]:
    for one, operation in _found(view, "grid"):
        call = operation.call
        dtype = _low_dtype(call)
        is_operand = call.kind is Kind.CAST and call.autocast is not None and _feeds_matmul(view, operation)
        yield view.finding(
            COLLAPSED_GRID.code,
            Severity.INFO if is_operand else Severity.WARNING,
            f"of {one.total} evenly spaced numbers {one.total - one.changed} are distinct in {dtype}, and they are off "
            f"by up to {one.relative_error or 0.0:.0%} of the distance between neighbours",
            operation=operation,
            advice="make grids, time steps and fractions in float32 and keep them there until they are used",
            evidence={
                "asked": one.total,
                "distinct": one.total - one.changed,
                "dtype": dtype,
                "off": one.relative_error,
            },
        )


def _feeds_matmul(view: TraceView, operation: Operation) -> bool:
    """Whether autocast cast it for a matmul: an input feature, rounded as all activations are."""
    level = [operation.index]
    for _ in range(_USES):
        following: list[int] = []
        for index in level:
            for use in view.consumers.get(index, ()):
                found = view.operation(use)
                if found is not None and is_product(found.call):
                    return True
                if found is not None and found.call.kind is Kind.VIEW:
                    following.append(use)
        level = following
    return False


def _rounded_decision(view: TraceView) -> Iterator[Finding]:
    for one, operation in _found(view, "decision"):
        if not one.changed or not _is_used(view, operation):
            continue
        call = operation.call
        dtype = _low_dtype(call)
        yield view.finding(
            ROUNDED_DECISION.code,
            Severity.WARNING if _size(one) >= _NOTICED else Severity.INFO,
            f"{call.name} decides on numbers that were rounded to {dtype}: {one.changed} of {one.total} decisions "
            f"({_size(one):.1%}) are others in float32",
            operation=operation,
            advice="decide on the float32 numbers and cast afterwards",
            evidence={"decisions": one.total, "changed": one.changed, "share": _size(one), "dtype": dtype},
        )


def _is_used(view: TraceView, operation: Operation) -> bool:
    """Whether a decision goes into the training: one that is only compared with labels is a figure for a log."""
    level = [operation.index]
    for depth in range(_USES):
        following: list[int] = []
        for index in level:
            for use in view.consumers.get(index, ()):
                found = view.operation(use)
                if found is None or found.call.name in _EQUAL:
                    continue
                if found.call.phase is Phase.FORWARD and not is_relay_of_choice(found.call):
                    return True
                if depth + 1 < _USES and found.call.phase is not Phase.BACKWARD:
                    following.append(use)
        level = following
    return False


def is_relay_of_choice(call: Call) -> bool:
    """Whether a call only lays out, casts or counts what was decided."""
    is_index = call.name in ("gather", "index", "index_select")
    return (is_relay(call) and not is_index) or call.name in ("sum", "mean", "_local_scalar_dense")


def _cancellation(view: TraceView) -> Iterator[Finding]:
    variances = {(one.path, one.line) for one in DIFFERENCE_OF_SQUARES.check(view)}
    for one, operation in _found(view, "cancellation"):
        call = operation.call
        dtype = _low_dtype(call)
        found = view.finding(
            CANCELLATION.code,
            Severity.WARNING,
            f"{call.name} in {dtype} is off by {one.relative_error or 0.0:.0%} of its result, measured in float32: the "
            "numbers that it subtracts are nearly equal, and their difference is mostly rounding",
            operation=operation,
            advice="subtract in float32, from operands that were computed in float32; distances from differences "
            "(cdist with compute_mode='donot_use_mm_for_euclid_dist')",
            evidence={"relative_error": one.relative_error, "dtype": dtype},
        )
        if (found.path, found.line) not in variances:
            yield found


COLLAPSED_GRID = Rule(
    code="MZ271",
    name="collapsed-grid",
    summary="evenly spaced numbers are finer than their format",
    severity=Severity.WARNING,
    why="Between 0.5 and 1 bfloat16 has 128 numbers and float16 1024: of 512 coordinates from -1 to 1 neighbours are "
    "equal, and what is sampled or embedded at them is too.",
    bad="lines = torch.linspace(-1, 1, 512, dtype=torch.bfloat16)",
    good="lines = torch.linspace(-1, 1, 512)",
    fix="Keep grids, time steps and fractions in float32.",
    sources=("https://github.com/pytorch/pytorch/issues/94733",),
    check=_collapsed_grid,
)
ROUNDED_DECISION = Rule(
    code="MZ272",
    name="rounded-decision",
    summary="a choice is made on numbers that were rounded before",
    severity=Severity.WARNING,
    why="Rounded numbers tie, and ties are broken by their order: other experts, other neighbours, other tokens are "
    "chosen than in float32.",
    bad="probs = logits.float().softmax(-1).to(torch.bfloat16)\nweight, experts = probs.topk(4)",
    good="probs = logits.float().softmax(-1)\nweight, experts = probs.topk(4)\nweight = weight.to(torch.bfloat16)",
    fix="Choose first and cast afterwards.",
    sources=("https://github.com/vllm-project/vllm/pull/14027",),
    check=_rounded_decision,
)
CANCELLATION = Rule(
    code="MZ273",
    name="cancellation",
    summary="a difference in low precision is mostly rounding",
    severity=Severity.WARNING,
    why="bfloat16 keeps 2 to 3 digits: of 100.5 - 100.25 nothing is left. Differences of cumulative sums, and "
    "distances by |a|^2 + |b|^2 - 2ab, subtract numbers that share their leading digits.",
    bad="totals = x_bf16.cumsum(0); window = totals[8:] - totals[:-8]",
    good="totals = x_bf16.float().cumsum(0); window = totals[8:] - totals[:-8]",
    fix="Compute operands and difference in float32.",
    sources=("https://github.com/pytorch/pytorch/issues/136748",),
    check=_cancellation,
)
RULES = (COLLAPSED_GRID, ROUNDED_DECISION, CANCELLATION)
