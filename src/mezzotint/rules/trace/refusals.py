"""MZ26x: operations that raised because of the dtypes they were given."""

from collections.abc import Iterator

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView
from mezzotint.trace.record import Operation, Phase

_COMPACT = ("Half", "BFloat16", "float16", "bfloat16", "FP16")
_OTHERS = ("unscale FP16",)  # what other rules are about
_ABOUT_OPERANDS = ("same", "dtype", "calar", "not implemented for", "but got", "but found", "expected")
_ABOUT_DTYPES = ("dtype", "same type", "scalar type", "Half", "BFloat16", "Float but", "but found")


def _refused(view: TraceView) -> Iterator[Finding]:
    said = {operation.error for operation in view.trace.operations if operation.error is not None}
    for event in view.events("error"):  # raised before an operation was reached
        text = str(event.facts["error"])
        if text in said or not any(word in text for word in _COMPACT) or any(word in text for word in _OTHERS):
            continue
        if not any(word in text for word in _ABOUT_OPERANDS):
            continue
        yield view.finding(
            REFUSED.code,
            Severity.ERROR,
            f"{event.facts['error_class']}: {_short(text)}",
            event=event,
            advice="NumPy has no bfloat16: .float() before .numpy()"
            if "ScalarType" in text
            else "bring inputs, weights and buffers to one dtype, or let autocast do it",
            evidence={"error": text},
        )
    for operation in view.trace.operations:
        if operation.error is None:
            continue
        call = operation.call
        dtypes = sorted({meta.dtype for meta in call.inputs if meta.is_floating})
        if len(dtypes) < 2 and not any(word in operation.error for word in _ABOUT_DTYPES):
            continue
        if not any(meta.is_low for meta in call.inputs):
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
RULES = (REFUSED,)
