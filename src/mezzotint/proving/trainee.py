"""What trains, for one arm and one seed: a recipe or a script behind two calls."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mezzotint.training.step_profile import StepProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """What is known of a run when its last step is over."""

    values: dict[str, float] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    num_parameters: int | None = None
    weights_digest: str = ""
    skipped_steps: int = 0
    tokens_per_step: int | None = None
    profile: StepProfile | None = None


class Trainee(Protocol):
    """One run that can be advanced step by step."""

    def step(self) -> Mapping[str, Any] | None:
        """Train one step and return its figures, "loss" among them; None when the run is over."""

    def finish(self) -> Closing:
        """Return what is to be kept of a run that came to its end."""

    def close(self) -> None:
        """Let go of everything, whatever happened."""
