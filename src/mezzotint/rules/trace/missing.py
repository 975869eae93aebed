"""MZ237, MZ238: steps without gradients, and steps that the gradient scaler skips."""

from collections.abc import Iterator, Sequence
from math import isfinite

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView
from mezzotint.trace.places import user_line
from mezzotint.trace.record import Event, Kind, Operation, StepRecord

_SCALE_OF_A_SEARCH = 2.0  # a scale below this one is not being sought any more
_MANY = 8  # steps after which a search should have ended


def _missing_gradients(view: TraceView) -> Iterator[Finding]:
    seen: set[object] = set()
    for event in view.events("scaler.step"):
        if event.facts["is_enabled"] and "error" in event.facts and not event.facts["num_grads"]:
            if event.site in seen or not _was_scaled(view, event):
                continue
            seen.add(event.site)
            yield view.finding(
                MISSING_GRADIENTS.code,
                Severity.ERROR,
                f"backward reached no parameter of {event.facts['optimizer']} in step {event.step}, and scaler.step() "
                f"raises{_reason(view, event)}",
                event=event,
                advice="skip backward, scaler.step() and scaler.update() where there is nothing to learn from, or keep "
                "the graph: loss = prediction.sum() * 0",
                evidence={"step": event.step, "error": event.facts["error"]},
            )
    yield from _never_reached(view)


def _never_reached(view: TraceView) -> Iterator[Finding]:
    """An optimizer that steps, and whose parameters never have a gradient."""
    steps: dict[int, list[Event]] = {}
    for event in view.events("optimizer.step"):
        steps.setdefault(event.facts["optimizer_id"], []).append(event)
    for events in steps.values():
        if any(event.facts["num_grads"] for event in events) or not events[0].facts["is_trained"]:
            continue
        if not any(True for _ in view.events("backward")):
            continue
        yield view.finding(
            MISSING_GRADIENTS.code,
            Severity.WARNING,
            f"none of the {events[0].facts['num_weights']} parameters of {events[0].facts['optimizer']} has a gradient "
            f"in any of its {len(events)} steps: nothing is trained{_reason(view, events[0])}",
            event=events[0],
            advice="make the optimizer from the parameters that forward uses, after the model was cast or moved, and "
            "leave no detach() or no_grad() between them and the loss",
            evidence={"steps": len(events), "num_weights": events[0].facts["num_weights"]},
        )
    missing = [one.name for one in view.trace.parameters if one.optimizer is not None and one.grad_dtype is None]
    reached = [one for one in view.trace.parameters if one.optimizer is not None and one.grad_dtype is not None]
    if missing and reached:
        yield view.finding(
            MISSING_GRADIENTS.code,
            Severity.INFO,
            f"{len(missing)} of {len(missing) + len(reached)} parameters of the optimizers have no gradient when their "
            f"optimizer steps: {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}",
            module=missing[0].rpartition(".")[0] or None,
            advice="leave out of the optimizer what is frozen; nothing else should be without a gradient",
            evidence={"parameters": missing[:10]},
        )


def _was_scaled(view: TraceView, event: Event) -> bool:
    return any(one.facts["scaler"] == event.facts["scaler"] for one in view.events("scaler.scale"))


def _reason(view: TraceView, event: Event) -> str:
    """Say what the loss of the last backward pass was made of, if it was made of nothing."""
    before = [one for one in view.events("backward") if one.end <= event.operation and not one.facts["is_nested"]]
    if not before:
        return ""
    if before[-1].step != event.step:
        return ": no backward pass ran in this step"
    for maker in before[-1].facts["makers"]:
        root = view.operation(maker)
        if root is None:
            continue
        for one in (root, *view.ancestors(root, through=lambda call: call.kind is not Kind.MAKE, depth=8)):
            if one.call.kind is Kind.MAKE and all(meta.numel == 1 for meta in one.call.outputs):
                frame = user_line(one.call.site)
                return f": the loss is a constant made by {one.call.name}" + (f" in line {frame.line}" if frame else "")
    return ": no graph leads from the loss to them"


