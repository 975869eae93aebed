"""MZ24x: weights, states and averages that are stored too coarsely to move."""

from collections.abc import Iterator, Sequence

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView
from mezzotint.trace.record import Phase, UpdateRecord, parameter_producer

_MANY = 0.25
_MOST = 0.5


def _worst_first(records: Sequence[UpdateRecord]) -> list[UpdateRecord]:
    return sorted(records, key=lambda one: one.share_lost, reverse=True)


def _lost_weights(view: TraceView) -> Iterator[Finding]:
    compensated = _compensated(view)
    found = [
        one
        for one in view.trace.updates
        if one.role == "weight" and one.dtype != "float32" and one.name not in compensated
    ]
    # decoupled weight decay is a product of its own; the step is what has to arrive
    steps = [one for one in found if not one.op.endswith(("mul_.Tensor", "mul_.Scalar"))] or found
    count = sum(one.count for one in steps)
    if not count:
        return
    lost = sum(one.lost for one in steps)
    worst = _worst_first(steps)[0]
    share = lost / count
    yield view.finding(
        LOST_UPDATES.code,
        Severity.WARNING if share > _MANY else Severity.INFO,
        f"{share:.0%} of the updates of {worst.dtype} weights are rounded away: they are below half the "
        "distance to the "
        f"next {worst.dtype} number",
        site=worst.site,
        module=worst.module or worst.name.rpartition(".")[0],
        advice="keep float32 weights and let autocast lower the operations, or use stochastic rounding or Kahan "
        "compensation: mz.Engine(policy='bf16-stochastic')",
        evidence={
            "lost": lost,
            "updates": count,
            "dtype": worst.dtype,
            "weights": {one.name: round(one.share_lost, 4) for one in _worst_first(steps)[:8]},
        },
    )


def _compensated(view: TraceView) -> set[str]:
    """Return the weights whose update keeps what rounding dropped: the difference to the stored weight is computed."""
    names = {parameter_producer(one.index): one.name for one in view.trace.parameters}
    found: set[str] = set()
    for operation in view.first.values():
        call = operation.call
        if call.phase is Phase.OPTIMIZER and call.name in ("sub", "sub_", "_foreach_sub_", "_foreach_sub"):
            found.update(names[one] for one in operation.producers if one in names)
    return found


def _lost_copies(view: TraceView) -> Iterator[Finding]:
    by_place: dict[object, list[UpdateRecord]] = {}
    for one in view.trace.updates:
        if one.role == "copy" and one.dtype != "float32" and one.count > one.steps:
            by_place.setdefault(tuple(one.site[:1]), []).append(one)
    for records in by_place.values():
        lost, count = sum(one.lost for one in records), sum(one.count for one in records)
        if lost <= _MOST * count:
            continue
        worst = _worst_first(records)[0]
        yield view.finding(
            LOST_AVERAGES.code,
            Severity.WARNING,
            f"{lost / count:.0%} of the changes of {len(records)} {worst.dtype} tensors that are updated "
            "every step are "
            "rounded away: a running average with a decay near 1 never moves",
            site=worst.site,
            advice="keep averages of weights in float32",
            evidence={
                "lost": lost,
                "updates": count,
                "dtype": worst.dtype,
                "tensors": [one.name for one in records[:8]],
            },
        )


def _stuck_counters(view: TraceView) -> Iterator[Finding]:
    for one in view.trace.updates:
        if one.dtype == "float32" or one.role == "weight" or one.count > one.steps or not one.lost:
            continue
        yield view.finding(
            STUCK_COUNTER.code,
            Severity.WARNING,
            f"a {one.dtype} number that is added to every step no longer moves"
            + (f" ({one.name})" if one.role == "state" else "")
            + f": {one.dtype} counts to {256 if one.dtype == 'bfloat16' else 2048}",
            site=one.site,
            module=one.module or None,
            advice="make counters and running sums float32, or Python numbers",
            evidence={"lost": one.lost, "updates": one.count, "dtype": one.dtype, "name": one.name},
        )
        return


