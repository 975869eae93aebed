"""Trackers: the metrics of a run, shown elsewhere while it trains."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mezzotint.errors import ConfigError

CURVES = ("loss", "validation_loss", "learning_rate", "grad_norm", "loss_scale")


class Tracker(Protocol):
    """Receives every line of the metrics."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Take the metrics of one update."""

    def close(self) -> None:
        """Finish writing."""


class NoTracker:
    """Shows nothing."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Take the metrics of one update."""

    def close(self) -> None:
        """Finish writing."""


class TensorBoardTracker:
    """Writes curves for TensorBoard, through the extra `mezzotint[tensorboard]`. Raises ConfigError without it."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("--tensorboard needs a package: pip install 'mezzotint[tensorboard]'") from None
        self._open = partial(SummaryWriter, str(folder))
        self._writer: Any = None

    def write(self, line: Mapping[str, Any]) -> None:
        """Take the metrics of one update."""
        if self._writer is None:
            # purging from the first step hides what an interrupted run wrote after its last checkpoint
            self._writer = self._open(purge_step=line["step"])
        for name in CURVES:
            if line.get(name) is not None:
                self._writer.add_scalar(name, line[name], line["step"])

    def close(self) -> None:
        """Finish writing."""
        if self._writer is not None:
            self._writer.close()
