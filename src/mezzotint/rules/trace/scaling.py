"""MZ22x: loss scaling out of order."""

from collections.abc import Callable, Iterable, Iterator
from math import log2

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView
from mezzotint.trace.record import Event, Kind, Operation, Phase

_NORMS = frozenset(
    {
        "linalg_vector_norm",
        "norm",
        "_foreach_norm",
        "pow",
        "square",
        "mul",
        "abs",
        "_foreach_max",
        "_foreach_abs",
        "dot",
    }
)
_SHRINKS = frozenset({"mul_", "_foreach_mul_", "div_", "_foreach_div_", "clamp_", "clamp_min_", "clamp_max_",
                      "_foreach_clamp_max_", "_foreach_clamp_min_"})  # fmt: skip
_FOLLOWED = 4  # operations from a gradient to the weight that it moves
_CALLED = {"scaler.unscale": "scaler.unscale_", "scaler.step": "scaler.step"}
_LEAST_SCALE = 64.0  # a power of two from here on, on a float16 loss, is a loss scale and no weight
_ADDS = frozenset({"add_", "sub_", "_foreach_add_", "_foreach_sub_", "addcmul_", "add", "sub"})
_BY_HAND = 2.0  # a root multiplied by this much or more is taken for one that is scaled by hand


def _clipped_while_scaled(view: TraceView) -> Iterator[Finding]:
    seen: set[object] = set()
    for event in view.events("clip"):
        if event.facts["num_scaled"] and event.site not in seen and not _is_unscaled_by_hand(view, event):
            seen.add(event.site)
            yield view.finding(
                CLIPPED_WHILE_SCALED.code,
                Severity.ERROR,
                f"{event.facts['function']} clips {event.facts['num_scaled']} gradients that are still multiplied by "
                f"the loss scale{_scale_text(view, event)}: the norm it compares is too large by that factor",
                event=event,
                advice="call scaler.unscale_(optimizer) right before",
                evidence={"num_scaled": event.facts["num_scaled"], "scale": _scale_at(view, event)},
            )
    yield from _clipped_by_hand(view)


def _clipped_by_hand(view: TraceView) -> Iterator[Finding]:
    """A norm of scaled gradients, then a factor on them, without torch's clip functions and without the scale."""
    if any(True for _ in view.events("scaler.get_scale")):
        return  # the scale was asked for: the program unscales by hand
    clips = {(event.step, frame.path, frame.line) for event in view.events("clip") for frame in event.site}
    reads = [
        one
        for one in (view.operation(index) for index in view.trace.scaled_reads)
        if one is not None and not any((one.step, frame.path, frame.line) in clips for frame in one.call.site)
    ]
    measured: dict[int, bool] = {}
    seen: set[object] = set()
    for operation in reads:
        call = operation.call
        if call.phase is not Phase.OTHER:
            continue
        if call.name in _NORMS and not call.is_in_place:
            measured[operation.step] = True
        elif call.name in _SHRINKS and (measured.get(operation.step) or "clamp" in call.name) and call.site not in seen:
            seen.add(call.site)
            yield view.finding(
                CLIPPED_WHILE_SCALED.code,
                Severity.ERROR,
                f"{call.name} limits gradients that are still multiplied by the loss scale",
                operation=operation,
                advice="call scaler.unscale_(optimizer) before gradients are measured or changed",
            )


def _scale_at(view: TraceView, event: Event) -> float | None:
    scales = [one.facts.get("scale") for one in view.events("scaler.scale") if one.operation <= event.operation]
    return scales[-1] if scales else None


def _scale_text(view: TraceView, event: Event) -> str:
    scale = _scale_at(view, event)
    return f" ({scale:g})" if scale else ""


def _asked_for_scale(view: TraceView, first: int, end: int) -> bool:
    return any(first <= one.operation <= end for one in view.events("scaler.get_scale"))


def _is_unscaled_by_hand(view: TraceView, event: Event) -> bool:
    """Whether the program asked for the scale since the last backward pass: it takes it off by itself."""
    before = [one for one in view.events("backward") if one.end <= event.operation]
    return bool(before) and _asked_for_scale(view, before[-1].operation, event.operation)


def _applied_while_scaled(view: TraceView) -> Iterator[Finding]:
    yield from _stepped_while_scaled(view)
    yield from _scaled_by_hand(view)
    yield from _moved_while_scaled(view)


