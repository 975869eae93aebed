"""The report of `mezzotint bench`: a roofline, the bandwidth of what computes little, and every measurement."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from mezzotint.bench.cases import PRODUCTS, Op
from mezzotint.bench.result import TOO_NOISY, BenchResult, CaseResult, Measurement, Verdict
from mezzotint.hardware.timings import spell_ratio
from mezzotint.report.page import COLOURS, chart, render_page, rows_of

STYLES = {Verdict.FASTER: "good", Verdict.SLOWER: "bad", Verdict.EVEN: "", Verdict.UNCLEAR: "unsure"}


def bench_page(result: BenchResult, command: str) -> str:
    """Return the report as one HTML page."""
    sources = sorted({roof.source for roof in result.roofs})
    memory = result.roof("")
    counts = [len(m.seconds) for case in result.cases for m in case.measurements] or [0]
    return render_page(
        "bench.html",
        title=f"mezzotint bench: {result.name}",
        heading=result.name,
        subheading=f"{result.device}, torch {result.facts.get('torch', '?')}, {result.facts.get('date', '')}",
        summary=summarise(result),
        noisy=[str(case) for case in result.noisy],
        num_cases=len(result.cases),
        too_noisy=f"{TOO_NOISY:.0%}",
        roof_sources=", ".join(sources),
        roofline=_roofline(result),
        bandwidth=_bandwidth(result),
        bandwidth_roof="unknown" if memory is None else f"{spell_rate(memory.value, 'B/s')}, {memory.source}",
        rows=[row for case in result.cases for row in table_rows(result, case)],
        refused=refusals(result),
        facts=rows_of(result.facts),
        least=min(counts),
        most=max(counts),
        command=command,
    )


def summarise(result: BenchResult) -> list[str]:
    """Return, for each format, its products' speed against float32 in a sentence: the median over shapes, the range."""
    ratios: dict[str, list[float]] = {}
    for found in result.cases:
        for measurement in found.measurements:
            ratio = found.ratio(measurement)
            if found.case.op in PRODUCTS and ratio is not None and measurement.format != "float32":
                ratios.setdefault(measurement.label, []).append(ratio.median)
    lines = []
    for label, values in ratios.items():
        middle = median(values)
        word = (
            f"run {spell_ratio(1 / middle)} times as fast as"
            if middle < 1
            else f"take {spell_ratio(middle)} times as long as"
        )
        if 0.95 < middle < 1.05:
            word = "run as fast as"
        lines.append(
            f"Matrix products in {label} {word} in float32 (time {spell_ratio(min(values))} to "
            f"{spell_ratio(max(values))} of float32's over {len(values)} shapes and layouts)."
        )
    return lines


def refusals(result: BenchResult) -> list[tuple[str, str]]:
    """Return what was not run and why, one entry for each format and reason."""
    places: dict[tuple[str, str], list[str]] = {}
    for found in result.cases:
        for name, reason in found.refused:
            places.setdefault((name, reason), []).append(str(found.case))
    return [
        (name if len(cases) > 3 else f"{name}: {', '.join(cases)}", reason) for (name, reason), cases in places.items()
    ]


def table_rows(result: BenchResult, found: CaseResult) -> list[dict[str, Any]]:
    """Return what a table shows of one case, as words, one entry for each format."""
    rows = []
    for index, measurement in enumerate(found.measurements):
        low, high = measurement.quartiles_seconds
        ratio = found.ratio(measurement)
        is_base = measurement is found.base
        rows.append(
            {
                "is_first": index == 0,
                "op": str(found.case.op),
                "shape": "x".join(map(str, found.case.shape)),
                "label": measurement.label,
                "median": spell_seconds(measurement.median_seconds),
                "quartiles": f"{spell_seconds(low)} - {spell_seconds(high)}",
                "speed": spell_speed(measurement),
                "share": spell_share(result, measurement),
                "ratio": "1" if is_base or ratio is None else f"{ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
                "verdict": "" if is_base or ratio is None else str(ratio.verdict),
                "style": "" if is_base or ratio is None else STYLES[ratio.verdict],
            }
        )
    return rows


def spell_speed(measurement: Measurement) -> str:
    """Return operations per second where they are counted, else bytes per second."""
    flops = measurement.flops_per_second
    return spell_rate(measurement.bytes_per_second, "B/s") if flops is None else spell_rate(flops, "FLOP/s")


