"""`mezzotint rules`: what lint and audit look for, and why."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from mezzotint.cli.output import JsonOption, print_json, result_console
from mezzotint.rules.catalog import ALL_RULES, find_rule
from mezzotint.rules.rule import Rule


def rules(
    code: Annotated[
        str | None, typer.Argument(help="A rule's code or name, for its explanation.", show_default=False)
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """List the rules, or explain one: why it matters, how it looks, what to do."""
    chosen = ALL_RULES if code is None else (find_rule(code),)
    if is_json:
        print_json("rules", {"rules": [_facts(rule) for rule in chosen]})
        return
    console = result_console()
    if code is None:
        table = Table(box=None, pad_edge=False)
        for heading in ("code", "severity", "name", "summary"):
            table.add_column(heading, header_style="bold", overflow="fold")
        for rule in chosen:
            table.add_row(rule.code, str(rule.severity), rule.name, rule.summary)
        console.print(table)
        return
    rule = chosen[0]
    console.print(Text(f"{rule.code} {rule.name} ({rule.severity})", style="bold"))
    for heading, text in (
        ("", rule.summary),
        ("why", rule.why),
        ("bad", rule.bad),
        ("good", rule.good),
        ("fix", rule.fix),
        ("sources", "\n".join(rule.sources)),
    ):
        if text:
            console.print(Text(f"\n{heading}" if heading else ""), end="\n" if heading else "")
            console.print(Text("\n".join(f"  {line}" for line in text.splitlines())), soft_wrap=True)


def _facts(rule: Rule) -> dict[str, object]:  # type: ignore[type-arg]
    return {
        "code": rule.code,
        "name": rule.name,
        "severity": str(rule.severity),
        "summary": rule.summary,
        "why": rule.why,
        "bad": rule.bad,
        "good": rule.good,
        "fix": rule.fix,
        "sources": list(rule.sources),
    }