def _stepped_while_scaled(view: TraceView) -> Iterator[Finding]:
    seen: set[object] = set()
    for event in view.events("optimizer.step"):
        if not event.facts["num_scaled"] or event.facts["in_scaler"] or event.site in seen:
            continue
        if _is_unscaled_by_hand(view, event):
            continue
        seen.add(event.site)
        yield view.finding(
            STEPPED_WHILE_SCALED.code,
            Severity.ERROR,
            f"{event.facts['optimizer']}.step() applies {event.facts['num_scaled']} gradients that are "
            "still multiplied "
            f"by the loss scale{_scale_text(view, event)}, and infinite ones are not skipped",
            event=event,
            advice="call scaler.step(optimizer); scaler.update() instead of optimizer.step()",
            evidence={"num_scaled": event.facts["num_scaled"], "scale": _scale_at(view, event)},
        )


def _scaled_by_hand(view: TraceView) -> Iterator[Finding]:
    """A loss scale made by hand that nothing takes off the gradients before they are applied."""
    roots = [
        one
        for one in view.events("backward")
        if not one.facts["is_nested"] and not one.facts["is_scaled"] and _is_scale(one.facts["factor"])
    ]
    for event in view.events("optimizer.step"):
        before = [one for one in roots if one.end <= event.operation and one.step == event.step]
        if not before or event.facts["num_rewritten"] or event.facts["in_scaler"] or not _in_float16(view, before[-1]):
            continue
        factor = before[-1].facts["factor"]
        yield view.finding(
            STEPPED_WHILE_SCALED.code,
            # Adam divides by the size of the gradients: only its epsilon and what clips notice
            Severity.INFO if "Adam" in event.facts["optimizer"] else Severity.WARNING,
            f"the loss is multiplied by {factor:g}, which looks like a loss scale, and "
            f"{event.facts['optimizer']}.step() applies the gradients as they are",
            event=event,
            advice="divide the gradients by the scale before the step, or use torch.amp.GradScaler",
            evidence={"factor": factor, "num_weights": event.facts["num_weights"]},
        )
        return


def _is_scale(factor: float) -> bool:
    return factor >= _LEAST_SCALE and log2(factor).is_integer()


def _in_float16(view: TraceView, event: Event) -> bool:
    """Whether a backward pass makes float16 gradients."""
    return any(
        one.call.phase is Phase.BACKWARD
        and any(meta.dtype == "float16" and meta.numel > 1 for meta in one.call.outputs)
        for one in view.trace.operations[event.operation : event.end]
    )


def _moved_while_scaled(view: TraceView) -> Iterator[Finding]:
    """Weights that the program moves by itself along gradients which still carry the scale."""
    measured: set[int] = set()
    seen: set[object] = set()
    for index in view.trace.scaled_reads:
        operation = view.operation(index)
        if operation is None or operation.call.phase is not Phase.OTHER:
            continue
        if operation.call.name in _NORMS and operation.call.name != "mul":
            measured.add(operation.step)  # a direction of unit length carries no scale
        if operation.step in measured:
            continue
        for found in (operation, *_followers(view, operation)):
            call = found.call
            if not call.is_in_place or not found.producers or found.producers[0] >= -1 or call.site in seen:
                continue
            backward = [one for one in view.events("backward") if one.end <= index]
            if backward and _asked_for_scale(view, backward[-1].operation, found.index):
                continue
            seen.add(call.site)
            yield view.finding(
                STEPPED_WHILE_SCALED.code,
                Severity.ERROR,
                f"{call.name} moves a weight along gradients that are still multiplied by the loss scale",
                operation=found,
                advice="call scaler.unscale_(optimizer) first, or multiply by 1 / scaler.get_scale()",
            )


def _followers(view: TraceView, operation: Operation) -> Iterator[Operation]:
    """Yield what reads an operation's result in the same step, and what reads theirs, through simple arithmetic."""
    level = [operation.index]
    for _ in range(_FOLLOWED):
        following: list[int] = []
        for index in level:
            for use in view.consumers.get(index, ()):
                found = view.operation(use)
                if found is not None and found.step == operation.step and found.call.phase is Phase.OTHER:
                    yield found
                    following.append(use)
        level = following


