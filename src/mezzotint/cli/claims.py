"""`mezzotint claims`: what is said about mixed precision, with verdict, figure, and the command that tests it."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console

if TYPE_CHECKING:
    from mezzotint.claims.claim import Outcome

_STYLES = {"true": "green", "true if": "yellow", "false": "bold red"}


def claims(
    words: Annotated[
        list[str] | None, typer.Argument(help="Show the claims with all these words in them.", show_default=False)
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Measure here what can be measured, instead of quoting records.")
    ] = False,
    is_json: JsonOption = False,
) -> None:
    """Test what is said about mixed precision: each claim with verdict, figure, and how it is known.

    Exact claims and those about the installed torch are always tried anew; measured ones are quoted from dated
    records, and measured here with --run. Exit code 1 where one that is tried anew comes out otherwise than published.
    """
    from mezzotint.claims.evaluate import find_claims, outcome_of

    chosen = find_claims(words or [])
    outcomes = []
    with progress_console().status("") as status:
        for claim in chosen:
            status.update(f"testing {claim.name}")
            outcomes.append(outcome_of(claim, is_run=run))
    if is_json:
        print_json("claims", {"claims": [_facts(one) for one in outcomes]})
    else:
        _print(result_console(), outcomes, is_run=run)
    if any(one.claim.basis.is_quick and not one.is_as_published for one in outcomes):
        raise typer.Exit(1)


def _print(console: Console, outcomes: "list[Outcome]", *, is_run: bool) -> None:
    family = ""
    for one in outcomes:
        claim = one.claim
        if claim.family != family:
            family = claim.family
            console.print(Text(f"{family}\n", style="bold"))
        answer = one.answer
        said = Text(answer.words, style=_STYLES[answer.verdict])
        if not one.is_as_published:
            said.append(f" (published: {claim.verdict})", style="yellow")
        said.append(f": {answer.figure}", style="default")
        taken = f" in {one.seconds:.1f} s" if one.seconds is not None and not claim.basis.is_quick else ""
        hint = ""
        if not is_run and claim.measure is not None and not claim.basis.is_quick:
            hint = f" (--run does it here, in about {claim.seconds:.0f} s)"
        console.print(Text(claim.text, style="bold"))
        for text in (said, Text(f"{one.source}{taken}{hint}", style="dim"), Text(claim.command, style="dim")):
            console.print(Padding(text, (0, 0, 0, 2), expand=False))
        console.print()


def _facts(one: "Outcome") -> dict[str, Any]:
    claim = one.claim
    return {
        "name": claim.name,
        "family": str(claim.family),
        "text": claim.text,
        "where": claim.where,
        "published": str(claim.verdict),
        "verdict": str(one.answer.verdict),
        "condition": one.answer.condition,
        "figure": one.answer.figure,
        "figures": dict(one.figures),
        "source": one.source,
        "seconds": one.seconds,
        "can_be_measured_here": claim.measure is not None,
        "command": claim.command,
    }
