"""`mz.audit`: watch a part of a program, judge it, report it.

with mz.audit(steps=3) as audit:
    train()
print(audit.verdict, audit.findings)
audit.write_report("audit.html")
"""

import logging
from pathlib import Path
from typing import Any

from mezzotint.errors import AuditError, echoed, is_count
from mezzotint.findings import Finding
from mezzotint.policy.policy import Policy
from mezzotint.rules.judge import Judgement, judge
from mezzotint.trace.record import Trace
from mezzotint.trace.recorder import BusyError, Enough, Recorder

logger = logging.getLogger("mezzotint")
_SKIPPED = "the command `mezzotint audit` records this program: mz.audit in it recorded nothing of its own"


class audit:  # noqa: N801  used as a verb: with mz.audit():
    """Watch what runs inside the context.

    `steps` ends the body after that many training steps (at the next backward pass; None: it runs to its end).
    `policy` is what the program is meant to do, as a Policy or text; without it, the policy is inferred from what ran.
    `has_ranges=False` leaves out the ranges of tensors, which cost most of the time. What the body computes is the same
    to the bit. Raises AuditError inside another `mz.audit`. In a script that the command `mezzotint audit` runs, the
    body runs to its end and nothing is recorded here: `is_skipped` is True, and the trace is empty but for a note.
    """

    def __init__(
        self, *, steps: int | None = None, policy: Policy | str | None = None, has_ranges: bool = True
    ) -> None:
        if steps is not None and not is_count(steps):
            raise AuditError(
                f"steps={echoed(steps)} is not a number of steps; pass 1 or more, or None to watch to the end"
            )
        self._declared = Policy.parse(policy) if policy is not None else None
        self.is_skipped = False
        self._recorder = Recorder(steps=steps, has_ranges=has_ranges)
        self._trace: Trace | None = None
        self._judgement: Judgement | None = None

    def __enter__(self) -> "audit":
        """Begin to watch."""
        try:
            self._recorder.__enter__()
        except BusyError as error:
            if not error.is_command:
                raise
            self.is_skipped = True
            self._recorder.notes.append(_SKIPPED)
            logger.warning(_SKIPPED)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Stop; the exception that ends the body after `steps` steps goes no further."""
        if self.is_skipped:
            return False
        self._recorder.__exit__(kind, error, trace)
        return isinstance(error, Enough)

    @property
    def num_steps(self) -> int:
        """The number of training steps seen so far."""
        return self._recorder.num_steps

    @property
    def trace(self) -> Trace:
        """Everything that was recorded."""
        if self._trace is None:
            self._trace = self._recorder.trace()
        return self._trace

    @property
    def judgement(self) -> Judgement:
        """What the rules say about it."""
        if self._judgement is None:
            self._judgement = judge(self.trace, self._declared)
        return self._judgement

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings, most severe first."""
        return self.judgement.findings

    @property
    def verdict(self) -> str:
        """The verdict in words."""
        return self.judgement.verdict

    @property
    def policy(self) -> Policy:
        """The policy that was judged by: the declared one, else the one that the program shows."""
        return self.judgement.policy

    def write_report(self, path: str | Path) -> None:
        """Write the HTML report. Raises DataError where the file cannot be written."""
        from mezzotint.report.page import write_page

        write_page(Path(path), report_page(self.trace, self.judgement))


def report_page(trace: Trace, judgement: Judgement) -> str:
    """Return the HTML report of a judged trace."""
    from mezzotint.report.audit import render_audit  # loads what draws it, which most audits do not need

    return render_audit(
        trace,
        judgement.findings,
        verdict=judgement.verdict,
        policy=str(judgement.policy),
        is_policy_declared=judgement.is_declared,
    )
