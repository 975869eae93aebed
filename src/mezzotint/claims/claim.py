"""Claim: a sentence that people repeat, what tests it, and the verdict as a function of the figures.

A claim keeps apart what is said (`text`, `where`), how figures are got (`measure`, or a record) and what they mean
(`judge`). `verdict` is what we publish: a test and the page's generator hold it against what `judge` makes of the
figures, so a record that says otherwise stops the page from being made. Pure: no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Figures = Mapping[str, Any]
"""Named figures, as JSON has them."""


class Verdict(StrEnum):
    """What is to be said of a claim."""

    TRUE = "true"
    CONDITIONAL = "true if"
    FALSE = "false"


class Basis(StrEnum):
    """Where a claim's figures come from, in a reader's words."""

    COMPUTED = "computed here"
    ASKED = "asked of the installed torch"
    SIMULATED = "asked of the installed torch, on a simulated GPU"
    TABLES = "published peaks, from the product's table"
    PLANNED = "estimated for a GPU by mezzotint plan"
    PUBLISHED = "measured by others, as published"
    MEASURED = "measured"

    @property
    def is_quick(self) -> bool:
        """Whether the figures are made anew each time, in a second or less."""
        return self not in (Basis.PUBLISHED, Basis.MEASURED)


class Family(StrEnum):
    """Who says it."""

    TUTORIAL = "What tutorials say"
    INTERNET = "What is repeated"
    FORMATS = "On number formats"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the figures say: the verdict, the condition of a "true if", and the figures in a sentence."""

    verdict: Verdict
    figure: str
    condition: str = ""

    @property
    def words(self) -> str:
        """The verdict with its condition."""
        return f"{self.verdict} {self.condition}".strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim. `where` names who says it, with an address where one is known; `command` is for the reader's machine.

    `measure` returns the figures: at once where the basis is quick, else within `seconds` on an ordinary laptop. It is
    None where this program cannot measure it; then the figures are those of the record.
    """

    name: str
    family: Family
    text: str
    where: str
    verdict: Verdict
    basis: Basis
    command: str
    judge: Callable[[Figures], Answer]
    measure: Callable[[], Figures] | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A claim with its answer, and whether its figures were made now (`seconds`) or come from a record (`source`)."""

    claim: Claim
    answer: Answer
    figures: Figures
    source: str
    seconds: float | None = None

    @property
    def is_as_published(self) -> bool:
        """Whether these figures give the verdict that we publish."""
        return self.answer.verdict is self.claim.verdict
