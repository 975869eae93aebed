"""What a person sees while a run trains: one line that moves on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

PLAIN_INTERVAL_SECONDS = 5.0
RATE_WINDOW = 20  # updates over which tokens per second and the time left are averaged


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of a run after an update, as the progress line shows it."""

    update: int
    num_updates: int
    loss: float
    tokens_per_second: float
    loss_scale: float | None
    skipped: int
    memory_bytes: int
    eta_seconds: float


class Reporter(Protocol):
    """Shows a run to somebody."""

    def status(self, status: Status) -> None:
        """Show the state after an update."""

    def note(self, text: str) -> None:
        """Show a sentence."""


class TerminalReporter:
    """Writes to a console: a live line on a terminal, at most one line per five seconds elsewhere.

    `num_updates` is 0 where nobody knows it.
    """

    def __init__(self, console: Console, num_updates: int) -> None:
        self._console = console
        self._num_updates = num_updates
        self._last_plain = -PLAIN_INTERVAL_SECONDS
        self._progress: Progress | None = None
        self._task = TaskID(0)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.completed:>5.0f}/{task.total:.0f}" if num_updates else "{task.completed:>5.0f}"),
                BarColumn(bar_width=None),
                TextColumn("{task.description}", style="none"),
                console=console,
            )
            self._task = self._progress.add_task("starting", total=num_updates or None)

    def __enter__(self) -> "TerminalReporter":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def status(self, status: Status) -> None:
        """Show the state after an update."""
        self.line(status.update, status_line(status))

    def line(self, update: int, text: str) -> None:
        """Show `text` as the state after `update`: in place on a terminal, now and then elsewhere."""
        if self._progress is not None:
            self._progress.update(self._task, completed=update, description=text)
            return
        now = time.monotonic()
        if update == self._num_updates or now - self._last_plain >= PLAIN_INTERVAL_SECONDS:
            self._last_plain = now
            self.note(f"{update}/{self._num_updates}  {text}" if self._num_updates else f"{update}  {text}")

    def note(self, text: str) -> None:
        """Show a sentence."""
        self._console.print(text, markup=False, soft_wrap=True)


def status_line(status: Status) -> str:
    """Return the numbers of a status: loss, speed, scale, skipped updates, memory, time left."""
    words = [f"loss {status.loss:.3f}", f"{status.tokens_per_second:,.0f} tok/s"]
    if status.loss_scale is not None:
        words.append(f"scale {status.loss_scale:g}")
    if status.skipped:
        words.append(f"skipped {status.skipped}")
    words.append(f"{status.memory_bytes / 2**20:,.0f} MiB")
    words.append(f"ETA {duration(status.eta_seconds)}")
    return "  ".join(words)


def duration(seconds: float) -> str:
    """Return a time as people write it: 47s, 3m07s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def resident_bytes() -> int:
    """Return the resident memory of this process; its peak, or 0, where the system tells no more."""
    try:
        fields: Mapping[str, str] = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
        )
        return int(fields["VmRSS"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


class Stopwatch:
    """Time per update: of the last one, and averaged over the latest."""

    def __init__(self) -> None:
        self._recent: list[float] = []
        self.last_seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one update that took `seconds`."""
        self.last_seconds = seconds
        self._recent = [*self._recent[-RATE_WINDOW + 1 :], seconds]

    @property
    def mean_seconds(self) -> float:
        """The mean of the latest updates."""
        return sum(self._recent) / len(self._recent)