def spell_share(result: BenchResult, measurement: Measurement) -> str:
    """Return the share of the device's limit that was reached: of the format's peak, or of the memory's."""
    flops = measurement.flops_per_second
    roof = result.roof("" if flops is None else measurement.format)
    if roof is None:
        return "-"
    return f"{(measurement.bytes_per_second if flops is None else flops) / roof.value:.0%}"


def spell_rate(value: float, unit: str) -> str:
    """Return a rate with three digits and a prefix.

    >>> spell_rate(312e12, "FLOP/s")
    '312 TFLOP/s'
    """
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def spell_seconds(value: float) -> str:
    """Return a time with three digits in s, ms or us."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def _colour(labels: Sequence[str], label: str) -> str:
    return COLOURS[labels.index(label) % len(COLOURS)]


def _labels(result: BenchResult) -> list[str]:
    return list(dict.fromkeys(m.label for case in result.cases for m in case.measurements))


def _roofline(result: BenchResult) -> Markup:
    from plotly import graph_objects

    labels = _labels(result)
    figure = graph_objects.Figure()
    points: dict[str, list[tuple[float, float, str]]] = {}
    for found in result.cases:
        for m in found.measurements:
            if m.case.flops is not None and m.flops_per_second is not None:
                intensity = m.case.flops / m.case.bytes_moved(m.format)
                points.setdefault(m.label, []).append((intensity, m.flops_per_second, str(m.case)))
    intensities = [x for values in points.values() for x, _, _ in values] or [1.0]
    memory = result.roof("")
    knees = [roof.value / memory.value for roof in result.roofs if memory and roof.format]
    left, right = min([*intensities, *knees]) / 4, max(intensities) * 4
    for roof in result.roofs:
        if not roof.format or roof.format not in labels:
            continue
        knee = roof.value / memory.value if memory else left
        line = [(left, left * memory.value)] if memory and left < knee else []
        line += [(max(knee, left), roof.value), (max(right, knee), roof.value)]
        figure.add_scatter(
            x=[x for x, _ in line],
            y=[y for _, y in line],
            mode="lines",
            line={"color": _colour(labels, roof.format), "dash": "dot", "width": 1.5},
            name=f"{roof.format} peak",
            hovertemplate=f"{roof.format}: {spell_rate(roof.value, 'FLOP/s')}, {roof.source}<extra></extra>",
            showlegend=False,
        )
    for label, values in points.items():
        figure.add_scatter(
            x=[x for x, _, _ in values],
            y=[y for _, y, _ in values],
            text=[text for _, _, text in values],
            mode="markers",
            marker={"color": _colour(labels, label), "size": 9, "symbol": _symbol(labels, label)},
            name=label,
            hovertemplate="%{text}<br>%{x:.3g} FLOP per byte, %{y:.3s}FLOP/s<extra></extra>",
        )
    figure.update_xaxes(type="log", title="operations per byte", dtick=1, minor={"ticks": "outside"})
    figure.update_yaxes(type="log", title="FLOP/s", dtick=1, tickformat="~s", minor={"ticks": "outside"})
    figure.update_layout(legend={"orientation": "h", "y": 1.08, "x": 0})
    return chart(figure, "roofline")


def _symbol(labels: Sequence[str], label: str) -> str:
    return ("circle", "square", "diamond", "triangle-up", "x", "star", "cross")[labels.index(label) % 7]


def _bandwidth(result: BenchResult) -> Markup | None:
    from plotly import graph_objects

    labels = _labels(result)
    cases = [found for found in result.cases if found.case.flops is None]
    if not cases:
        return None
    figure = graph_objects.Figure()
    for label in labels:
        pairs = [(found.case, m) for found in cases for m in found.measurements if m.label == label]
        if pairs:
            figure.add_bar(
                x=[_short(case.op, case.shape) for case, _ in pairs],
                y=[m.bytes_per_second for _, m in pairs],
                name=label,
                marker={"color": _colour(labels, label)},
                hovertemplate="%{x}: %{y:.3s}B/s<extra></extra>",
            )
    memory = result.roof("")
    if memory:
        figure.add_hline(y=memory.value, line={"dash": "dash", "color": COLOURS[-1]})
    figure.update_yaxes(title="bytes per second", tickformat="~s", rangemode="tozero")
    figure.update_layout(barmode="group", legend={"orientation": "h", "y": 1.08, "x": 0})
    return chart(figure, "bandwidth")


def _short(op: Op, shape: tuple[int, ...]) -> str:
    return f"{op}<br>{'x'.join(map(str, shape))}"
