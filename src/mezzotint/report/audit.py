"""The report of an audit: verdict and findings first, then what ran, in which format, with which numbers.

Its pictures are tables coloured by style sheet: the dtype map, the heat map of exponents and the course of a step have
cells, not curves, and a page of them is a tenth of the size of a plotting library. Rows are cut where a reader
would not follow any more, and the page says how many were left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from mezzotint.findings import Finding
from mezzotint.formats.catalog import find_format
from mezzotint.report.page import render_page, rows_of
from mezzotint.trace.places import user_line
from mezzotint.trace.record import Call, Kind, ParameterRecord, Phase, Site, Trace
from mezzotint.trace.summary import (
    SHOWN_PHASES,
    ModuleNode,
    cast_rows,
    format_work,
    module_tree,
    shares,
    step_courses,
)
from mezzotint.trace.tally import Tally, best_scale, what_if
from mezzotint.trace.watch_row import module_tallies

MAX_ROWS = 2000
MAX_HEAT_ROWS = 240
MAX_SMALL_ROWS = 60
_LIMITED = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_LOWEST, _HIGHEST = -60, 40  # powers of two beyond which the heat map gathers what there is
_KNOWN = ("float32", "bfloat16", "float16", "float64")


def render_audit(
    trace: Trace, findings: Sequence[Finding], *, verdict: str, policy: str, is_policy_declared: bool
) -> str:
    """Return the page."""
    operations = list(_operations(trace))
    heat = _heat(trace)
    return render_page(
        "audit.html",
        f"Audit: {verdict}",
        has_charts=False,
        verdict=verdict,
        policy=policy,
        is_policy_declared=is_policy_declared,
        command=trace.command,
        findings=[_finding(one) for one in findings],
        work=_work(trace),
        uncovered=sum(one.uncovered for formats in format_work(trace).values() for one in formats.values()),
        phases=[str(phase) for phase in SHOWN_PHASES],
        modules=list(_module_rows(module_tree(trace), 0, "")),
        heat=heat,
        what_if=_what_if(trace),
        updates=_updates(trace),
        casts=_casts(trace),
        courses=_courses(trace),
        parameters=_parameters(trace.parameters),
        operations=operations[:MAX_ROWS],
        left_out=max(0, len(operations) - MAX_ROWS),
        notes=trace.notes,
        facts=rows_of(trace.facts),
        steps=[
            {
                "index": step.index,
                "operations": step.end - step.first,
                "seconds": f"{step.seconds:.4g}",
                "loss": "" if step.loss is None else f"{step.loss:.6g}",
                "outcome": "skipped" if step.is_skipped else ", ".join(step.optimizers),
            }
            for step in trace.steps
        ],
    )


def _finding(finding: Finding) -> dict[str, Any]:
    code = finding.evidence.get("code")
    return {
        "code": finding.code,
        "severity": str(finding.severity),
        "message": finding.message,
        "place": f"{finding.path}:{finding.line}" if finding.path else "",
        "source": str(code) if code else _source_line(finding),
        "where": " · ".join(filter(None, (finding.module, finding.op, finding.phase))),
        "advice": finding.advice,
        "evidence": [
            (key.replace("_", " "), _words(value)) for key, value in finding.evidence.items() if key != "code"
        ],
    }


def _source_line(finding: Finding) -> str:
    """Return the line of the user's program that a finding is about, if it can be read."""
    import linecache

    if not finding.path or not finding.line:
        return ""
    return linecache.getline(finding.path, finding.line).strip()


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_words(item) for item in value)
    return str(value)


def _class(dtype: str) -> str:
    """Return the style of a format: the same colour all over the page."""
    if dtype in _KNOWN:
        return dtype
    return "float8" if dtype.startswith("float8") else "other"


def _work(trace: Trace) -> list[dict[str, Any]]:
    """Return a row for each phase: the share of each format."""
    steps = max(1, len(trace.steps))
    rows = []
    for phase, work in sorted(format_work(trace).items(), key=lambda item: list(Phase).index(item[0])):
        rows.append(
            {
                "phase": str(phase),
                "parts": _parts(shares(work)),
                "operations": f"{sum(one.operations for one in work.values()) / steps:,.0f}",
                "flops": _scaled(sum(one.flops for one in work.values()) / steps),
                "bytes": _bytes(sum(one.nbytes for one in work.values()) / steps),
            }
        )
    return rows


def _parts(found: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [
        {"dtype": dtype, "style": _class(dtype), "percent": f"{100 * share:.2f}", "words": f"{dtype} {share:.1%}"}
        for dtype, share in found
        if share >= 0.0005
    ]


def _scaled(flops: float) -> str:
    for limit, unit in ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if flops >= limit:
            return f"{flops / limit:.3g} {unit}"
    return f"{flops:,.0f} FLOP"


def _bytes(number: float) -> str:
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.0f} B"


