"""From a trace to findings and a verdict: the policy that ran is inferred where none is declared."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mezzotint.errors import MezzotintError
from mezzotint.findings import Finding, Severity
from mezzotint.policy.policy import Policy
from mezzotint.rules.catalog import TRACE_RULES
from mezzotint.rules.trace.ranges import BORN_IN_FLOAT32
from mezzotint.rules.trace.rounding import CANCELLATION
from mezzotint.rules.trace.view import TraceView, is_product
from mezzotint.trace.record import FLOATING, MASTER_MARK, Phase, Trace

_REDUCING = ("c10d.allreduce", "c10d.reduce", "c10d._reduce_scatter", "_c10d_functional.all_reduce",
             "_c10d_functional.reduce_scatter")  # fmt: skip
_ORDER = {Severity.ERROR: 0, Severity.WARNING: 1, Severity.INFO: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """Findings about a trace, most severe first, and the policy it was judged by."""

    findings: tuple[Finding, ...]
    policy: Policy
    is_declared: bool
    verdict: str

    @property
    def is_clean(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return all(one.severity is Severity.INFO for one in self.findings)


def judge(trace: Trace, policy: Policy | str | None = None) -> Judgement:
    """Return what the rules say about a trace, by `policy` or by the one that the trace itself shows."""
    declared = Policy.parse(policy) if policy is not None else None
    used = declared if declared is not None else infer_policy(trace)
    view = TraceView(trace, used, is_declared=declared is not None)
    findings = [finding for rule in TRACE_RULES for finding in rule.check(view)]
    findings = _merged(_without_doubts(findings))
    findings.sort(key=lambda one: (_ORDER[one.severity], one.code, one.path or "", one.line or 0))
    return Judgement(
        findings=tuple(findings),
        policy=used,
        is_declared=declared is not None,
        verdict=_verdict(trace, findings),
    )


def _without_doubts(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings without the notes on NaN and infinity at a difference that is known to be mostly rounding."""
    explained = {(one.path, one.line) for one in findings if one.code == CANCELLATION.code}
    return [one for one in findings if one.code != BORN_IN_FLOAT32.code or (one.path, one.line) not in explained]


def _merged(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings without repetitions: what one line does in one module is said once."""
    kept: dict[tuple[object, ...], Finding] = {}
    times: Counter[tuple[object, ...]] = Counter()
    for one in findings:
        key = (one.code, one.severity, one.path, one.line, one.op, one.module, one.phase)
        kept.setdefault(key, one)
        times[key] += 1
    return [
        one if times[key] == 1 else replace(one, evidence={**one.evidence, "times": times[key]})
        for key, one in kept.items()
    ]


def _reduced(trace: Trace) -> Counter[str]:
    """Return how many numbers backward passes added up over processes, by dtype."""
    found: Counter[str] = Counter()
    counts = trace.counts()
    for call in trace.calls:
        if call.phase is Phase.BACKWARD and call.op.startswith(_REDUCING):
            for meta in call.inputs:
                if meta.dtype in FLOATING:
                    found[meta.dtype] += math.prod(meta.shape) * counts.get(call.index, 0)
    return found


def infer_policy(trace: Trace) -> Policy:
    """Return the policy that describes what ran: the commonest format on each axis."""
    flops: Counter[str] = Counter()
    counts = trace.counts()
    for call in trace.calls:
        if call.phase in (Phase.FORWARD, Phase.BACKWARD, Phase.RECOMPUTE) and is_product(call) and call.format:
            flops[call.format] += (call.flops or 1) * counts.get(call.index, 0)
    stepped = [one for one in trace.parameters if one.optimizer is not None]
    sizes: Counter[str] = Counter()
    grads: Counter[str] = Counter()
    states: Counter[str] = Counter()
    for one in stepped or trace.parameters:
        size = 1
        for length in one.shape:
            size *= length
        sizes[one.dtype] += size
        if one.grad_dtype is not None:
            grads[one.grad_dtype] += size
        for key, dtype in one.states.items():
            if key != "step":
                states[dtype] += size
    losses = Counter(
        dtype
        for event in trace.events
        if event.name == "backward" and not event.facts["is_nested"]
        for dtype in event.facts["dtypes"]
    )
    masters = [one for one in stepped if one.name.endswith(MASTER_MARK)]
    if masters and len(masters) == len(stepped):  # the optimizer's weights are copies; the model's are compact
        sizes = Counter(
            one.dtype
            for one in trace.parameters
            if one.optimizer is None and one.name + MASTER_MARK in {m.name for m in masters}
        )
    is_scaled = any(event.name == "scaler.scale" and event.facts["is_enabled"] for event in trace.events)
    params, reduced = _first(sizes), _reduced(trace)
    words = {
        "params": params,
        "compute": _first(flops) if flops else params,
        "loss": _first(losses),
        "reduce": _first(reduced) if reduced else _first(grads) if grads else params,
        "state": _first(states) if states else params,
        "scaling": "dynamic" if is_scaled else "none",
    }
    if masters and params != "float32":
        words["update"] = "master"
    try:
        return Policy.parse(", ".join(f"{axis}={value}" for axis, value in words.items()))
    except MezzotintError:  # a mixture that no policy describes: the rules judge each part anyway
        return Policy(compute=words["compute"])


def _first(counter: Counter[str]) -> str:
    return counter.most_common(1)[0][0] if counter else "float32"


def _verdict(trace: Trace, findings: Sequence[Finding]) -> str:
    errors = sum(one.severity is Severity.ERROR for one in findings)
    warnings = sum(one.severity is Severity.WARNING for one in findings)
    said = [
        f"{number} {noun}{'s' if number > 1 else ''}"
        for number, noun in ((errors, "error"), (warnings, "warning"))
        if number
    ]
    if not trace.steps and not any(event.name == "backward" for event in trace.events):
        return " and ".join(said) + (", and " if said else "") + "no training step was seen"
    if not trace.steps:
        return f"{' and '.join(said) or 'nothing wrong found'}, and no step had ended"
    steps, skipped = len(trace.steps), sum(step.is_skipped for step in trace.steps)
    over = f"{steps} step{'s' if steps != 1 else ''}{f', {skipped} of them skipped' if skipped else ''}"
    return f"{' and '.join(said)} in {over}" if said else f"nothing wrong found in {over}"