def _lost_states(view: TraceView) -> Iterator[Finding]:
    found = [
        one
        for one in view.trace.updates
        if one.role == "state" and one.dtype != "float32" and one.count > one.steps and one.share_lost > _MOST
    ]
    if found:
        worst = _worst_first(found)[0]
        yield view.finding(
            LOST_STATES.code,
            Severity.WARNING,
            f"{worst.share_lost:.0%} of the changes of the optimizer state {worst.name} ({worst.dtype}) are "
            "rounded away",
            site=worst.site,
            module=worst.module or None,
            advice="keep optimizer states in float32",
            evidence={"states": {one.name: round(one.share_lost, 4) for one in _worst_first(found)[:8]}},
        )


def _low_running_statistics(view: TraceView) -> Iterator[Finding]:
    names = (
        "native_batch_norm",
        "_native_batch_norm_legit",
        "cudnn_batch_norm",
        "_batch_norm_with_update",
        "batch_norm",
    )
    for operation in view.calls(*names, phases=(Phase.FORWARD,)):
        low = [meta for meta in operation.call.inputs[1:] if meta.is_low and len(meta.shape) == 1]
        if len(low) in (2, 4) and len(operation.call.inputs) in (3, 5) and low[-1] == operation.call.inputs[-1]:
            yield view.finding(
                LOW_STATISTICS.code,
                Severity.WARNING,
                f"the running statistics of batch norm are {low[-1].dtype}: with momentum 0.1 or less their average "
                "stops moving early",
                operation=operation,
                advice="keep batch norm layers in float32: module.float() on them after model.half()",
                evidence={"dtype": low[-1].dtype},
            )
            return


LOST_UPDATES = Rule(
    code="MZ241",
    name="lost-updates",
    summary="updates of compact weights are rounded away",
    severity=Severity.WARNING,
    why="bfloat16 has 8 significant bits: an update below 0.2 to 0.4 % of the weight changes nothing.",
    bad="model.to(torch.bfloat16); AdamW(model.parameters(), lr=2e-5)",
    good="model.float(); with torch.autocast('cuda', dtype=torch.bfloat16): ...",
    fix="float32 master weights, stochastic rounding or Kahan compensation.",
    sources=("https://arxiv.org/abs/2010.06192",),
    check=_lost_weights,
)
LOST_AVERAGES = Rule(
    code="MZ242",
    name="lost-averages",
    summary="an average of weights is stored too coarsely to move",
    severity=Severity.WARNING,
    why="(1 - 0.9999) * (w - ema) is below half a unit in the last place of a bfloat16 or float16 average.",
    bad="ema = copy.deepcopy(model_bf16)",
    good="ema = copy.deepcopy(model_bf16).float()",
    fix="Keep the average in float32.",
    check=_lost_copies,
)
STUCK_COUNTER = Rule(
    code="MZ243",
    name="stuck-counter",
    summary="a counter in a compact format has stopped",
    severity=Severity.WARNING,
    why="256 + 1 is 256 in bfloat16, 2048 + 1 is 2048 in float16.",
    bad="state['step'] = torch.tensor(0.0)  # default dtype is bfloat16",
    good="state['step'] = torch.tensor(0.0, dtype=torch.float32)",
    fix="Count in float32 or in Python.",
    check=_stuck_counters,
)
LOST_STATES = Rule(
    code="MZ244",
    name="lost-states",
    summary="optimizer states are stored too coarsely to follow the gradients",
    severity=Severity.WARNING,
    why="exp_avg_sq with beta2 = 0.999 changes by 0.1 % a step, a quarter of bfloat16's spacing.",
    bad="AdamW(model_bf16.parameters())",
    good="AdamW(float32_masters)",
    fix="Keep states in float32.",
    check=_lost_states,
)
LOW_STATISTICS = Rule(
    code="MZ245",
    name="low-precision-running-statistics",
    summary="batch norm's running statistics are compact",
    severity=Severity.WARNING,
    why="They are running averages, which a compact format cannot follow.",
    bad="model.half()",
    good="model.half(); for m in model.modules(): isinstance(m, nn.BatchNorm2d) and m.float()",
    fix="Keep batch norm in float32.",
    check=_low_running_statistics,
)
RULES = (LOST_UPDATES, LOST_AVERAGES, STUCK_COUNTER, LOST_STATES, LOW_STATISTICS)
