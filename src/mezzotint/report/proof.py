"""The report of `mezzotint prove`: verdicts, the three ratios, curves, metrics against margins, seeds and memory."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from mezzotint.parity.design import Experiment
from mezzotint.parity.result import ArmResult, MetricResult, Proof, Run, RunStatus
from mezzotint.parity.stats import t_interval
from mezzotint.report.page import COLOURS, chart, render_page, rows_of
from mezzotint.report.proof_words import (
    MEMORY_CLASSES,
    PEAK,
    STYLES,
    decisive,
    design_rows,
    find_cost,
    further_reasons,
    grounds,
    grouped,
    headline,
    main_costs,
    margin_words,
    mean_memory,
    name_words,
    next_steps,
    phrase,
    runs_of,
    seeds_of,
    shown_interval,
    spell_amount,
    spell_bytes,
    spell_interval,
    spell_level,
    spell_ratio,
    spell_share,
    spell_status,
    spell_value,
)

_MAX_POINTS = 150  # of a loss curve
_MAX_BINS = 60  # of a difference curve, whose points are means over steps so that a margin can be seen
_MAX_OPEN_ROWS = 40  # of the per-seed table; a longer one is folded
_FOREST_RANGE = 2.0  # margins to each side
STEP_TIME, PEAK_MEMORY = "step_time", "peak_memory"


def proof_page(proof: Proof) -> str:
    """Return the report as one HTML page."""
    experiment = proof.experiment
    seeds = seeds_of(proof)
    count = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
    curves = _curves(proof)
    return render_page(
        "proof.html",
        title=f"mezzotint prove: {headline(proof)}",
        has_charts=curves is not None,
        heading=headline(proof),
        subheading=", ".join(filter(None, [experiment.target, count, proof.date])),
        cards=[_card(proof, result) for result in proof.results],
        next_steps=next_steps(proof),
        notes=grouped(proof.notes),
        control=experiment.control.name,
        curves=curves,
        differences=_differences(proof),
        level=spell_level(1 - 2 * experiment.alpha),
        metrics=[row for result in proof.results for row in _metric_rows(result)],
        has_several=len(proof.results) > 1,
        range_words=f"{_FOREST_RANGE:g}",
        seed_headings=[name_words(name) for name in _seed_metrics(experiment)],
        seed_rows=_seed_rows(proof),
        max_open_rows=_MAX_OPEN_ROWS,
        memory=_memory_table(proof),
        costs=[
            {
                "arm": result.arm,
                "name": name_words(cost.name),
                "control": spell_amount(cost.control, cost.unit),
                "treatment": spell_amount(cost.treatment, cost.unit),
                "ratio": spell_ratio(cost.ratio),
            }
            for result in proof.results
            for cost in main_costs(result)
        ],
        design=design_rows(experiment, proof.num_looks, len(seeds)),
        recipe=experiment.recipe_toml,
        facts=rows_of(proof.machine),
        command=proof.command,
    )


def _card(proof: Proof, result: ArmResult) -> dict[str, Any]:
    time, peak, metric = find_cost(result, STEP_TIME), find_cost(result, PEAK_MEMORY), decisive(result)
    tiles = []
    if time is not None:
        tiles.append(_ratio_tile("step time", time.ratio.mean, spell_ratio(time.ratio), time.ratio.level))
    if peak is not None:
        tiles.append(_ratio_tile("peak memory", peak.ratio.mean, spell_ratio(peak.ratio), peak.ratio.level))
    if metric is not None and (shown := shown_interval(metric)) is not None:
        value, _, interval = spell_interval(metric).partition(" ")
        tiles.append(
            {
                "value": value,
                "label": f"{name_words(metric.name)}, difference",
                "note": f"{interval.strip('[]').replace(', ', ' to ')} at {spell_level(shown.level)}; "
                f"margin ±{margin_words(metric)}",
            }
        )
    return {
        "style": STYLES[result.verdict],
        "word": str(result.verdict),
        "phrase": phrase(result, proof.experiment.control.name),
        "grounds": grounds(result),
        "reasons": further_reasons(result),
        "tiles": tiles,
        "missing": [name for name, cost in (("step time", time), ("peak memory", peak)) if cost is None],
    }


def _ratio_tile(label: str, mean: float, spelled: str, level: float) -> dict[str, str]:
    interval = spelled.partition(" ")[2].strip("[]").replace(", ", " to ")
    return {
        "value": f"×{mean:.2f}",
        "label": label,
        "note": f"{interval} at {spell_level(level)}" if interval else "of the control's; no spread",
    }


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _binned(losses: Sequence[float], num_steps: int, num_bins: int) -> np.ndarray[Any, Any]:
    """Return means over equal runs of steps; NaN from where the losses end or are not finite."""
    values = np.full(num_steps, np.nan)
    finite = np.asarray(losses[:num_steps], dtype=float)
    values[: len(finite)] = np.where(np.isfinite(finite), finite, np.nan)
    edges = np.linspace(0, num_steps, min(num_bins, num_steps) + 1).astype(int)
    return np.array([values[left:right].mean() for left, right in pairwise(edges)])


def _steps(num_steps: int, num_bins: int) -> np.ndarray[Any, Any]:
    """Return the middle of each bin, steps counted from 1."""
    edges = np.linspace(0, num_steps, min(num_bins, num_steps) + 1).astype(int)
    return np.asarray((edges[:-1] + 1 + edges[1:]) / 2)


def _num_steps(runs: Sequence[Run]) -> int:
    return max((len(run.losses) for run in runs), default=0)


def _curves(proof: Proof) -> Markup | None:
    """The mean training loss of each arm over steps, with the range over its seeds; a cross where runs ended early."""
    import plotly.graph_objects as go

    num_steps = _num_steps(proof.runs)
    if num_steps < 2:
        return None
    steps = _steps(num_steps, _MAX_POINTS)
    figure = go.Figure()
    for index, arm in enumerate(proof.experiment.arms):
        runs = [run for run in runs_of(proof, arm.name) if run.losses]
        if not runs:
            continue
        table = np.array([_binned(run.losses, num_steps, _MAX_POINTS) for run in runs])
        seen = ~np.isnan(table).all(axis=0)
        where, part = steps[seen], table[:, seen]
        low, mean, high = (np.nanmin(part, axis=0), np.nanmean(part, axis=0), np.nanmax(part, axis=0))
        name = str(escape(arm.name))
        if len(runs) > 1:
            figure.add_scatter(
                x=[*where, *where[::-1]], y=_rounded([*high, *low[::-1]]), fill="toself", mode="lines",
                line={"width": 0, "color": _colour(index)}, opacity=0.18, fillcolor=_colour(index),
                hoverinfo="skip", showlegend=False, legendgroup=name,
            )  # fmt: skip
        figure.add_scatter(
            x=where, y=_rounded(mean), mode="lines", name=name, legendgroup=name,
            line={"color": _colour(index), "width": 2 if index else 4},
            hovertemplate="%{y:.4f}",
        )  # fmt: skip
        ended = [run for run in runs if run.status is not RunStatus.FINISHED]
        if ended:
            last = [next((loss for loss in reversed(run.losses) if math.isfinite(loss)), None) for run in ended]
            figure.add_scatter(
                x=[len(run.losses) for run in ended], y=last, mode="markers", name=f"{name}: ended early",
                marker={"symbol": "x", "size": 11, "color": _colour(index)}, legendgroup=name,
                text=[str(escape(f"seed {run.seed}, {spell_status(run)}")) for run in ended],
                hovertemplate="%{text}<extra></extra>",
            )  # fmt: skip
    figure.update_layout(hovermode="x unified", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    figure.update_xaxes(title_text="step")
    figure.update_yaxes(title_text="training loss")
    return chart(figure, "curves")


def _rounded(values: Any) -> list[float]:
    """Return what a picture needs of the figures: six digits, a third of the bytes."""
    return [float(f"{value:.6g}") for value in values]


def _differences(proof: Proof) -> list[dict[str, Any]]:
    """For each treatment, the mean paired difference of the training loss over steps, its interval, and the margin."""
    import plotly.graph_objects as go

    charts = []
    experiment = proof.experiment
    margin = _curve_margin(experiment)
    controls = {run.seed: run for run in runs_of(proof, experiment.control.name)}
    for index, result in enumerate(proof.results):
        pairs = [(controls[run.seed], run) for run in runs_of(proof, result.arm) if run.seed in controls]
        num_steps = max((min(len(one.losses), len(other.losses)) for one, other in pairs), default=0)
        if num_steps < 2:
            continue
        table = np.array(
            [
                _binned(run.losses, num_steps, _MAX_BINS) / _binned(control.losses, num_steps, _MAX_BINS) - 1
                for control, run in pairs
            ]
        )
        points = [
            (step, column[np.isfinite(column)])
            for step, column in zip(_steps(num_steps, _MAX_BINS), table.T, strict=True)
            if np.isfinite(column).any()
        ]
        if not points:
            continue
        where, mean = [step for step, _ in points], [100 * float(values.mean()) for _, values in points]
        figure = go.Figure()
        level = 1 - 2 * experiment.alpha
        bands = [(step, t_interval(values, level)) for step, values in points if len(values) > 1]
        ends = [100 * end for _, band in bands for end in (band.low, band.high)] or mean
        if bands:
            figure.add_scatter(
                x=[step for step, _ in bands] + [step for step, _ in reversed(bands)],
                y=_rounded([100 * band.high for _, band in bands] + [100 * band.low for _, band in reversed(bands)]),
                fill="toself", mode="lines", line={"width": 0, "color": _colour(index + 1)}, opacity=0.25,
                fillcolor=_colour(index + 1), hoverinfo="skip", showlegend=False,
            )  # fmt: skip
        figure.add_scatter(
            x=where, y=_rounded(mean), mode="lines", showlegend=False,
            line={"color": _colour(index + 1), "width": 2}, hovertemplate="step %{x:.0f}: %{y:+.3f}%<extra></extra>",
        )  # fmt: skip
        if margin is not None:
            for value in (-margin * 100, margin * 100):
                figure.add_hline(y=value, line={"dash": "dash", "color": COLOURS[-1], "width": 1.5})
        figure.add_hline(y=0, line={"color": COLOURS[-1], "width": 1})
        largest = float(np.quantile(np.abs(ends), 0.97))
        limit = max(1.2 * largest, 160 * (margin or 0.0)) or 1.0
        figure.update_xaxes(title_text="step")
        figure.update_yaxes(title_text="difference, %", range=[-limit, limit])
        figure.update_layout(hovermode="closest")
        charts.append(
            {
                "arm": result.arm,
                "chart": chart(figure, f"difference-{index}"),
                "margin": None if margin is None else f"{margin * 100:.4g}%",
            }
        )
    return charts


def _curve_margin(experiment: Experiment) -> float | None:
    """Return the margin to draw beside training losses: that of a metric of theirs, else of the first relative one."""
    relative = [metric for metric in experiment.metrics if metric.is_relative]
    named = [metric for metric in relative if metric.name in ("final_loss", "curve")]
    chosen = next(iter(named or relative), None)
    return None if chosen is None else chosen.margin


def _metric_rows(result: ArmResult) -> list[dict[str, Any]]:
    """The metrics with their intervals as a picture in units of the margin, which fits any of them."""
    rows = []
    for index, metric in enumerate(result.metrics):
        shown = shown_interval(metric)
        rows.append(
            {
                "arm": result.arm,
                "is_first": index == 0,
                "name": name_words(metric.name),
                "is_primary": metric.is_primary,
                "control": spell_value(metric.control),
                "treatment": spell_value(metric.treatment),
                "pairs": metric.num_pairs,
                "difference": spell_interval(metric),
                "level": "" if shown is None else spell_level(shown.level),
                "margin": margin_words(metric),
                "verdict": str(metric.verdict),
                "style": STYLES[metric.verdict],
                "reason": metric.reason,
                "picture": _picture(metric),
            }
        )
    return rows


def _picture(metric: MetricResult) -> dict[str, Any] | None:
    """Return where interval and mean stand, in percent of the picture's width, and on which sides it goes on."""
    shown = shown_interval(metric)
    if shown is None or not all(map(math.isfinite, (shown.low, shown.mean, shown.high))):
        return None
    low, mean, high = (value / metric.margin for value in (shown.low, shown.mean, shown.high))

    def place(value: float) -> float:
        return round(50 + 50 * max(-1.0, min(1.0, value / _FOREST_RANGE)), 2)

    return {
        "left": place(low),
        "width": round(max(place(high) - place(low), 0.4), 2),
        "mean": place(mean) if abs(mean) <= _FOREST_RANGE else None,
        "is_cut_left": low < -_FOREST_RANGE,
        "is_cut_right": high > _FOREST_RANGE,
        "words": f"from {low:+.2f} to {high:+.2f} margins",
    }


