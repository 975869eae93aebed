"""MZ24x: weights, states and averages that are stored too coarsely to move."""

from collections import Counter
from collections.abc import Iterator, Sequence

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView
from mezzotint.trace.record import LOW_PRECISION, Event, Operation, Phase, UpdateRecord, parameter_producer

_MANY = 0.25
_MOST = 0.5
_LONG_SUM = 8  # additions to 8 significant bits, after which the last one has lost 3 of its own
_UPDATES = ("addcdiv_", "add_", "sub_", "_fused_adam", "_fused_sgd", "_fused_adagrad")  # in place, by an optimizer
_SUMS = frozenset({"add_", "add", "_foreach_add_"})


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
        yield from _unmeasured_updates(view, compensated)
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


def _unmeasured_updates(view: TraceView, compensated: set[str]) -> Iterator[Finding]:
    """Updates that are rounded to nearest in a low-precision weight, on a simulated GPU, which has no numbers."""
    if not str(view.trace.facts.get("device", "")).startswith("ghost"):
        return
    names = {parameter_producer(one.index): one.name for one in view.trace.parameters}
    found: dict[str, tuple[str, Operation]] = {}
    for operation in view.trace.operations:
        call = operation.call
        is_update = call.phase is Phase.OPTIMIZER and call.name.removeprefix("_foreach_").startswith(_UPDATES)
        for producer, meta in zip(operation.producers, call.inputs if is_update else (), strict=False):
            name = names.get(producer)
            if name is not None and meta.is_low and name not in compensated:
                found.setdefault(name, (meta.dtype, operation))
    if not found:
        return
    dtype, operation = next(iter(found.values()))
    yield view.finding(
        LOST_UPDATES.code,
        Severity.WARNING,
        f"{len(found)} {dtype} weights are updated in {dtype} and rounded to nearest: small updates change nothing; "
        "how many do so cannot be said without numbers",
        operation=operation,
        advice="keep float32 weights and let autocast lower the operations, or use stochastic rounding or Kahan "
        "compensation: mz.Engine(policy='bf16-stochastic')",
        evidence={"dtype": dtype, "weights": list(found)[:8]},
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
            by_place.setdefault((one.site[:1], one.op), []).append(one)
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
        saved = operation.call.outputs[1:2]
        if saved and not saved[0].numel:
            continue  # nothing is averaged in evaluation
        if view.trace.facts.get("device", "cpu") != "cpu" and not any(
            one.call.module == operation.call.module and "batch_norm" in one.call.name
            for one in view.calls(phases=(Phase.BACKWARD,))
        ):
            continue  # frozen, most likely in evaluation, which a GPU's outputs do not show
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


def _rounded_sums(view: TraceView) -> Iterator[Finding]:
    """Gradients that are added up in a compact format: over micro-batches, or over processes."""
    added: Counter[int] = Counter()
    last: dict[int, Event] = {}
    for event in view.events("backward"):
        if event.facts.get("num_rounded"):
            added[event.step] += 1
            last[event.step] = event
    if added:
        step, times = added.most_common(1)[0]
        dtype = next((one.grad_dtype for one in view.trace.parameters if one.grad_dtype not in (None, "float32")), None)
        yield _rounded_sum(view, f"{dtype or 'compact'} gradients", times + 1, event=last[step])
    runs: dict[int, int] = {}
    longest: tuple[int, Operation] | None = None
    for operation in view.trace.operations:
        call = operation.call
        if call.name not in _SUMS or call.phase is not Phase.OTHER or not call.outputs or not call.outputs[0].is_low:
            continue
        before = view.operation(operation.producers[0]) if operation.producers else None
        is_same = before is not None and before.call is call and before.step == operation.step
        runs[operation.index] = runs.get(before.index, 1) + 1 if is_same and before is not None else 1
        if longest is None or runs[operation.index] > longest[0]:
            longest = runs[operation.index], operation
    if longest is not None and longest[0] >= _LONG_SUM:
        yield _rounded_sum(view, f"{longest[1].call.outputs[0].dtype} numbers", longest[0], operation=longest[1])
    for operation in view.trace.operations:
        call = operation.call
        if call.op.startswith(("c10d.allreduce", "c10d.reduce", "_c10d_functional.all_reduce")):
            low = next((meta.dtype for meta in call.inputs if meta.is_low), None)
            if low is not None and call.phase is not Phase.FORWARD:
                yield view.finding(
                    ROUNDED_SUMS.code,
                    Severity.WARNING if low == "float16" else Severity.INFO,
                    f"gradients are added up over processes in {low}: each addition rounds"
                    + (", and sums above 65504 are infinite" if low == "float16" else ""),
                    operation=operation,
                    advice="reduce in float32: no compression hook, MixedPrecisionPolicy(reduce_dtype=torch.float32)",
                    evidence={"dtype": low},
                )
                return


def _rounded_sum(
    view: TraceView, what: str, times: int, *, operation: Operation | None = None, event: Event | None = None
) -> Finding:
    return view.finding(
        ROUNDED_SUMS.code,
        Severity.WARNING if times >= _LONG_SUM else Severity.INFO,
        f"{times} {what} are added up one after the other and rounded each time: the small ones are lost in the sum",
        operation=operation,
        event=event,
        advice="add them up in float32",
        evidence={"additions": times},
    )


def _overwritten_masters(view: TraceView) -> Iterator[Finding]:
    """A float32 weight of the optimizer that a compact tensor is written into, step after step."""
    trained = {parameter_producer(one.index): one for one in view.trace.parameters if one.optimizer is not None}
    steps: dict[int, set[int]] = {}
    for operation in view.trace.operations:
        call = operation.call
        if call.name not in ("copy_", "_foreach_copy_") or call.phase is Phase.BACKWARD or len(call.inputs) < 2:
            continue
        half = len(call.inputs) // 2
        for producer, target, source in zip(operation.producers, call.inputs[:half], call.inputs[half:], strict=False):
            if producer in trained and target.dtype == "float32" and source.is_low:
                found = steps.setdefault(producer, set())
                found.add(operation.step)
                if len(found) > 1:
                    weight = trained[producer]
                    yield view.finding(
                        OVERWRITTEN_MASTERS.code,
                        Severity.ERROR,
                        f"the float32 weight {weight.name} is overwritten by {source.dtype} numbers in every step: "
                        "what the optimizer adds below their spacing is lost again",
                        operation=operation,
                        module=weight.name.rpartition(".")[0] or None,
                        advice="copy from the float32 weights to the compact ones only",
                        evidence={"weight": weight.name, "dtype": source.dtype},
                    )
                    return


def _rounded_checkpoint(view: TraceView) -> Iterator[Finding]:
    """A checkpoint to resume from whose weights are coarser than those that are trained."""
    trained = [one for one in view.trace.parameters if one.optimizer is not None]
    wide = {(tuple(one.shape), one.name.rpartition(".")[2]) for one in trained if one.dtype == "float32"}
    for event in view.events("save"):
        if "optimizer" not in event.facts["holds"] or not wide:
            continue
        saved = {
            key: dtypes
            for (key, shape), dtypes in event.facts["tensors"].items()
            if (shape, key.rpartition(".")[2]) in wide
        }
        if any("float32" in dtypes for dtypes in saved.values()):
            continue  # the float32 weights are there
        low = {key: min(dtypes) for key, dtypes in saved.items() if dtypes <= LOW_PRECISION}
        if low:
            name, dtype = next(iter(low.items()))
            yield view.finding(
                ROUNDED_CHECKPOINT.code,
                Severity.WARNING,
                f"the checkpoint holds the optimizer's state, and the float32 weights rounded to {dtype}: {name}"
                + (f" and {len(low) - 1} others" if len(low) > 1 else "")
                + "; a resumed run starts from other weights",
                event=event,
                advice="save float32 weights to resume from; export a compact copy apart",
                evidence={"tensors": dict(list(low.items())[:10])},
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
ROUNDED_SUMS = Rule(
    code="MZ246",
    name="low-precision-sums",
    summary="gradients are added up in a compact format",
    severity=Severity.WARNING,
    why="Each addition rounds to 8 bits: the sixteenth micro-batch adds to a sum sixteen times its size.",
    bad="for micro in batch:  # a bfloat16 model\n    (loss(micro) / 16).backward()",
    good="for micro in batch:\n    (loss(micro) / 16).backward()\n    for a, p in zip(sums_fp32, params):\n"
    "        a += p.grad; p.grad = None",
    fix="Add up gradients in float32, over micro-batches and over processes.",
    sources=("https://github.com/pytorch/pytorch/issues/106395",),
    check=_rounded_sums,
)
OVERWRITTEN_MASTERS = Rule(
    code="MZ247",
    name="overwritten-masters",
    summary="float32 weights are overwritten by their compact copies",
    severity=Severity.ERROR,
    why="Master weights hold the small updates that the compact copy cannot; copied back, they are rounded away.",
    bad="for master, p in pairs: master.data.copy_(p.data)  # p is bfloat16\noptimizer.step()",
    good="optimizer.step()\nfor master, p in pairs: p.data.copy_(master.data)",
    fix="Copy from the float32 weights to the compact ones only.",
    check=_overwritten_masters,
)
ROUNDED_CHECKPOINT = Rule(
    code="MZ248",
    name="rounded-checkpoint",
    summary="a checkpoint to resume from holds rounded weights",
    severity=Severity.WARNING,
    why="The optimizer's state belongs to the float32 weights; after a resume every weight is off by up to 0.4 %.",
    bad="torch.save({'model': {k: v.half() for k, v in m.state_dict().items()}, 'optim': o.state_dict()}, f)",
    good="torch.save({'model': m.state_dict(), 'optim': o.state_dict()}, f)",
    fix="Save float32 weights; export a compact copy apart.",
    check=_rounded_checkpoint,
)
RULES = (
    LOST_UPDATES, LOST_AVERAGES, STUCK_COUNTER, LOST_STATES, LOW_STATISTICS, ROUNDED_SUMS, OVERWRITTEN_MASTERS,
    ROUNDED_CHECKPOINT,
)  # fmt: skip