def _changed_while_scaled(view: TraceView) -> Iterator[Finding]:
    """Something that carries no scale is added to gradients that do: noise, weight decay by hand."""
    reads = set(view.trace.scaled_reads)
    asked = any(True for _ in view.events("scaler.get_scale"))
    for index in view.trace.scaled_reads:
        operation = view.operation(index)
        if operation is None or asked or operation.call.phase is not Phase.OTHER:
            continue
        call = operation.call
        if call.name not in _ADDS or len(operation.producers) < 2 or operation.producers[0] < 0:
            continue
        target = view.operation(operation.producers[0])
        if target is None or not (target.call.phase is Phase.BACKWARD or target.index in reads):
            continue  # a sum into which scaled gradients go, and not a gradient itself
        if not call.is_in_place and not _is_applied(view, index):
            continue  # a sum that does not become the gradient
        others = [one for one in operation.producers[1:] if one != operation.producers[0]]
        if not others or any(_is_of_gradients(view, one, reads) for one in others):
            continue
        yield view.finding(
            CHANGED_WHILE_SCALED.code,
            Severity.ERROR,
            f"{call.name} adds to gradients that are still multiplied by the loss scale{_scale_text_at(view, index)}: "
            "what is added counts for as much less",
            operation=operation,
            advice="call scaler.unscale_(optimizer) before gradients are changed",
        )
        return


def _is_applied(view: TraceView, index: int) -> bool:
    """Whether the scaler or an optimizer reads a result as a gradient."""
    uses = (view.operation(use) for use in view.consumers.get(index, ()))
    return any(use is not None and use.call.phase is Phase.OPTIMIZER for use in uses)


def _is_of_gradients(view: TraceView, index: int, reads: set[int]) -> bool:
    """Whether a tensor was made of scaled gradients: in backward, or from one that was read."""
    found = view.operation(index)
    if found is None:
        return False
    through = lambda call: call.phase is Phase.OTHER and call.kind is not Kind.MAKE  # noqa: E731
    return any(
        (one.index in reads and one.call.kind is not Kind.MAKE) or one.call.phase is Phase.BACKWARD
        for one in (found, *view.ancestors(found, through=through, depth=8))
    )


def _scale_text_at(view: TraceView, operation: int) -> str:
    scales = [one.facts.get("scale") for one in view.events("scaler.scale") if one.operation <= operation]
    return f" ({scales[-1]:g})" if scales and scales[-1] else ""


def _stepped_twice(view: TraceView) -> Iterator[Finding]:
    """An optimizer steps by itself right after its scaler stepped it."""
    stepped: dict[int, Event] = {}
    for event in view.trace.events:
        if event.name in ("backward", "optimizer.zero_grad"):
            stepped.clear()
        elif event.name == "scaler.step" and event.facts["is_enabled"] and "error" not in event.facts:
            stepped[event.facts["optimizer_id"]] = event
        elif event.name == "optimizer.step" and not event.facts["in_scaler"] and event.facts["optimizer_id"] in stepped:
            yield view.finding(
                STEPPED_TWICE.code,
                Severity.ERROR,
                f"{event.facts['optimizer']}.step() applies the gradients that scaler.step() has applied already, and "
                "infinite ones when it skipped them",
                event=event,
                advice="scaler.step(optimizer) steps the optimizer: leave the second call out",
            )
            return


def _scheduled_while_skipped(view: TraceView) -> Iterator[Finding]:
    """A scheduler that moves on although every step since it last did was skipped."""
    skipped: Event | None = None
    has_stepped = False
    for event in view.trace.events:
        if event.name == "scaler.step" and event.facts["is_enabled"] and "error" not in event.facts:
            if event.facts["is_skipped"]:
                skipped = event
            else:
                has_stepped = True
        elif event.name == "optimizer.step":
            has_stepped = True
        elif event.name == "scheduler.step":
            if skipped is not None and not has_stepped and event.step == skipped.step + 1:
                yield view.finding(
                    SCHEDULED_WHILE_SKIPPED.code,
                    Severity.WARNING,
                    f"{event.facts['class']}.step() follows a step that the scaler skipped: the learning rate moves on "
                    "while the weights stay, and torch warns of the order where it is the first step",
                    event=event,
                    advice="remember scale = scaler.get_scale() and step the scheduler only if "
                    "scaler.get_scale() >= scale after scaler.update()",
                )
                return
            skipped, has_stepped = None, False