def _module_rows(nodes: Sequence[ModuleNode], depth: int, parent: str) -> Iterator[dict[str, Any]]:
    for number, node in enumerate(nodes):
        key = f"{parent}{number}."
        name = node.path if not depth else node.path.rpartition(".")[2]
        yield {
            "key": key,
            "depth": depth,
            "path": node.path,
            "name": f"{name} – {node.last}" if node.alike > 1 else name,
            "alike": node.alike,
            "kind": node.kind,
            "has_children": bool(node.children),
            "cells": [
                {"parts": _parts(shares(node.work[phase])), "main": shares(node.work[phase])[0][0]}
                if phase in node.work and shares(node.work[phase])
                else None
                for phase in SHOWN_PHASES
            ],
        }
        yield from _module_rows(node.children, depth + 1, key)


@dataclass(frozen=True, slots=True)
class _Axis:
    lowest: int
    highest: int

    @property
    def width(self) -> int:
        return self.highest - self.lowest + 1


def _heat(trace: Trace) -> dict[str, Any]:
    """Return the heat map: for each module and phase the share of numbers at each power of two, in ten shades."""
    tallies = {key: tally for key, tally in module_tallies(trace.calls).items() if tally.count > tally.zeros}
    ends = [tally.ends for tally in tallies.values() if tally.ends is not None]
    if not ends:
        return {"rows": [], "limits": [], "left_out": 0, "lowest": 0, "highest": 0}
    axis = _Axis(max(_LOWEST, min(low for low, _ in ends)), min(_HIGHEST, max(17, *(high for _, high in ends))))
    rows = []
    for (name, phase, dtype), tally in list(tallies.items())[:MAX_HEAT_ROWS]:
        rows.append(
            {
                "name": name,
                "phase": phase,
                "dtype": dtype,
                "style": _class(dtype),
                "cells": _shades(tally, axis),
                "amax": f"{tally.amax:.3g}",
                "smallest": f"{tally.smallest:.2g}",
                "zero": f"{tally.zeros / tally.count:.1%}",
                "special": tally.nans + tally.infinities,
            }
        )
    return {
        "rows": rows,
        "left_out": max(0, len(tallies) - MAX_HEAT_ROWS),
        "limits": [_limit(name, axis) for name in _LIMITED],
        "lowest": axis.lowest,
        "highest": axis.highest,
    }


def _shades(tally: Tally, axis: _Axis) -> list[int]:
    """Return a shade from 0 to 9 for each power of two, by the logarithm of its share."""
    total = max(1, tally.count - tally.zeros - tally.nans - tally.infinities)
    counts = [0] * axis.width
    for field, count in enumerate(tally.exponents[:255]):
        if count and field:
            counts[min(axis.width - 1, max(0, field - 127 - axis.lowest))] += count
    return [0 if not count else max(1, min(9, ceil(9 + 1.3 * log2(count / total)))) if count else 0 for count in counts]


def _limit(name: str, axis: _Axis) -> dict[str, Any]:
    """Return where a format's subnormal and normal numbers lie on the axis, in percent."""
    fmt = find_format(name)

    def place(power: float) -> float:
        return min(100.0, max(0.0, 100 * (power - axis.lowest) / axis.width))

    bottom, normal, top = place(log2(fmt.smallest_subnormal)), place(fmt.min_exponent), place(fmt.max_exponent + 1)
    return {
        "name": name,
        "style": _class(name),
        "bottom": f"{bottom:.2f}",
        "subnormal": f"{normal - bottom:.2f}",
        "normal": f"{top - normal:.2f}",
        "words": f"{name}: {fmt.smallest_subnormal:.2g} to {fmt.max:.5g}, normal from {fmt.smallest_normal:.2g}",
    }


def _what_if(trace: Trace) -> list[dict[str, Any]]:
    """Return for forward outputs and gradients what each format would lose, as they are and at the best scale."""
    rows = []
    for phase in ("forward", "backward"):
        total: Tally | None = None
        for (_, of, _), tally in module_tallies(trace.calls).items():
            if of == phase:
                total = total or Tally("")
                total.add(tally)
        if total is None:
            continue
        for name in _LIMITED:
            fmt = find_format(name)
            scale = best_scale(total, fmt)
            plain, best = what_if(total, fmt), what_if(total, fmt, scale)
            rows.append(
                {
                    "phase": "outputs" if phase == "forward" else "gradients",
                    "format": name,
                    "style": _class(name),
                    "plain": [f"{value:.2%}" for value in (plain.overflow, plain.underflow, plain.subnormal)],
                    "scale": f"2^{log2(scale):.0f}",
                    "best": [f"{value:.2%}" for value in (best.overflow, best.underflow, best.subnormal)],
                }
            )
    return rows


