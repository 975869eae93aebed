"""Rule: one thing that goes wrong, in one place: code, why it matters, how it looks, what to do, and the check itself.

Registry, documentation and the `mezzotint rules` command derive from these objects.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from mezzotint.findings import Finding, Severity

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(Generic[Subject]):
    """A rule about subjects of one kind (a trace, a source file).

    `severity` is that of an ordinary case; a check may lower it where the evidence is weaker. `bad` and `good` are
    short programs. `sources` are threads, papers or documentation where the fault is described.
    """

    code: str
    name: str
    summary: str
    severity: Severity
    why: str
    bad: str
    good: str
    fix: str
    sources: tuple[str, ...] = ()
    check: Callable[[Subject], Iterable[Finding]]
