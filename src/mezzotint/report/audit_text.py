"""The terminal summary of an audit: verdict, findings, then formats, casts, lost updates and what was not seen."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mezzotint.findings import Finding, Severity
from mezzotint.formats.catalog import find_format
from mezzotint.trace.record import LOW_PRECISION, Kind, Phase, Trace

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "dim"}
_MAX_INFOS = 5


def print_audit(
    console: Console,
    trace: Trace,
    findings: Sequence[Finding],
    *,
    verdict: str,
    policy: str,
    is_policy_declared: bool,
    report_path: str | None,
) -> None:
    """Print a judged trace. Names from the program are printed as they are, never as markup."""
    console.print(Text(verdict, style="bold"))
    if is_policy_declared or trace.steps or findings:
        note = "" if is_policy_declared else "  (inferred from what ran)"
        console.print(Text(f"policy  {policy}{note}"))
    infos = 0
    for finding in findings:
        infos += finding.severity is Severity.INFO
        if finding.severity is not Severity.INFO or infos <= _MAX_INFOS:
            _print_finding(console, finding)
    if infos > _MAX_INFOS:
        console.print(Text(f"... and {infos - _MAX_INFOS} more notes in the report", style="dim"))
    if trace.operations:
        console.print()
        console.print(_formats(trace))
    for line in (*_casts(trace), *_lost(trace), *_headroom(trace), *trace.notes):
        console.print(Text(line), soft_wrap=True)
    if report_path is not None:
        console.print(Text(f"report  {report_path}"), soft_wrap=True)


def _print_finding(console: Console, finding: Finding) -> None:
    place = f"{finding.path}:{finding.line}: " if finding.path else ""
    line = Text("\n" + place)
    line.append(f"{finding.code} {finding.severity}", style=_STYLES[finding.severity])
    line.append(f"  {finding.message}")
    if finding.module:
        line.append(f"  [{finding.module}]", style="dim")
    console.print(line, soft_wrap=True)
    if finding.advice:
        console.print(Text(f"    {finding.advice}", style="green"), soft_wrap=True)


def _formats(trace: Trace) -> Table:
    """Return the share of FLOPs and the number of operations of each format, by phase."""
    counts = trace.counts()
    steps = max(1, len(trace.steps))
    flops: dict[Phase, Counter[str]] = {phase: Counter() for phase in Phase}
    operations: dict[Phase, Counter[str]] = {phase: Counter() for phase in Phase}
    for call in trace.calls:
        if call.kind is Kind.VIEW or call.format is None:
            continue
        number = counts.get(call.index, 0)
        operations[call.phase][call.format] += number
        flops[call.phase][call.format] += number * (call.flops or 0)
    table = Table(box=None, pad_edge=False)
    for heading in ("phase", "format", "operations a step", "GFLOP a step", "share"):
        table.add_column(heading, header_style="bold", justify="left" if heading in ("phase", "format") else "right")
    for phase in Phase:
        total = sum(flops[phase].values())
        for dtype, number in sorted(operations[phase].items(), key=lambda item: -flops[phase][item[0]]):
            done = flops[phase][dtype]
            table.add_row(
                str(phase),
                dtype,
                f"{number / steps:.0f}",
                f"{done / steps / 1e9:.4g}",
                f"{done / total:.1%}" if total else "",
            )
    return table


def _casts(trace: Trace) -> list[str]:
    counts = trace.counts()
    steps = max(1, len(trace.steps))
    casts = [call for call in trace.calls if call.kind is Kind.CAST]
    number = sum(counts.get(call.index, 0) for call in casts)
    nbytes = sum(counts.get(call.index, 0) * call.nbytes for call in casts)
    return [f"casts   {number / steps:.0f} a step, {nbytes / steps / 2**20:.4g} MiB read and written"] if number else []


def _lost(trace: Trace) -> list[str]:
    lines = []
    for role, noun in (("weight", "weights"), ("state", "optimizer states"), ("copy", "averages")):
        low = [one for one in trace.updates if one.role == role and one.dtype in LOW_PRECISION]
        # decoupled weight decay is a product of its own; the step is what has to arrive
        low = [one for one in low if role != "weight" or ".mul_." not in one.op] or low
        count = sum(one.count for one in low)
        if count:
            lines.append(
                f"updates {sum(one.lost for one in low) / count:.1%} of those of compact {noun} were rounded away"
            )
    full = [one for one in trace.updates if one.role == "weight" and one.would_be_lost]
    count = sum(one.count for one in full)
    if count:
        would = sum(one.would_be_lost.get("bfloat16", 0) for one in full)
        lines.append(f"updates {would / count:.1%} would be rounded away if the weights were stored in bfloat16")
    return lines


def _headroom(trace: Trace) -> list[str]:
    """Return the largest magnitude of each compact format against its limit."""
    largest: dict[str, tuple[float, str]] = {}
    for call in trace.calls:
        for tally in call.tallies:
            if (
                tally is not None
                and tally.dtype in LOW_PRECISION
                and tally.amax > largest.get(tally.dtype, (0.0, ""))[0]
            ):
                largest[tally.dtype] = tally.amax, f"{call.name} {call.module}".strip()
    return [
        f"range   {dtype} up to {amax:.4g} of {find_format(dtype).max:.4g} ({place})"
        for dtype, (amax, place) in sorted(largest.items())
    ]