def _updates(trace: Trace) -> list[dict[str, Any]]:
    found = sorted(
        trace.updates,
        key=lambda one: (one.share_lost, max(one.would_be_lost.values(), default=0) / max(1, one.count)),
        reverse=True,
    )
    return [
        {
            "name": one.name,
            "role": one.role,
            "dtype": one.dtype,
            "style": _class(one.dtype),
            "count": f"{one.count:,}",
            "lost": f"{one.share_lost:.1%}",
            "percent": f"{100 * one.share_lost:.1f}",
            "would": {name: f"{lost / one.count:.1%}" for name, lost in one.would_be_lost.items()},
            "op": one.op.removeprefix("aten.").partition(".")[0] if one.op.startswith("aten.") else "step",
            "place": _line(one.site),
            "is_sampled": one.is_sampled,
        }
        for one in found[:MAX_SMALL_ROWS]
    ]


def _line(site: Site) -> str:
    frame = user_line(site)
    return f"{frame.path}:{frame.line}" if frame is not None else ""


def _casts(trace: Trace) -> list[dict[str, Any]]:
    return [
        {
            "source": row.source,
            "target": row.target,
            "source_style": _class(row.source),
            "target_style": _class(row.target),
            "module": row.module,
            "place": f"{row.line.path}:{row.line.line}" if row.line else "",
            "per_step": f"{row.per_step:.1f}",
            "bytes": _bytes(row.bytes_per_step),
            "repeated": row.repeated or "",
        }
        for row in cast_rows(trace)[:MAX_SMALL_ROWS]
    ]


def _courses(trace: Trace) -> list[dict[str, Any]]:
    return [
        {
            "index": one.index,
            "phases": [f"p-{phase}" for phase in one.phases],
            "formats": [_class(dtype) for dtype in one.formats],
            "marks": [(f"{100 * place:.1f}", name) for place, name in one.marks],
        }
        for one in step_courses(trace)[:6]
    ]


def _parameters(parameters: Sequence[ParameterRecord]) -> list[dict[str, Any]]:
    """Return weights grouped by the dtypes of weight, gradient and states."""
    groups: dict[tuple[str, str, str, str], list[ParameterRecord]] = {}
    for one in parameters:
        states = ", ".join(f"{key} {dtype}" for key, dtype in sorted(one.states.items()))
        groups.setdefault((one.dtype, one.grad_dtype or "none", states, one.optimizer or "none"), []).append(one)
    rows = []
    for (dtype, grad, states, optimizer), members in groups.items():
        elements = 0
        for one in members:
            size = 1
            for length in one.shape:
                size *= length
            elements += size
        rows.append(
            {
                "dtype": dtype,
                "style": _class(dtype),
                "grad": grad,
                "states": states,
                "optimizer": optimizer,
                "tensors": len(members),
                "elements": f"{elements:,}",
                "names": ", ".join(one.name for one in members[:4]) + (" ..." if len(members) > 4 else ""),
            }
        )
    return rows


def _operations(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield a row for each call, those that move most bytes first."""
    counts = trace.counts()
    steps = max(1, len(trace.steps))
    calls = [call for call in trace.calls if call.kind is not Kind.VIEW and counts.get(call.index)]
    calls.sort(key=lambda call: call.nbytes * counts.get(call.index, 0), reverse=True)
    for call in calls:
        count = counts.get(call.index, 0) / steps
        tally = next((one for one in call.tallies if one is not None), None)
        yield {
            "phase": str(call.phase),
            "module": call.module,
            "op": call.op.removeprefix("aten."),
            "inputs": _dtypes(call, call.inputs),
            "outputs": _dtypes(call, call.outputs),
            "style": _class(call.format or "other"),
            "format": call.format or "",
            "shape": "x".join(str(length) for length in call.outputs[0].shape) if call.outputs else "",
            "count": f"{count:.3g}",
            "flops": "" if call.flops is None else f"{count * call.flops / 1e6:.4g}",
            "mib": f"{count * call.nbytes / 2**20:.4g}",
            "amax": "" if tally is None else f"{tally.amax:.3g}",
            "place": _line(call.site),
        }


def _dtypes(call: Call, metas: Sequence[Any]) -> str:
    seen = dict.fromkeys(meta.dtype for meta in metas)
    return ", ".join(list(seen)[:4])
