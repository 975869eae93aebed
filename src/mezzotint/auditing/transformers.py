"""A callback for Hugging Face's Trainer: `trainer.add_callback(AuditCallback())` audits its first steps."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mezzotint.auditing.fitting import FirstSteps
from mezzotint.policy.policy import Policy


class AuditCallback(TrainerCallback):  # type: ignore[misc,unused-ignore]
    """Audits the first `steps` training steps; see `mezzotint.auditing.fitting.FirstSteps` for the arguments."""

    def __init__(
        self,
        *,
        steps: int = 3,
        policy: Policy | str | None = None,
        report: str | Path | None = "mezzotint-audit.html",
        has_ranges: bool = True,
        fail_on: str | None = None,
    ) -> None:
        self.audit = FirstSteps(steps=steps, policy=policy, report=report, has_ranges=has_ranges, fail_on=fail_on)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to watch."""
        self.audit.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End after enough steps."""
        self.audit.step_ended()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End with the training, if it was shorter."""
        self.audit.end()
