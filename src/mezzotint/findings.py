"""Finding: what lint, audit, plan and doctor have to say, all in one shape.

Judging makes findings and never prints; rendering prints them and never judges.
"""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How much a finding matters; ERROR and WARNING make a command exit with 1."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One judgement about source (MZ1xx), a trace (MZ2xx) or a setup (MZ3xx). Absent fields are None.

    `line` and `column` count from 1. `evidence` holds the measured values that the judgement rests on.
    """

    code: str
    severity: Severity
    message: str
    path: str | None = None
    line: int | None = None
    column: int | None = None
    module: str | None = None
    op: str | None = None
    phase: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)
    advice: str | None = None
    fix: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the finding as the JSON object of the command contract, every field present."""
        return asdict(self)