def _seed_metrics(experiment: Experiment) -> list[str]:
    return [metric.name for metric in experiment.metrics if metric.is_primary]


def _seed_rows(proof: Proof) -> list[dict[str, Any]]:
    """One row a run, grouped by seed; differences against the control of the same seed."""
    experiment = proof.experiment
    names = _seed_metrics(experiment)
    spelled_by = {(result.arm, metric.name): metric for result in proof.results for metric in result.metrics}
    by_pair = {(run.arm, run.seed): run for run in proof.runs}
    rows = []
    for seed in seeds_of(proof):
        control = by_pair.get((experiment.control.name, seed))
        is_first = True
        for arm in experiment.arms:
            run = by_pair.get((arm.name, seed))
            if run is None:
                continue
            cells = []
            for metric in experiment.metrics:
                if metric.name not in names:
                    continue
                value = run.values.get(metric.name)
                base = None if control is None or run is control else control.values.get(metric.name)
                difference = ""
                spelled = spelled_by.get((arm.name, metric.name))
                if value is not None and base is not None and spelled is not None and (base or not metric.is_relative):
                    difference = spell_share(value / base - 1 if metric.is_relative else value - base, spelled)
                cells.append({"value": "-" if value is None else spell_value(value), "difference": difference})
            rows.append(
                {
                    "is_first": is_first,
                    "seed": seed,
                    "arm": arm.name,
                    "cells": cells,
                    "time": spell_amount(float(np.median(run.seconds)), "s") if run.seconds else "-",
                    "digest": run.weights_digest[:8],
                    "status": spell_status(run),
                    "style": "" if run.status is RunStatus.FINISHED else "bad",
                }
            )
            is_first = False
    return rows