def _unscaled_twice(view: TraceView) -> Iterator[Finding]:
    """torch raises when a scaler meets an optimizer again before update: told by the calls made, not by its words."""
    done: set[tuple[object, object]] = set()  # (scaler, optimizer) that were unscaled or stepped since the update
    stepped: set[tuple[object, object]] = set()
    for event in view.events("scaler.unscale", "scaler.step", "scaler.update"):
        if event.name == "scaler.update":
            done = {one for one in done if one[0] != event.facts["scaler"]}
            stepped &= done
            continue
        key = (event.facts["scaler"], event.facts["optimizer_id"])
        if "error" in event.facts and key in (done if event.name == "scaler.unscale" else stepped):
            yield view.finding(
                UNSCALED_TWICE.code,
                Severity.ERROR,
                f"{_CALLED[event.name]}() is called a second time for this optimizer before scaler.update()",
                event=event,
                advice="unscale, clip, step and update once, where the accumulation of gradients ends",
                evidence={"error": event.facts["error"]},
            )
            return
        if event.facts["is_enabled"] and "error" not in event.facts and not event.facts.get("in_step"):
            done.add(key)
            if event.name == "scaler.step":
                stepped.add(key)


def _mixed_gradients(view: TraceView) -> Iterator[Finding]:
    uses = [one.operation for one in view.events("scaler.unscale", "optimizer.step") if one.facts["num_mixed"]]
    for event in view.events("backward"):
        # sums that nobody uses before they are zeroed do no harm: a critic's, of the generator's loss
        if event.facts.get("num_mixed") and any(one >= event.end for one in uses):
            kinds = ("scaled", "differently scaled") if event.facts["is_scaled"] else ("unscaled", "scaled")
            yield view.finding(
                MIXED_GRADIENTS.code,
                Severity.ERROR,
                f"a backward pass adds {kinds[0]} gradients to {kinds[1]} ones in {event.facts['num_mixed']} weights",
                event=event,
                advice="unscale only where the accumulation ends, and scale every loss of the window",
                evidence={"num_mixed": event.facts["num_mixed"]},
            )
            return


def _scaled_penalty(view: TraceView) -> Iterator[Finding]:
    seen: set[object] = set()
    backwards = list(view.events("backward"))
    for event in view.events("grad"):
        if not event.facts["is_scaled"] or event.facts["is_nested"] or event.site in seen:
            continue
        end = next((one.operation for one in backwards if one.operation >= event.end), len(view.trace.operations))
        if _asked_for_scale(view, event.operation, end):
            continue
        uses = [
            use
            for made in event.facts.get("made", ())
            for use in view.consumers.get(made, ())
            if event.end <= use < end
        ]
        if not uses or not event.facts["builds_graph"]:
            continue
        seen.add(event.site)
        yield view.finding(
            SCALED_PENALTY.code,
            Severity.ERROR,
            f"gradients of a scaled loss go into another loss{_scale_text(view, event)} without being divided "
            "by the scale",
            event=event,
            operation=None,
            advice="multiply them by 1 / scaler.get_scale() first",
            evidence={"scale": _scale_at(view, event)},
        )


def _no_scaling(view: TraceView) -> Iterator[Finding]:
    seen: set[object] = set()
    for event in view.events("backward", "grad"):
        facts = event.facts
        if facts["is_nested"] or facts["is_scaled"] or facts["factor"] >= _BY_HAND or event.site in seen:
            continue
        made = [
            one
            for one in view.trace.operations[event.operation : event.end]
            if one.call.phase is Phase.BACKWARD
            and any(meta.dtype == "float16" and meta.numel > 1 for meta in one.call.outputs)
        ]
        if not made:
            continue
        seen.add(event.site)
        share = _share_lost(view, event)
        yield view.finding(
            NO_SCALING.code,
            Severity.WARNING,
            "float16 gradients without loss scaling"
            + (f": {share:.0%} of their numbers other than 0 are subnormal" if share else "")
            + "; what is below 6e-08 becomes 0",
            event=event,
            module=made[0].call.module,
            advice="use torch.amp.GradScaler, or bfloat16, which needs none",
            evidence={"share_subnormal": share},
        )


def _share_lost(view: TraceView, event: Event) -> float | None:
    """Return the share of subnormal numbers among the float16 gradients of a backward pass."""
    held = below = 0
    for operation in view.trace.operations[event.operation : event.end]:
        for tally in operation.call.tallies:
            if tally is not None and tally.dtype == "float16" and operation.call.phase is Phase.BACKWARD:
                held += tally.count - tally.zeros
                below += sum(tally.exponents[: 127 - 14]) - tally.zeros
    return below / held if held else None


