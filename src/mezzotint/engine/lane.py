"""Lane: a loss and the optimizers it drives, with the loss scale and micro-batch count that belong to it."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mezzotint.policy.scaling import LossScale, Scaling


@dataclass(slots=True, kw_only=True)
class Lane:
    """The running state of one lane; the one mutable record of the engine.

    `is_everything` says that the lane drives all optimizers, so that backward need not be limited to some parameters.
    """

    optimizers: tuple[str, ...]
    scale: LossScale
    is_everything: bool
    num_micro_batches: int = 0
    num_steps: int = 0
    is_compared: bool = False  # whether the processes of a group were asked for the outcome of its first update
    is_loss_finite: bool = True  # at that update, in all processes
    _losses: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, optimizers: tuple[str, ...], scaling: Scaling, *, is_everything: bool) -> "Lane":
        """Return the lane before its first loss."""
        return cls(optimizers=optimizers, scale=LossScale.start(scaling), is_everything=is_everything)

    def remember_loss(self, loss: Tensor) -> None:
        """Keep the losses of this update, to be read only when a gradient turns out not to be finite."""
        if self.num_micro_batches == 0:
            self._losses.clear()
        self._losses.append(loss.detach())

    def last_loss(self) -> float:
        """Return the first loss of this update that is not finite, or the last loss where all are."""
        values = torch.stack([loss.float() for loss in self._losses]).tolist() if self._losses else [math.nan]
        return next((value for value in values if not math.isfinite(value)), values[-1])
