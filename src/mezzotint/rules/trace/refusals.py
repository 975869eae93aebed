"""MZ26x: operations that raised because of the dtypes they were given."""

from collections.abc import Iterator

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView
from mezzotint.trace.record import FLOATING, LOW_PRECISION, Operation, Phase

_RAISED = frozenset({"RuntimeError", "TypeError", "NotImplementedError"})
_CALLS_OF_OTHERS = frozenset({"unscale_", "_unscale_grads_", "binary_cross_entropy"})  # what other rules are about


def _refused(view: TraceView) -> Iterator[Finding]:
    said = {operation.error for operation in view.trace.operations if operation.error is not None}
    for event in view.events("error"):  # raised before an operation was reached
        facts = event.facts
        text = str(facts["error"])
        if text in said or facts["error_class"] not in _RAISED or facts["raised_in"] in _CALLS_OF_OTHERS:
            continue
        dtypes = [dtype for dtype in facts["operand_dtypes"] if dtype in FLOATING]
        is_low = any(dtype in LOW_PRECISION for dtype in dtypes)
        if facts["is_inference"] or not is_low or (len(dtypes) < 2 and facts["called"] != "numpy"):
            continue
        yield view.finding(
            REFUSED.code,
            Severity.ERROR,
            f"{facts['error_class']}: {_short(text)}",
            event=event,
            advice="NumPy has no bfloat16: .float() before .numpy()"
            if facts["called"] == "numpy"
            else "bring inputs, weights and buffers to one dtype, or let autocast do it",
            evidence={"error": text},
        )
    for operation in view.trace.operations:
        if operation.error is None:
            continue
        call = operation.call
        dtypes = sorted({meta.dtype for meta in call.inputs if meta.is_floating})
        if operation.index not in view.trace.refused_formats:
            continue
        yield view.finding(
            REFUSED.code,
            Severity.ERROR,
            f"{call.name} refuses {' and '.join(dtypes)} operands{_where(operation)}: {_short(operation.error)}",
            operation=operation,
            advice=_advice(operation),
            evidence={
                "inputs": [f"{meta.dtype}{list(meta.shape)}" for meta in call.inputs],
                "autocast": call.autocast,
                "autograd_function": call.node,
            },
        )


def _where(operation: Operation) -> str:
    call = operation.call
    if call.phase is Phase.BACKWARD:
        return f" in the backward of {call.node}" if call.node else " in backward"
    return f" inside {call.autocast} autocast" if call.autocast else ""


def _advice(operation: Operation) -> str:
    call = operation.call
    if call.phase is Phase.BACKWARD:
        return (
            "decorate the Function's forward with torch.amp.custom_fwd and its backward with torch.amp.custom_bwd, so "
            "that both run under the same autocast state"
        )
    if "index_put" in call.name or "copy" in call.name or "scatter" in call.name or "index_add" in call.name:
        return "allocate the buffer with the dtype of what is written (x.new_zeros, dtype=y.dtype), or cast on write"
    return "cast the operands to one dtype"


def _short(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "no message"


def _inference(view: TraceView) -> Iterator[Finding]:
    """A call outside inference mode that raised, with a tensor that was made in it."""
    for event in view.events("error", "backward"):
        if (
            "error" not in event.facts
            or not event.facts.get("is_inference")
            or event.facts["error_class"] not in _RAISED
        ):
            continue
        yield view.finding(
            INFERENCE_TENSORS.code,
            Severity.ERROR,
            "a tensor that was made under torch.inference_mode() enters the training graph, which cannot save it for "
            f"backward: {event.facts['error_class']}",
            event=event,
            advice="make it under torch.no_grad() instead, or clone() it outside inference mode",
            evidence={"error": event.facts["error"]},
        )
        return


INFERENCE_TENSORS = Rule(
    code="MZ262",
    name="inference-tensors-in-training",
    summary="a tensor made in inference mode enters the training graph",
    severity=Severity.ERROR,
    why="Tensors made under torch.inference_mode() have no version counter and cannot be saved for backward; with "
    "autocast, weights that were cast there cannot either.",
    bad="with torch.inference_mode(): h = body(x)\nloss = head(h).float().mean()",
    good="with torch.no_grad(): h = body(x)\nloss = head(h).float().mean()",
    fix="Use torch.no_grad() for what training reads later.",
    sources=("https://github.com/huggingface/trl/issues/2983",),
    check=_inference,
)
REFUSED = Rule(
    code="MZ261",
    name="refused-dtypes",
    summary="an operation refused operands of different formats",
    severity=Severity.ERROR,
    why="Autocast's outputs are compact while buffers and saved tensors are float32; in-place writes, index "
    "assignments and hand-written backward functions do not promote.",
    bad="y = torch.zeros(n, d)\ny[i] = layer(x)  # float32 buffer, compact values",
    good="y = torch.zeros(n, d, dtype=out.dtype)\ny[i] = out",
    fix="Bring the operands to one dtype; decorate autograd Functions with custom_fwd and custom_bwd.",
    check=_refused,
)
RULES = (REFUSED, INFERENCE_TENSORS)
