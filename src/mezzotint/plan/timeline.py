"""A planned step as a trace that Perfetto and chrome://tracing open: the GPU's kernels, and memory beside them."""

from typing import Any

from mezzotint.plan.costs import Work, cost_of
from mezzotint.plan.plan import Plan


def chrome_trace(plan: Plan) -> dict[str, Any]:
    """Return the Trace Event Format (catapult project): times in microseconds, kernels one after the other."""
    run = plan.run
    step = run.trace.steps[-1]
    seconds: dict[int, float] = {}
    for one in plan.time.calls:
        seconds.setdefault(one.call.index, one.estimate.seconds)
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"{run.spec.name}, {plan.precision.name}"}}
    ]
    now = 0.0
    starts: dict[int, float] = {}
    for operation in run.trace.operations[step.first : step.end]:
        starts[operation.index] = now
        call = operation.call
        if cost_of(call).work is Work.NOTHING or call.index not in seconds:
            continue
        taken = seconds[call.index] * 1e6
        events.append(
            {
                "ph": "X", "pid": 0, "tid": 0, "ts": now, "dur": taken, "name": call.name, "cat": str(call.phase),
                "args": {
                    "module": call.module,
                    "inputs": [f"{meta.dtype} {list(meta.shape)}" for meta in call.inputs[:4]],
                    "line": f"{call.line.path}:{call.line.line}" if call.line is not None else "",
                },
            }
        )  # fmt: skip
        now += taken
    for index, sizes in plan.memory.timeline:
        if index in starts:
            events.append(
                {"ph": "C", "pid": 0, "ts": starts[index], "name": "allocated", "args": {"bytes": sum(sizes)}}
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