def _skipped_steps(view: TraceView) -> Iterator[Finding]:
    steps = view.trace.steps
    skipped = [step for step in steps if step.is_skipped]
    if not skipped:
        return
    others = [step for step in steps if not step.is_skipped]
    last = [event for event in view.events("scaler.step") if event.facts.get("is_skipped")]
    reason, operation = _common(view, skipped, others)
    scales = [one.facts["scale"] for one in view.events("scaler.scale") if one.facts["scale"]]
    is_low = bool(scales) and scales[-1] < _SCALE_OF_A_SEARCH
    is_often = len(steps) >= _MANY and 2 * len(skipped) >= len(steps)
    yield view.finding(
        SKIPPED_STEPS.code,
        Severity.WARNING if reason or is_low or is_often else Severity.INFO,
        f"the scaler skips {len(skipped)} of {len(steps)} steps ({len(skipped) / len(steps):.0%}) for gradients that "
        "are not finite"
        + (f": {reason}" if reason else "; a scaler that searches its scale does that in its first steps")
        + (f", and its scale has fallen to {scales[-1]:g}" if is_low else ""),
        event=last[-1] if last else None,
        operation=operation,
        advice="no loss scale mends this: find what makes the number that is not finite, or the batch it comes from"
        if reason or is_low
        else None,
        evidence={
            "skipped": [step.index for step in skipped],
            "steps": len(steps),
            "losses": [step.loss for step in skipped],
            "scale": scales[-1] if scales else None,
        },
    )


def _common(
    view: TraceView, skipped: Sequence[StepRecord], others: Sequence[StepRecord]
) -> tuple[str, Operation | None]:
    """Return what all skipped steps have and the others lack, with the operation that shows it."""
    if all(step.loss is not None and not isfinite(step.loss) for step in skipped):
        return "their loss is not finite before it is scaled", None
    made = {view.trace.operations[birth.operation].call.index: birth for birth in view.trace.births}
    born = [{one.call.index for one in _operations(view, step) if one.call.index in made} for step in skipped]
    wide = [index for index in set.intersection(*born) if made[index].wide == "not finite"] if born else []
    if wide:
        operation = view.first[wide[0]]
        return f"{operation.call.name} makes them, and would in float32 too", operation
    for step_calls in (_empty_calls(view, skipped, others),):
        if step_calls is not None:
            return f"only they have an empty tensor, at {step_calls.call.name}", step_calls
    if others and all(step.loss == 0 for step in skipped) and not any(step.loss == 0 for step in others):
        return "only their loss is 0", None
    return "", None


def _empty_calls(view: TraceView, skipped: Sequence[StepRecord], others: Sequence[StepRecord]) -> Operation | None:
    if not others:
        return None
    usual = {one.call.index for step in others for one in _operations(view, step)}
    found: list[dict[int, Operation]] = []
    for step in skipped:
        found.append(
            {
                one.call.index: one
                for one in _operations(view, step)
                if one.call.index not in usual
                and one.call.inputs
                and any(meta.numel == 0 for meta in (*one.call.inputs, *one.call.outputs))
            }
        )
    common = set.intersection(*(set(one) for one in found))
    return found[0][min(common)] if common else None


def _operations(view: TraceView, step: StepRecord) -> Sequence[Operation]:
    return view.trace.operations[step.first : step.end]


MISSING_GRADIENTS = Rule(
    code="MZ237",
    name="missing-gradients",
    summary="an optimizer steps, and backward reached none of its parameters",
    severity=Severity.ERROR,
    why="A constant loss (a batch without targets), a detached graph or parameters that were replaced by a cast leave "
    "every gradient None. A gradient scaler raises then, because it found nothing to check; an optimizer does nothing.",
    bad="loss = torch.zeros((), requires_grad=True)  # no valid target in this batch\n"
    "scaler.scale(loss).backward()\nscaler.step(optimizer)",
    good="loss = prediction.float().sum() * 0  # keeps the graph\nscaler.scale(loss).backward()\n"
    "scaler.step(optimizer)",
    fix="Skip the step, or keep the graph.",
    sources=("https://github.com/huggingface/transformers/issues/24003",),
    check=_missing_gradients,
)
SKIPPED_STEPS = Rule(
    code="MZ238",
    name="skipped-steps",
    summary="the gradient scaler skips steps for a reason that no loss scale removes",
    severity=Severity.WARNING,
    why="A scaler halves its scale until gradients fit. Where the loss is not finite, or an operation divides by "
    "0, every scale fails: these batches are never learned from and the scale falls to 0.",
    bad="loss = (error / mask.sum()).sum()  # a batch without a valid element gives NaN",
    good="loss = (error / mask.sum().clamp(min=1)).sum()",
    fix="Mend the batch or the operation that the finding names.",
    check=_skipped_steps,
)
RULES = (MISSING_GRADIENTS, SKIPPED_STEPS)
