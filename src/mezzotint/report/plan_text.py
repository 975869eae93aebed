"""A plan in the terminal: the table over cards and precisions, then why, what to change, and what was assumed."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mezzotint.plan.distributed import DistributedPlan
from mezzotint.plan.memory import largest_batch
from mezzotint.plan.plan import Plan, advice, reasons

GIB = 1 << 30
_MAX_LINES = 5
_WIDE = 110


def print_plans(
    console: Console,
    plans: Sequence[Plan],
    several: Sequence[DistributedPlan] = (),
    *,
    price: float | None,
    batch: int | None,
    report_path: str | None,
) -> None:
    """Print the plans of one program; those of one card are neighbours."""
    console.print(_table(plans, price=price, batch=batch, is_narrow=console.width < _WIDE))
    if several:
        console.print(_distributed_table(several))
    for line in notes(plans):
        console.print(Text(line), soft_wrap=True)
    if report_path is not None:
        console.print(Text(f"report  {report_path}"), soft_wrap=True)


def _table(plans: Sequence[Plan], *, price: float | None, batch: int | None, is_narrow: bool) -> Table:
    unit = next((plan.unit for plan in plans if plan.unit), "items")
    table = Table(box=None, pad_edge=False)
    headings = ["", "step", "expected, ms", f"{unit}/s", "MFU", "peak", "reserved", "fits"]
    left_out = {"MFU", "reserved"} if is_narrow else set()
    if price is not None:
        headings.append(f"per million {unit}")
    if batch is not None:
        headings.append("largest batch")
    for heading in headings:
        if heading not in left_out:
            table.add_column(
                heading,
                header_style="bold",
                justify="left" if heading in ("", "fits") else "right",
                min_width=max(len(plan.run.spec.name) for plan in plans) if not heading else None,
            )
    last = ""
    for plan in plans:
        if plan.run.spec.name != last:
            last = plan.run.spec.name
            table.add_row(Text(last, style="bold", no_wrap=True))
        cells = row(plan)
        if price is not None:
            cost = plan.price_per_million(price)
            cells.append("" if cost is None else f"{cost:.3g}")
        if batch is not None:
            most = largest_batch(plan.memory, batch)
            cells.append("" if most is None else str(most))
        table.add_row(*(cell for heading, cell in zip(headings, cells, strict=True) if heading not in left_out))
    return table


def _distributed_table(several: Sequence[DistributedPlan]) -> Table:
    first = several[0]
    unit = first.plan.unit or "items"
    title = f"{first.world} cards, {first.strategy}: extrapolated from one card and its links, not run"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for heading in ("", "step", "expected, ms", f"{unit}/s", "exposed", "peak", "fits"):
        table.add_column(
            heading,
            header_style="bold",
            justify="left" if heading in ("", "fits") else "right",
            min_width=max(len(one.plan.run.spec.name) for one in several) if not heading else None,
        )
    last = ""
    for one in several:
        if one.plan.run.spec.name != last:
            last = one.plan.run.spec.name
            table.add_row(Text(last, style="bold", no_wrap=True))
        rate = one.items_per_second
        table.add_row(
            one.plan.precision.name,
            f"{_three_digits(one.seconds * 1e3)} ms",
            f"{_three_digits(one.low * 1e3)}-{_three_digits(one.high * 1e3)}",
            "" if rate is None else _three_digits(rate),
            f"{_three_digits(one.exposed * 1e3)} of {_three_digits(one.communication * 1e3)} ms",
            spell_size(one.peak_allocated),
            {True: "yes", False: "no", None: ""}[one.fits],
        )
    return table


def row(plan: Plan) -> list[str]:
    """Return a plan as cells: precision, step, interval, rate, utilisation, peak, reserved, fits."""
    time, memory = plan.time, plan.memory
    rate, share = plan.items_per_second, plan.utilisation
    return [
        plan.precision.name,
        f"{_three_digits(time.seconds * 1e3)} ms",
        f"{_three_digits(time.low * 1e3)}-{_three_digits(time.high * 1e3)}{' host' if time.is_host_bound else ''}",
        "" if rate is None else _three_digits(rate),
        "" if share is None else f"{share:.0%}",
        spell_size(memory.peak_allocated),
        spell_size(memory.peak_reserved),
        {True: "yes", False: "no", None: ""}[memory.fits],
    ]


def _three_digits(value: float) -> str:
    """Return a positive number with three digits that mean something, and never an exponent."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"


def spell_size(nbytes: int) -> str:
    """Return bytes as GiB, small ones as MiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / (1 << 20):.4g} MiB"


def notes(plans: Sequence[Plan]) -> list[str]:
    """Return the sentences under the table."""
    lines: list[str] = []
    for name in dict.fromkeys(plan.run.spec.name for plan in plans):
        of_card = [plan for plan in plans if plan.run.spec.name == name]
        lines += [f"{name}: {line}" for line in reasons(of_card)]
    first = plans[0]
    at_peak = sorted(first.memory.at_peak.items(), key=lambda item: -item[1])
    held = ", ".join(
        f"{role} {spell_size(size)}" for role, size in at_peak if size > first.memory.peak_allocated // 200
    )
    module = f" of {first.memory.peak_module}" if first.memory.peak_module else ""
    lines.append(f"peak    {held}; in {first.memory.peak_phase}{module}")
    lines += [f"advice  {text}" for text in dict.fromkeys(text for plan in plans for text in advice(plan))]
    uncovered = first.time.uncovered
    if uncovered:
        lines.append(
            f"without a formula of their own (bytes, or a guess): {', '.join(list(uncovered)[:_MAX_LINES])}, "
            f"{sum(uncovered.values()) / (first.time.gpu or 1):.1%} of GPU time"
        )
    assumed = sorted(first.run.assumed.items(), key=lambda item: -item[1])
    for (path, line, what), count in assumed[:_MAX_LINES]:
        lines.append(f"assumed {what}, {count} times, at {path}:{line}: a ghost has no numbers")
    if len(assumed) > _MAX_LINES:
        lines.append(f"... and at {len(assumed) - _MAX_LINES} more places")
    lines += [f"note    {note}" for note in first.run.notes]
    if first.run.compiled:
        names = ", ".join(first.run.compiled[:_MAX_LINES])
        lines.append(
            f"note    {names} would be compiled: runs of small operations are fused"
            if first.run.is_compiled
            else f"note    {names} would be compiled, {first.run.compiled_share:.0%} of the forward pass: the step is "
            "planned as if nothing were"
        )
    return lines
