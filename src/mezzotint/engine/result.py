"""What one call of `Engine.update` did, and why."""

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    """What `update()` did with the gradients."""

    STEPPED = "stepped"  # the optimizer moved the weights
    SKIPPED = "skipped"  # a gradient was NaN or infinite; the weights are untouched, the gradients dropped
    ACCUMULATING = "accumulating"  # more micro-batches belong to this update; the gradients are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The result of one `update()`.

    `loss_scale` is the scale that these gradients carried (1.0 without scaling). `grad_norm` is the 2-norm over all
    gradients of the update, unscaled and before clipping; NaN or infinite on a skipped update, None while
    accumulating. `nonfinite` names the parameters whose gradient held NaN or infinity, in the model's order.
    `step` counts the real steps so far, this one included; `skipped_steps` the skipped ones.
    """

    outcome: Outcome
    loss_scale: float
    grad_norm: float | None
    step: int
    skipped_steps: int
    nonfinite: tuple[str, ...] = ()
    reason: str = ""

    @property
    def stepped(self) -> bool:
        """Whether the weights moved; step a learning-rate scheduler of your own only then."""
        return self.outcome is Outcome.STEPPED

    @property
    def skipped(self) -> bool:
        """Whether the gradients were dropped because one of them was not finite."""
        return self.outcome is Outcome.SKIPPED
