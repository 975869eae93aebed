"""A callback for Lightning's Trainer: `Trainer(callbacks=[AuditCallback()])` audits the first steps of a fit."""

from pathlib import Path
from typing import Any

from mezzotint.auditing.fitting import FirstSteps
from mezzotint.policy.policy import Policy

try:
    from lightning.pytorch import Callback
except ImportError:  # the package by its older name
    from pytorch_lightning import Callback  # type: ignore[assignment,unused-ignore]


class AuditCallback(Callback):  # type: ignore[misc,unused-ignore]
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
        super().__init__()
        self.audit = FirstSteps(steps=steps, policy=policy, report=report, has_ranges=has_ranges, fail_on=fail_on)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to watch."""
        self.audit.begin()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """End after enough steps."""
        self.audit.step_ended()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End with the training, if it was shorter."""
        self.audit.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep what was seen of a training that failed."""
        self.audit.abandon()