def _half_weights(view: TraceView) -> Iterator[Finding]:
    for event in view.events("scaler.unscale"):
        if event.facts["is_enabled"] and "float16" in event.facts["grad_dtypes"]:
            named = [one.name for one in view.trace.parameters if one.dtype == "float16"]
            yield view.finding(
                HALF_WEIGHTS.code,
                Severity.ERROR,
                f"the gradient scaler is given float16 weights{': ' + named[0] if named else ''}"
                f"{' and others' if len(named) > 1 else ''}; it refuses to unscale their gradients",
                event=event,
                module=named[0].rpartition(".")[0] if named else None,
                advice="keep trainable weights in float32 and let autocast lower the operations",
                evidence={"weights": named[:10], "error": event.facts.get("error")},
            )
            return


def _closure(view: TraceView) -> Iterator[Finding]:
    for event in view.events("scaler.step"):
        is_lbfgs = event.facts["optimizer"] == "LBFGS"
        if event.facts["is_enabled"] and (event.facts["has_closure"] or is_lbfgs):
            yield view.finding(
                CLOSURE.code,
                Severity.ERROR,
                "scaler.step is given a closure: the optimizer evaluates it again and applies gradients that were "
                "scaled anew and never unscaled",
                event=event,
                advice="call the closure yourself, then scaler.step(optimizer); for LBFGS use bfloat16 or float32 "
                "without a scaler",
            )
            return


def _never_updated(view: TraceView) -> Iterator[Finding]:
    """scaler.update() missing between steps, called between two optimizers of one step, or before any step."""
    for event in view.events("scaler.update"):
        if "error" in event.facts and not _was_used(view, event):
            yield view.finding(
                UPDATE_ORDER.code,
                Severity.ERROR,
                "scaler.update() is called and no optimizer was unscaled or stepped since the last time",
                event=event,
                advice="call it once, after scaler.step: where gradients are accumulated, at the end of the window",
                evidence={"error": event.facts["error"]},
            )
            return
    stepped: Event | None = None
    updated: Event | None = None
    for event in view.trace.events:
        if event.name == "scaler.step" and event.facts["is_enabled"] and "error" not in event.facts:
            if updated is not None:
                yield view.finding(
                    UPDATE_ORDER.code,
                    Severity.WARNING,
                    "scaler.step comes after scaler.update() without a new backward pass: these gradients carry the "
                    "scale from before the update",
                    event=event,
                    advice="step all optimizers first, then call scaler.update() once",
                )
                return
            stepped = event
        elif event.name == "scaler.update":
            updated, stepped = (event if stepped is not None else None), None
        elif event.name == "backward" and event.facts["is_scaled"]:
            updated = None
            if stepped is not None and event.step > stepped.step:
                yield view.finding(
                    UPDATE_ORDER.code,
                    Severity.ERROR,
                    "scaler.update() is not called between scaler.step() and the next backward pass: the scale never "
                    "adapts",
                    event=stepped,
                    advice="call scaler.update() once after the step",
                )
                return


def _was_used(view: TraceView, update: Event) -> bool:
    """Whether the scaler unscaled or stepped an optimizer, or tried to, since its last update."""
    is_used = False
    for event in view.events("scaler.unscale", "scaler.step", "scaler.update"):
        if event is update:
            return is_used
        if event.facts["scaler"] == update.facts["scaler"]:
            is_used = event.name != "scaler.update"
    return is_used


def _unsaved_scaler(view: TraceView) -> Iterator[Finding]:
    if not any(event.facts["is_enabled"] for event in view.events("scaler.scale")):
        return
    if any(True for _ in view.events("scaler.state_dict")):
        return
    for event in view.events("save"):
        if "optimizer" in event.facts["holds"] and "scaler" not in event.facts["holds"]:
            yield view.finding(
                UNSAVED_SCALER.code,
                Severity.WARNING,
                "the checkpoint holds the optimizer's state and not the gradient scaler's: after a resume "
                "the loss scale "
                "starts from its initial value again",
                event=event,
                advice='save "scaler": scaler.state_dict() and load it',
                evidence={"holds": event.facts["holds"]},
            )
            return
    if any(True for _ in view.events("scaler.load_state_dict")):
        return
    for event in view.events("optimizer.load_state_dict"):
        if event.facts.get("is_empty"):
            continue
        yield view.finding(
            UNSAVED_SCALER.code,
            Severity.WARNING,
            "the optimizer's state is restored and the gradient scaler's is not: the loss scale starts from "
            "its initial "
            "value again",
            event=event,
            advice='save "scaler": scaler.state_dict() and load it',
        )
        return


