"""A proof in the terminal, 80 columns wide, and as Markdown for a pull request."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mezzotint.parity.result import ArmResult, Proof, Verdict
from mezzotint.report.proof_words import (
    STYLES,
    design_rows,
    further_reasons,
    grouped,
    headline,
    main_costs,
    margin_words,
    name_words,
    next_steps,
    seeds_of,
    sentence,
    spell_amount,
    spell_interval,
    spell_ratio,
    spell_value,
)

_RICH = {"good": "green", "bad": "bold red", "unsure": "yellow"}
_MARKS = {
    Verdict.IDENTICAL: "✅",
    Verdict.EQUIVALENT: "✅",
    Verdict.BETTER: "✅",
    Verdict.WORSE: "❌",
    Verdict.UNDECIDED: "❔",
    Verdict.INVALID: "⚠️",
}


def verdict_lines(proof: Proof) -> list[str]:
    """Return the verdict on each treatment as a sentence with the figure that carries it."""
    return [sentence(proof, result) for result in proof.results]


def print_proof(console: Console, proof: Proof, *, report_path: str | None = None) -> None:
    """Print verdicts, metrics, costs, notes and what to do next. Names are printed as they are, never as markup."""
    for result, line in zip(proof.results, verdict_lines(proof), strict=True):
        console.print(Text(line, style=f"bold {_RICH[STYLES[result.verdict]]}"))
        for reason in further_reasons(result):
            console.print(Text(f"  {reason}"))
    for result in proof.results:
        _print_figures(console, proof, result)
    _print_lines(console, grouped(proof.notes))
    _print_lines(console, [("what next", next_steps(proof))])
    console.print()
    console.print(Text(f"design  {proof.experiment.digest}, {len(seeds_of(proof))} seeds, {proof.date}"))
    if report_path is not None:
        console.print(Text(f"report  {report_path}"), soft_wrap=True)


def _print_figures(console: Console, proof: Proof, result: ArmResult) -> None:
    if not result.metrics and not result.costs:
        return
    console.print()
    if len(proof.results) > 1:
        console.print(Text(result.arm, style="bold"))
    if result.metrics:
        console.print(_metrics(proof, result))
    if result.costs:
        console.print()
        console.print(_costs(proof, result))


def _print_lines(console: Console, groups: Sequence[tuple[str, Sequence[str]]]) -> None:
    """Print lines under what they have in common, after an empty line."""
    groups = [(head, members) for head, members in groups if members]
    if groups:
        console.print()
    for head, members in groups:
        if head:
            console.print(Text(f"{head}:"))
        for line in members:
            console.print(Padding(Text(line), (0, 0, 0, 2 if head else 0), expand=False))


def _metrics(proof: Proof, result: ArmResult) -> Table:
    """Return the metrics in 80 columns; those in brackets decide nothing."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("")
    for heading in (*_headings(proof, result, 10), "differs", "[interval]", "margin"):
        table.add_column(Text(heading), header_style="bold", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for metric in result.metrics:
        mean, _, interval = spell_interval(metric).partition(" ")
        name = name_words(metric.name)
        table.add_row(
            Text(name if metric.is_primary else f"({name})", overflow="fold"),
            spell_value(metric.control),
            spell_value(metric.treatment),
            mean,
            Text(interval.replace("%,", ",").replace("%]", "]")),
            f"±{margin_words(metric)}",
            Text(str(metric.verdict), style=_RICH[STYLES[metric.verdict]] if metric.is_primary else "dim"),
        )
    return table


def _headings(proof: Proof, result: ArmResult, longest: int) -> tuple[str, str]:
    """Return the arms' names, or what they are where the names leave no room for figures."""
    names = proof.experiment.control.name, result.arm
    return names if max(map(len, names)) <= longest else ("control", "treatment")


def _costs(proof: Proof, result: ArmResult) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in (*_headings(proof, result, 15), "ratio"):
        table.add_column(Text(heading), header_style="bold", justify="right", no_wrap=True)
    for cost in main_costs(result):
        table.add_row(
            Text(name_words(cost.name)),
            spell_amount(cost.control, cost.unit),
            spell_amount(cost.treatment, cost.unit),
            Text(spell_ratio(cost.ratio)),
        )
    return table


def markdown(proof: Proof) -> str:
    """Return a summary for a pull request: verdict, metrics and costs, the design folded away."""
    control = _cell(proof.experiment.control.name)
    lines = [f"### {_cell(headline(proof))}", ""]
    for result, line in zip(proof.results, verdict_lines(proof), strict=True):
        lines.append(f"- {_MARKS[result.verdict]} {_cell(line)}")
        lines += [f"  - {_cell(reason)}" for reason in further_reasons(result)]
    rows = [
        [
            result.arm,
            name_words(metric.name),
            spell_value(metric.control),
            spell_value(metric.treatment),
            spell_interval(metric),
            f"±{margin_words(metric)}",
            str(metric.verdict) if metric.is_primary else f"({metric.verdict})",
        ]
        for result in proof.results
        for metric in result.metrics
    ]
    if rows:
        lines += ["", *_table(["", "metric", control, "treatment", "difference", "margin", "verdict"], rows)]
    rows = [
        [
            result.arm,
            name_words(cost.name),
            spell_amount(cost.control, cost.unit),
            spell_amount(cost.treatment, cost.unit),
            spell_ratio(cost.ratio),
        ]
        for result in proof.results
        for cost in main_costs(result)
    ]
    if rows:
        lines += ["", *_table(["", "cost", control, "treatment", "ratio"], rows)]
    groups = [*grouped(proof.notes), *(("", [line]) for line in next_steps(proof))]
    if groups:
        lines.append("")
    for head, members in groups:
        lines += [f"- {_cell(head)}:"] if head else []
        lines += [f"{'  ' if head else ''}- {_cell(note)}" for note in members]
    details = [*design_rows(proof.experiment, proof.num_looks, len(seeds_of(proof))), *proof.machine.items()]
    lines += [
        "",
        "<details><summary>Design, machine, command</summary>",
        "",
        *_table(["", ""], [[key, value] for key, value in [*details, ("date", proof.date)]]),
        "",
        *_fenced(proof.command),
        "",
        "</details>",
        "",
    ]
    return "\n".join(lines)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(headings)} |",
        f"|{'---|' * len(headings)}",
        *(f"| {' | '.join(map(_cell, row))} |" for row in rows),
    ]


def _cell(text: str) -> str:
    """Return a text in one line that Markdown shows as it is: no markup, no link, no mention, no end of a cell."""
    line = " ".join(text.split())
    escaped = re.sub(r"([\\`*\[\]<>|#~$])", r"\\\1", line)
    return re.sub(r"@(?=\w)", "@\u200b", escaped)


def _fenced(text: str) -> list[str]:
    """Return a text as a block of code whose fence is longer than any run of backticks in it."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence]
