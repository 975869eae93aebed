"""One watched step as a row of figures, small enough to be written every few steps: by module, weight and format."""

from collections.abc import Sequence
from math import inf, log2
from typing import Any

from mezzotint.formats.catalog import find_format
from mezzotint.trace.places import user_line
from mezzotint.trace.record import Call, Kind, Operation, Phase, Trace, UpdateRecord
from mezzotint.trace.tally import Tally

_PHASES = {Phase.FORWARD: "forward", Phase.RECOMPUTE: "forward", Phase.BACKWARD: "backward"}
_NUM_WORST = 8


def row_of(trace: Trace, step: int) -> dict[str, Any]:
    """Return the figures of a trace of one step.

    For each module and phase: the format that it wrote most numbers in, their ends, the share of zeros, and of the
    others the shares that are subnormal, infinite or NaN, and the powers of two left below the format's largest number.
    """
    casts = [call for call in trace.calls if call.kind is Kind.CAST]
    counts = trace.counts()
    return {
        "step": step,
        "modules": _modules(trace),
        "updates": {**_updates(trace.updates), "unmoved": trace.unmoved},
        "casts": {
            "number": sum(counts.get(call.index, 0) for call in casts),
            "bytes": sum(counts.get(call.index, 0) * call.nbytes for call in casts),
        },
        "births": [_birth(trace, number) for number in range(len(trace.births))],
        **({"notes": list(trace.notes)} if trace.notes else {}),
    }


def histograms(trace: Trace) -> dict[str, Tally]:
    """Return the numbers of each module and phase, added up over its operations, by "module phase"."""
    return {f"{name} {phase}": tally for (name, phase, _), tally in module_tallies(trace.calls).items()}


def module_tallies(calls: Sequence[Call]) -> dict[tuple[str, str, str], Tally]:
    """Return one tally for each module and phase, of the format that most of its numbers are in."""
    found: dict[tuple[str, str, str], Tally] = {}
    for call in calls:
        phase = _PHASES.get(call.phase)
        for tally in call.tallies if phase is not None and call.module else ():
            if tally is not None and phase is not None:
                key = (call.module, phase, tally.dtype)
                if key not in found:
                    found[key] = Tally(tally.dtype)
                found[key].add(tally)
    largest: dict[tuple[str, str], tuple[str, str, str]] = {}
    for key, tally in found.items():
        best = largest.get(key[:2])
        if best is None or tally.count > found[best].count:
            largest[key[:2]] = key
    return {key: found[key] for key in largest.values()}


def _modules(trace: Trace) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for (name, phase, dtype), tally in module_tallies(trace.calls).items():
        rows.setdefault(name, {})[phase] = _figures(tally, dtype)
    return rows


def _figures(tally: Tally, dtype: str) -> dict[str, Any]:
    fmt = find_format(dtype)
    others = max(1, tally.count - tally.zeros)
    below = sum(tally.exponents[: max(0, fmt.min_exponent + 127)]) - tally.zeros if fmt.min_exponent > -126 else 0
    return {
        "dtype": dtype,
        "amax": tally.amax,
        "smallest": tally.smallest if tally.smallest != inf else None,
        "zero": tally.zeros / tally.count,
        "subnormal": max(0, below) / others,
        "infinite": tally.infinities / others,
        "nan": tally.nans / others,
        "headroom_bits": log2(fmt.max / tally.amax) if tally.amax > 0 else None,
    }


def _updates(updates: Sequence[UpdateRecord]) -> dict[str, Any]:
    """Return the share of lost updates, in total and of the worst tensors; of float32 weights, what bfloat16 loses."""
    stored = [one for one in updates if one.dtype != "float32"]
    full = [one for one in updates if one.would_be_lost]
    worst = sorted(stored, key=lambda one: one.share_lost, reverse=True)[:_NUM_WORST]
    return {
        "share_lost": _share(sum(one.lost for one in stored), sum(one.count for one in stored)),
        "share_bfloat16_would_lose": _share(
            sum(one.would_be_lost.get("bfloat16", 0) for one in full), sum(one.count for one in full)
        ),
        "worst": [
            {"name": one.name, "role": one.role, "dtype": one.dtype, "share_lost": one.share_lost} for one in worst
        ],
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _birth(trace: Trace, number: int) -> dict[str, Any]:
    birth = trace.births[number]
    operation: Operation = trace.operations[birth.operation]
    call = operation.call
    line = user_line(call.site)
    return {
        "op": call.op,
        "module": call.module,
        "phase": str(call.phase),
        "line": f"{line.path}:{line.line}" if line else None,
        "nans": birth.nans,
        "infinities": birth.infinities,
        "inputs": [{"dtype": dtype, "smallest": low, "amax": high} for dtype, low, high in birth.inputs],
        "wide": birth.wide,
        "amax_in_float32": birth.wide_amax,
    }