def _never_scaled(view: TraceView) -> Iterator[Finding]:
    scaled = {event.facts["scaler"] for event in view.events("scaler.scale")}
    for event in view.events("scaler.step", "scaler.unscale"):
        if "error" in event.facts and event.facts["is_enabled"] and event.facts["scaler"] not in scaled:
            yield view.finding(
                NEVER_SCALED.code,
                Severity.ERROR,
                f"{_CALLED[event.name]}() is called on a scaler that has scaled no loss",
                event=event,
                advice="call backward on scaler.scale(loss), with the scaler that steps the optimizer",
                evidence={"error": event.facts["error"]},
            )
            return
    for event in view.events("scaler.unscale"):
        if event.facts["is_enabled"] and event.facts["num_of_others"] and "error" not in event.facts:
            yield view.finding(
                NEVER_SCALED.code,
                Severity.ERROR,
                f"the scaler divides {event.facts['num_of_others']} gradients by its scale that another scaler "
                "multiplied by another",
                event=event,
                advice="scale each loss with the scaler that steps the optimizer of its weights",
                evidence={"num_of_others": event.facts["num_of_others"]},
            )
            return
    for event in view.events("scaler.unscale"):
        if event.facts["is_enabled"] and event.facts["num_unscaled"] and "error" not in event.facts:
            yield view.finding(
                NEVER_SCALED.code,
                Severity.ERROR,
                f"the scaler divides {event.facts['num_unscaled']} gradients by its "
                f"scale{_scale_text(view, event)} that were "
                "never multiplied by it",
                event=event,
                advice="call backward on scaler.scale(loss), for every loss of the step",
                evidence={"num_unscaled": event.facts["num_unscaled"], "scale": _scale_at(view, event)},
            )
            return


def _new_scalers(view: TraceView) -> Iterator[Finding]:
    """A gradient scaler that is made anew for every step of the same optimizer."""
    used: dict[int, list[tuple[int, Event]]] = {}
    for event in view.events("scaler.step"):
        if event.facts["is_enabled"]:
            used.setdefault(event.facts["optimizer_id"], []).append((event.facts["scaler"], event))
    for found in used.values():
        if len(found) > 1 and len({scaler for scaler, _ in found}) == len(found):
            yield view.finding(
                NEW_SCALERS.code,
                Severity.WARNING,
                "a new gradient scaler is made for every step: its scale never adapts",
                event=found[1][1],
                advice="make one scaler before the loop",
                evidence={"scalers": len(found)},
            )
            return


def _idle_scaler(view: TraceView) -> Iterator[Finding]:
    if view.policy.compute != "bfloat16":
        return
    for event in view.events("scaler.scale"):
        if event.facts["is_enabled"]:
            yield view.finding(
                IDLE_SCALER.code,
                Severity.INFO,
                "losses are scaled although operations run in bfloat16, whose range is that of float32",
                event=event,
                advice="GradScaler(enabled=False) with bfloat16",
            )
            return


def _rule(
    code: str,
    name: str,
    summary: str,
    severity: Severity,
    why: str,
    bad: str,
    good: str,
    fix: str,
    check: Callable[[TraceView], Iterable[Finding]],
    sources: tuple[str, ...] = (),
) -> Rule[TraceView]:
    return Rule(
        code=code,
        name=name,
        summary=summary,
        severity=severity,
        why=why,
        bad=bad,
        good=good,
        fix=fix,
        check=check,
        sources=sources,
    )


