"""An audit of the first steps of somebody else's training loop: what the callbacks for trainers share."""

import logging
from pathlib import Path

from mezzotint.auditing.session import audit
from mezzotint.errors import AuditError, TrainingError
from mezzotint.findings import Finding, Severity
from mezzotint.patches import Guard
from mezzotint.policy.policy import Policy
from mezzotint.trace.recorder import BusyError

logger = logging.getLogger("mezzotint")


class AuditFailedError(TrainingError):
    """Findings of the severity that was to end the training."""


class FirstSteps:
    """Watches from `begin()` until `steps` steps have ended, then judges, reports and lets the training go on.

    `report` is where the HTML report goes (None: nowhere). `fail_on` names the severity ("error" or "warning") from
    which `AuditFailedError` ends the training. The result stays in `result`.
    """

    def __init__(
        self,
        *,
        steps: int = 3,
        policy: Policy | str | None = None,
        report: str | Path | None = "mezzotint-audit.html",
        has_ranges: bool = True,
        fail_on: str | None = None,
    ) -> None:
        if fail_on not in (None, "error", "warning"):
            raise AuditError(f"fail_on={fail_on!r} is no severity; pass 'error', 'warning' or None")
        self._steps = steps
        self._report = report
        self._failing = {None: (), "error": (Severity.ERROR,), "warning": (Severity.ERROR, Severity.WARNING)}[fail_on]
        self._options = {"policy": policy, "has_ranges": has_ranges}
        self._guard = Guard("the audit by callback")
        self._open: audit | None = None
        self.result: audit | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was found; empty before the audit has ended."""
        return self.result.findings if self.result is not None else ()

    def begin(self) -> None:
        """Begin to watch, once; where another audit records already, this one says so and stays away."""
        if self._open is None and self.result is None:
            one = audit(**self._options)  # type: ignore[arg-type]
            try:
                one.__enter__()
            except BusyError:
                logger.warning("an audit is recording already: the audit by callback skips its turn")
                return
            if one.is_skipped:
                return
            self._open = one

    def step_ended(self) -> None:
        """Say that a batch is through; ends the audit when it has seen enough steps."""
        if self._open is not None and self._open.num_steps >= self._steps:
            self.end()

    def abandon(self) -> None:
        """Stop watching because the training failed; what was seen is reported, nothing is raised."""
        self._close()

    def end(self) -> None:
        """Stop watching, judge and report. Raises AuditFailedError as `fail_on` says."""
        self._close()
        if self.result is not None:
            failing = [one for one in self.result.findings if one.severity in self._failing]
            if failing:
                raise AuditFailedError("; ".join(f"{one.code} {one.message}" for one in failing))

    def _close(self) -> None:
        if self._open is None:
            return
        seen, self._open = self._open, None
        seen.__exit__(None, None, None)
        with self._guard:
            verdict, findings = seen.verdict, seen.findings
            self.result = seen
            logger.info("audit: %s (%s)", verdict, seen.policy)
            for one in findings:
                if one.severity is not Severity.INFO:
                    logger.warning("%s %s [%s]", one.code, one.message, one.module or one.path)
            if self._report is not None:
                seen.write_report(self._report)