def _memory_table(proof: Proof) -> dict[str, Any] | None:
    """Bytes by class for each arm, with their ratio to the control's, and the peak."""
    arms = [arm.name for arm in proof.experiment.arms]
    sizes = {arm: mean_memory(proof, arm) for arm in arms}
    if not any(sizes.values()):
        return None
    base = sizes[arms[0]]
    present = dict.fromkeys(name for arm in arms for name in sizes[arm])
    order = [name for name in MEMORY_CLASSES if name in present]
    order += [name for name in present if name not in MEMORY_CLASSES and name != PEAK] + [PEAK] * (PEAK in present)
    largest = max((size for arm in arms for size in sizes[arm].values()), default=0) or 1
    rows = []
    for name in order:
        cells = []
        for index, arm in enumerate(arms):
            size = sizes[arm].get(name)
            ratio = f"×{size / base[name]:.2f}" if index and size is not None and base.get(name) else ""
            cells.append(
                {
                    "size": "-" if size is None else spell_bytes(size),
                    "ratio": ratio,
                    "share": 0 if size is None else round(100 * size / largest, 1),
                    "colour": _colour(index),
                }
            )
        if any(sizes[arm].get(name) for arm in arms):
            rows.append({"name": MEMORY_CLASSES.get(name, name_words(name)), "is_peak": name == PEAK, "cells": cells})
    return {"arms": arms, "rows": rows}