_AMP = "https://pytorch.org/docs/stable/notes/amp_examples.html"
CLIPPED_WHILE_SCALED = _rule(
    "MZ221", "clip-before-unscale", "gradients are clipped before they are unscaled", Severity.ERROR,
    "The norm is too large by the loss scale, up to 65536 times, so every step is clipped to almost nothing.",
    "scaler.scale(loss).backward()\nclip_grad_norm_(params, 1.0)\nscaler.step(optimizer)",
    "scaler.scale(loss).backward()\nscaler.unscale_(optimizer)\nclip_grad_norm_(params, 1.0)\nscaler.step(optimizer)",
    "Call scaler.unscale_(optimizer) right before clipping.", _clipped_while_scaled, (_AMP,),
)  # fmt: skip
STEPPED_WHILE_SCALED = _rule(
    "MZ222", "step-past-the-scaler", "an optimizer applies gradients that still carry the loss scale", Severity.ERROR,
    "With SGD the learning rate is multiplied by the scale; infinite gradients go into the weights.",
    "scaler.scale(loss).backward()\noptimizer.step()",
    "scaler.scale(loss).backward()\nscaler.step(optimizer)\nscaler.update()",
    "Let the scaler step the optimizer.", _applied_while_scaled, (_AMP,),
)  # fmt: skip
UNSCALED_TWICE = _rule(
    "MZ223", "unscaled-twice", "unscale_ or step is called twice before update", Severity.ERROR,
    "Gradients would be divided by the scale twice; torch raises.",
    "for micro in batch:\n    scaler.scale(loss).backward()\n    scaler.unscale_(optimizer)",
    "for micro in batch:\n    scaler.scale(loss).backward()\nscaler.unscale_(optimizer)",
    "Unscale once, where the accumulation ends.", _unscaled_twice, (_AMP,),
)  # fmt: skip
MIXED_GRADIENTS = _rule(
    "MZ224", "mixed-gradients", "scaled gradients are added to unscaled ones", Severity.ERROR,
    "One of the two counts for nothing: they differ by the scale.",
    "scaler.unscale_(optimizer)\nscaler.scale(loss2).backward()",
    "scaler.scale(loss2).backward()\nscaler.unscale_(optimizer)",
    "Unscale after the last backward pass of the step.", _mixed_gradients,
)  # fmt: skip
SCALED_PENALTY = _rule(
    "MZ225", "scaled-gradient-penalty", "gradients of a scaled loss are used as they are", Severity.ERROR,
    "torch.autograd.grad of a scaled loss returns scaled gradients; a penalty made of them is too large by the square "
    "of the scale.",
    "g = torch.autograd.grad(scaler.scale(out), x, create_graph=True)[0]\nloss = loss + g.norm()",
    "g = torch.autograd.grad(scaler.scale(out), x, create_graph=True)[0] / scaler.get_scale()\nloss = loss + g.norm()",
    "Divide by scaler.get_scale() first.", _scaled_penalty, (_AMP,),
)  # fmt: skip
NO_SCALING = _rule(
    "MZ226", "no-loss-scaling", "float16 gradients without loss scaling", Severity.WARNING,
    "Gradients of 1e-5 to 1e-8 are common; in float16 they are subnormal or 0.",
    "with torch.autocast('cuda', dtype=torch.float16): loss = f(x)\nloss.backward()",
    "with torch.autocast('cuda', dtype=torch.float16): loss = f(x)\nscaler.scale(loss).backward()",
    "Use a gradient scaler, or bfloat16.", _no_scaling, ("https://arxiv.org/abs/1710.03740",),
)  # fmt: skip
HALF_WEIGHTS = _rule(
    "MZ227", "scaler-with-half-weights", "a gradient scaler with float16 weights", Severity.ERROR,
    "Updates of float16 weights would be lost, so the scaler refuses their gradients.",
    "model.half()\nscaler.step(optimizer)", "model.float()  # autocast lowers the operations\nscaler.step(optimizer)",
    "Keep trainable weights in float32.", _half_weights,
)  # fmt: skip
CLOSURE = _rule(
    "MZ228", "closure-to-the-scaler", "scaler.step is given a closure", Severity.ERROR,
    "The scaler unscales once; the closure computes scaled gradients again inside the step.",
    "scaler.step(optimizer, closure)", "closure()\nscaler.step(optimizer)",
    "Call the closure before; use no scaler for LBFGS.", _closure, (_AMP,),
)  # fmt: skip
UPDATE_ORDER = _rule(
    "MZ229", "scaler-update-order", "scaler.update is missing, or comes between two optimizers", Severity.ERROR,
    "Without update the scale never adapts and a second unscale_ raises; between two optimizers it changes the scale "
    "that the second one's gradients carry.",
    "scaler.step(opt_g); scaler.update()\nscaler.step(opt_d); scaler.update()",
    "scaler.step(opt_g)\nscaler.step(opt_d)\nscaler.update()",
    "Call update once, after all optimizers of the step.", _never_updated, (_AMP,),
)  # fmt: skip
UNSAVED_SCALER = _rule(
    "MZ230", "scaler-not-saved", "a checkpoint without the gradient scaler's state", Severity.WARNING,
    "After a resume the scale jumps back to 65536: overflows, skipped steps and a bump in the loss.",
    "torch.save({'model': m.state_dict(), 'optim': o.state_dict()}, f)",
    "torch.save({'model': m.state_dict(), 'optim': o.state_dict(), 'scaler': scaler.state_dict()}, f)",
    "Save and load scaler.state_dict().", _unsaved_scaler,
)  # fmt: skip
IDLE_SCALER = _rule(
    "MZ231", "scaler-with-bfloat16", "loss scaling with bfloat16", Severity.INFO,
    "bfloat16 has float32's exponents: scaling adds a check and skipped steps, and nothing else.",
    "scaler = GradScaler()  # autocast to bfloat16", "scaler = GradScaler(enabled=False)",
    "Disable the scaler with bfloat16.", _idle_scaler,
)  # fmt: skip
NEVER_SCALED = _rule(
    "MZ232", "never-scaled", "a scaler unscales gradients that were never scaled", Severity.ERROR,
    "The gradients are divided by up to 65536 and most updates vanish.",
    "loss.backward()\nscaler.step(optimizer)", "scaler.scale(loss).backward()\nscaler.step(optimizer)",
    "Scale every loss before its backward pass.", _never_scaled, (_AMP,),
)  # fmt: skip
NEW_SCALERS = _rule(
    "MZ233", "new-scaler-every-step", "a gradient scaler is made anew for every step", Severity.WARNING,
    "The scale starts from its initial value each time: overflows are skipped for ever, and it never grows.",
    "for batch in data:\n    scaler = GradScaler()", "scaler = GradScaler()\nfor batch in data: ...",
    "Make one scaler before the loop.", _new_scalers, (_AMP,),
)  # fmt: skip
STEPPED_TWICE = _rule(
    "MZ234", "stepped-twice", "an optimizer steps again after the scaler stepped it", Severity.ERROR,
    "Each gradient is applied twice, and a step that the scaler skipped for its infinite gradients is made after all.",
    "scaler.step(optimizer)\noptimizer.step()", "scaler.step(optimizer)", "Leave the second call out.", _stepped_twice,
    (_AMP,),
)  # fmt: skip
SCHEDULED_WHILE_SKIPPED = _rule(
    "MZ235", "scheduler-after-a-skipped-step", "a scheduler moves on after a step that the scaler skipped",
    Severity.WARNING,
    "The first steps with a scale of 65536 are often skipped: a warm-up shrinks, and torch warns of the order.",
    "scaler.step(optimizer); scaler.update()\nscheduler.step()",
    "scale = scaler.get_scale()\nscaler.step(optimizer); scaler.update()\n"
    "if scaler.get_scale() >= scale: scheduler.step()",
    "Step the scheduler after real steps only.", _scheduled_while_skipped,
    ("https://github.com/pytorch/pytorch/issues/44511",),
)  # fmt: skip
CHANGED_WHILE_SCALED = _rule(
    "MZ236", "addition-to-scaled-gradients", "something without the loss scale is added to gradients that carry it",
    Severity.ERROR,
    "Noise or weight decay of the size of true gradients is nothing beside gradients multiplied by 65536.",
    "scaler.scale(loss).backward()\np.grad.add_(p, alpha=0.01)\nscaler.step(optimizer)",
    "scaler.scale(loss).backward()\nscaler.unscale_(optimizer)\np.grad.add_(p, alpha=0.01)\nscaler.step(optimizer)",
    "Unscale before gradients are changed.", _changed_while_scaled, (_AMP,),
)  # fmt: skip
RULES = (
    CLIPPED_WHILE_SCALED, STEPPED_WHILE_SCALED, UNSCALED_TWICE, MIXED_GRADIENTS, SCALED_PENALTY, NO_SCALING,
    HALF_WEIGHTS, CLOSURE, UPDATE_ORDER, UNSAVED_SCALER, IDLE_SCALER,
    NEVER_SCALED, NEW_SCALERS, STEPPED_TWICE, SCHEDULED_WHILE_SKIPPED, CHANGED_WHILE_SCALED,
)  # fmt: skip
