"""The report of `mezzotint plan`: the table, memory over the step, the roofline, modules and operations."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from mezzotint.plan.costs import Work
from mezzotint.plan.efficiency import bandwidth, sustained
from mezzotint.plan.memory import CLASSES
from mezzotint.plan.plan import Plan
from mezzotint.report.page import COLOURS, chart, render_page
from mezzotint.report.plan_text import GIB, notes, row

_MAX_ROWS = 60
_MAX_POINTS = 600
_PHASES = ("forward", "recompute", "backward", "optimizer", "other")


def plan_page(plans: Sequence[Plan], command: str) -> str:
    """Return the report as one HTML page; charts show the first plan of each card in the precision as written."""
    shown = plans[0]
    return render_page(
        "plan.html",
        title=f"mezzotint plan: {command}",
        heading="Plan",
        subheading=f"{command}, on a simulated GPU: nothing here was measured",
        unit=shown.unit or "items",
        rows=[{"card": plan.run.spec.name, "cells": row(plan), "fits": plan.memory.fits} for plan in plans],
        notes=notes(plans),
        shown=f"{shown.run.spec.name}, {shown.precision.name}",
        memory=_memory(shown),
        roofline=_roofline(shown),
        holders=[
            {"role": one.role, "module": one.module, "op": one.op, "size": f"{one.nbytes / GIB:.3f} GiB"}
            for one in shown.memory.holders[:20]
        ],
        modules=_modules(shown),
        phases=_PHASES,
        formats=_formats(shown),
        calls=_calls(shown),
    )


def _memory(plan: Plan) -> Markup:
    """Bytes by class over the operations of the step, stacked, with the card's limit if it is near."""
    import plotly.graph_objects as go

    figure = go.Figure()
    points = plan.memory.timeline
    colours = (*COLOURS, "#444444")
    for index, name in enumerate(CLASSES):
        values = [sizes[index] / GIB for _, sizes in points]
        if any(values):
            figure.add_scatter(
                x=[operation for operation, _ in points], y=values, name=name, stackgroup="memory", mode="lines",
                line={"width": 0, "color": colours[index]}, hovertemplate="%{y:.3f} GiB",
            )  # fmt: skip
    capacity = plan.memory.capacity
    if capacity is not None and plan.memory.peak_allocated > 0.5 * capacity:
        figure.add_hline(y=capacity / GIB, line={"dash": "dash"}, annotation_text=f"{plan.run.spec.name}")
    figure.update_layout(hovermode="x unified", legend={"orientation": "h", "y": 1.08})
    figure.update_xaxes(title_text="operation of the step")
    figure.update_yaxes(title_text="GiB allocated", rangemode="tozero")
    return chart(figure, "memory")


def _roofline(plan: Plan) -> Markup:
    """Each call by its operations per byte, and the operations per second that are expected of it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    groups: dict[str, list[Any]] = defaultdict(list)
    for one in sorted(plan.time.calls, key=lambda one: -one.seconds)[:_MAX_POINTS]:
        if one.cost.flops and one.cost.nbytes and one.estimate.seconds:
            groups[str(one.cost.work)].append(one)
    for name, ones in groups.items():
        figure.add_scatter(
            x=[one.cost.flops / one.cost.nbytes for one in ones],
            y=[one.cost.flops / one.estimate.seconds / 1e12 for one in ones],
            mode="markers", name=name,
            marker={"size": [max(5, min(26, 5 + 60 * (one.seconds / plan.time.gpu) ** 0.5)) for one in ones]},
            text=[
                f"{escape(one.call.name)} {escape(one.call.module)}<br>{one.count} times, {one.seconds * 1e3:.3f} ms, "
                f"{one.estimate.wall}"
                for one in ones
            ],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    card, name = plan.run.spec, plan.products_format
    roof, slope = sustained(card, name), bandwidth(card)
    knee = roof / slope
    figure.add_scatter(
        x=[0.05, knee, 20000], y=[0.05 * slope / 1e12, roof / 1e12, roof / 1e12], mode="lines",
        name=f"what {name} reaches", line={"dash": "dash"}, hoverinfo="skip",
    )  # fmt: skip
    figure.update_xaxes(type="log", title_text="operations per byte")
    figure.update_yaxes(type="log", title_text="10^12 operations per second")
    figure.update_layout(legend={"orientation": "h", "y": 1.08})
    return chart(figure, "roofline")


def _modules(plan: Plan) -> list[dict[str, str]]:
    """GPU time by module, those that are numbered alike together."""
    seconds: dict[str, float] = defaultdict(float)
    products: dict[str, float] = defaultdict(float)
    formats: dict[str, set[str]] = defaultdict(set)
    for one in plan.time.calls:
        name = f"{_alike(one.call.module) or '(no module)'}, {one.call.phase}"
        seconds[name] += one.seconds
        if one.cost.work is not Work.BYTES:
            products[name] += one.seconds
            formats[name].add(one.cost.format)
    total = plan.time.gpu or 1.0
    ordered = sorted(seconds.items(), key=lambda item: -item[1])[:_MAX_ROWS]
    return [
        {
            "name": name,
            "time": f"{spent * 1e3:.3f}",
            "share": f"{spent / total:.1%}",
            "products": f"{products[name] / spent:.0%}" if spent else "",
            "formats": ", ".join(sorted(formats[name])),
        }
        for name, spent in ordered
    ]


def _formats(plan: Plan) -> list[dict[str, Any]]:
    """The dtype map: what share of a module's GPU time in each phase is spent in which format."""
    seconds: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(float)))
    totals: dict[str, float] = defaultdict(float)
    for one in plan.time.calls:
        name = _alike(one.call.module) or "(no module)"
        seconds[name][str(one.call.phase)][one.cost.format] += one.seconds
        totals[name] += one.seconds
    return [
        {"name": name, "cells": [_shares(seconds[name].get(phase, {})) for phase in _PHASES]}
        for name in sorted(totals, key=lambda name: -totals[name])[:_MAX_ROWS]
    ]


def _shares(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {spent / total:.0%}" for name, spent in ordered if spent >= total / 100) if total else ""


def _alike(module: str) -> str:
    """Return a module's name with a star for each number in it: blocks that are alike are one."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _calls(plan: Plan) -> list[dict[str, str]]:
    """The operations that take most time, those of blocks that are alike together."""
    total = plan.time.gpu or 1.0
    groups: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for one in plan.time.calls:
        shapes = " ".join("x".join(map(str, meta.shape)) for meta in one.call.inputs[:3])
        place = f"{one.call.line.path}:{one.call.line.line}" if one.call.line is not None else ""
        wall = one.estimate.wall if one.cost.has_formula else f"{one.estimate.wall} (bytes only)"
        phase = str(one.call.phase)
        groups[one.call.name, _alike(one.call.module), phase, shapes, one.cost.format, wall, place].append(one)
    rows = []
    for (name, module, phase, shapes, format_name, wall, place), ones in groups.items():
        seconds = sum(one.seconds for one in ones)
        rows.append(
            (
                seconds,
                {
                    "op": name,
                    "module": module,
                    "phase": phase,
                    "shapes": shapes,
                    "format": format_name,
                    "count": str(sum(one.count for one in ones)),
                    "time": f"{seconds * 1e3:.3f}",
                    "share": f"{seconds / total:.1%}",
                    "wall": wall,
                    "place": place,
                    "short": place.rpartition("/")[2],
                },
            )
        )
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])[:_MAX_ROWS]]
