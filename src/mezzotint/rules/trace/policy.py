"""MZ29x: what a declared policy promises, and what ran."""

from collections.abc import Iterator

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView, is_product
from mezzotint.trace.record import MASTER_MARK, Operation, Phase

_TRAINED = (Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD)


def _products(view: TraceView) -> Iterator[Finding]:
    if not view.is_declared:
        return
    wanted = view.policy.compute
    wrong: dict[tuple[str, str], list[Operation]] = {}
    for operation in view.first.values():
        call = operation.call
        if call.phase in _TRAINED and is_product(call) and call.format not in (None, wanted, "float64"):
            wrong.setdefault((call.module, str(call.format)), []).append(operation)
    for (module, dtype), operations in wrong.items():
        phases = sorted({str(one.call.phase) for one in operations})
        yield view.finding(
            OTHER_COMPUTE.code,
            Severity.ERROR,
            f"{operations[0].call.name} of {module or 'the program'} runs in {dtype} ({' and '.join(phases)}); the "
            f"policy says compute={wanted}",
            operation=operations[0],
            advice=f"run it under torch.autocast(dtype=torch.{wanted}), or declare it: keep={module}",
            evidence={"calls": sum(view.counts.get(one.call.index, 0) for one in operations), "phases": phases},
        )


def _stored(view: TraceView) -> Iterator[Finding]:
    if not view.is_declared:
        return
    axes = (("params", "dtype", "weight"), ("reduce", "grad_dtype", "gradient"))
    for axis, field, noun in axes:
        wanted = getattr(view.policy, axis)
        # copies that an optimizer keeps for the model's weights are no weights of the model
        model = [one for one in view.trace.parameters if not one.name.endswith(MASTER_MARK)]
        wrong = [one for one in model if getattr(one, field) not in (None, wanted)]
        if wrong:
            yield view.finding(
                OTHER_STORAGE.code,
                Severity.ERROR,
                f"the {noun} of {wrong[0].name} is {getattr(wrong[0], field)}"
                + (f", and of {len(wrong) - 1} others" if len(wrong) > 1 else "")
                + f"; the policy says {axis}={wanted}",
                module=wrong[0].name.rpartition(".")[0] or None,
                evidence={"tensors": {one.name: getattr(one, field) for one in wrong[:10]}},
            )
    wanted = view.policy.state
    states = {
        f"{one.name}: {key}": dtype
        for one in view.trace.parameters
        for key, dtype in one.states.items()
        if dtype != wanted and key != "step"
    }
    if states:
        first = next(iter(states))
        yield view.finding(
            OTHER_STORAGE.code,
            Severity.ERROR,
            f"the optimizer state {first} is {states[first]}; the policy says state={wanted}",
            evidence={"tensors": dict(list(states.items())[:10])},
        )


def _loss(view: TraceView) -> Iterator[Finding]:
    if not view.is_declared:
        return
    for event in view.events("backward"):
        wrong = [dtype for dtype in event.facts["dtypes"] if dtype != view.policy.loss]
        if wrong and not event.facts["is_nested"]:
            yield view.finding(
                OTHER_LOSS.code,
                Severity.ERROR,
                f"backward starts from a {wrong[0]} tensor; the policy says loss={view.policy.loss}",
                event=event,
            )
            return


def _scaling(view: TraceView) -> Iterator[Finding]:
    if not view.is_declared:
        return
    wants = view.policy.scaling.kind != "none"
    for event in view.events("backward"):
        is_scaled = event.facts["is_scaled"] or event.facts["factor"] >= 2.0
        if wants != is_scaled and not event.facts["is_nested"]:
            yield view.finding(
                OTHER_SCALING.code,
                Severity.ERROR,
                f"the loss is {'scaled' if is_scaled else 'not scaled'}; the policy says scaling={view.policy.scaling}",
                event=event,
            )
            return


OTHER_COMPUTE = Rule(
    code="MZ291",
    name="other-compute-format",
    summary="a product runs in another format than the policy says",
    severity=Severity.ERROR,
    why="A flag is a wish: modules outside the region, in-place products and float32 islands run in another format.",
    bad="policy: compute=bfloat16; x @ w outside autocast",
    good="with torch.autocast('cuda', dtype=torch.bfloat16): x @ w",
    fix="Bring the module into the region, or declare it in the policy.",
    check=_products,
)
OTHER_STORAGE = Rule(
    code="MZ292",
    name="other-storage-format",
    summary="weights, gradients or states are stored in another format than the policy says",
    severity=Severity.ERROR,
    why="A checkpoint's dtype decides the weights' dtype, and the weights' that of gradients and states.",
    bad="policy: params=float32; AutoModel.from_pretrained(bf16_checkpoint)",
    good="AutoModel.from_pretrained(bf16_checkpoint, dtype=torch.float32)",
    fix="Cast the model after loading, or declare what is meant.",
    check=_stored,
)
OTHER_LOSS = Rule(
    code="MZ293",
    name="other-loss-format",
    summary="backward starts from another format than the policy says",
    severity=Severity.ERROR,
    why="The loss is a sum; see MZ201.",
    bad="policy: loss=float32; loss is bfloat16",
    good="loss = criterion(logits.float(), y)",
    fix="Cast to float32 before the loss.",
    check=_loss,
)
OTHER_SCALING = Rule(
    code="MZ294",
    name="other-scaling",
    summary="the loss is scaled and should not be, or the reverse",
    severity=Severity.ERROR,
    why="float16 needs loss scaling, bfloat16 and float32 do not.",
    bad="policy: scaling=dynamic; loss.backward()",
    good="scaler.scale(loss).backward()",
    fix="Use the scaler, or declare scaling=none.",
    check=_scaling,
)
RULES = (OTHER_COMPUTE, OTHER_STORAGE, OTHER_LOSS, OTHER_SCALING)
