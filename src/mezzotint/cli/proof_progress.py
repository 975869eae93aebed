"""Live progress of a proof on standard error: the step that runs, and after each seed the verdict so far."""

import math
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from mezzotint.parity.result import ArmResult, Run
    from mezzotint.proving.store import ProofFolder
    from mezzotint.training.progress import TerminalReporter

PARALLEL_INTERVAL_SECONDS = 30.0


class ProofProgress:
    """Shows one experiment on a console: a live line on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, folder: "ProofFolder") -> None:
        self._console = console
        self._folder = folder
        self._losses: dict[str, float] = {}
        self._steps: dict[str, int] = {}
        self._num_steps = 0
        self._reporter: TerminalReporter | None = None
        self._seed_began = self._told_at = time.monotonic()
        self._head = ""

    def __enter__(self) -> "ProofProgress":
        experiment = self._folder.experiment
        arms = ", ".join(arm.name for arm in experiment.arms)
        steps = f", {experiment.steps} steps" if experiment.steps else ""
        self.note(f"{experiment.target}: {arms}{steps}; {self._folder.path}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_line()

    def seed_begins(self, seed: int, place: int, num_seeds: int) -> None:
        """Begin a line for a seed."""
        from mezzotint.training.progress import TerminalReporter

        self._end_line()
        self._losses.clear()
        self._steps.clear()
        self._seed_began = time.monotonic()
        self._head = f"seed {place}/{num_seeds}"
        self._reporter = TerminalReporter(self._console, self._folder.experiment.steps or 0)
        self._reporter.__enter__()
        self._reporter.line(0, f"{self._head}  preparing")

    def stepped(self, arm: str, step: int, loss: float) -> None:
        """Show the newest losses."""
        self._losses[arm] = loss
        self._steps[arm] = step
        self._num_steps += 1
        if self._reporter is None:
            self._tell_of_processes()
            return
        if len(set(self._steps.values())) > 1:
            return
        words = [f"{name} {value:.3f}" for name, value in self._losses.items()]
        total = self._folder.experiment.steps
        if total and step:
            left = (time.monotonic() - self._seed_began) / step * (total - step)
            words.append(f"{left:.0f} s left of this seed")
        self._reporter.line(step, f"{self._head}  {'  '.join(words)}")

    def seed_ended(self, runs: "Sequence[Run]", results: "Sequence[ArmResult]") -> None:
        """Say how the seed's runs ended, and the verdicts so far."""
        took = f" after {time.monotonic() - self._seed_began:.0f} s" if self._reporter is not None else ""
        self._end_line()
        seeds = self._folder.experiment.all_seeds()
        head = f"seed {seeds.index(runs[0].seed) + 1}/{len(seeds)}"
        losses = "  ".join(
            f"{run.arm} {run.values['final_loss']:.4f}" if "final_loss" in run.values else f"{run.arm} {run.status}"
            for run in runs
        )
        self.note(f"{head} ended{took}: {losses}")
        for result in results:
            self.note(f"  so far {result.arm} is {result.verdict}{_figure(result)}")

    def _tell_of_processes(self) -> None:
        """Say now and then how far the seeds that run in parallel are, all together."""
        if time.monotonic() - self._told_at > PARALLEL_INTERVAL_SECONDS:
            self._told_at = time.monotonic()
            self.note(f"{self._num_steps} steps so far")

    def note(self, text: str) -> None:
        """Show a sentence."""
        self._console.print(text, markup=False, soft_wrap=True)

    def _end_line(self) -> None:
        if self._reporter is not None:
            self._reporter.__exit__(None, None, None)
            self._reporter = None


def _figure(result: "ArmResult") -> str:
    """Return the widest primary metric of a verdict in words."""
    found = [metric for metric in result.metrics if metric.is_primary and metric.interval is not None]
    if not found:
        return f": {result.reasons[0]}" if result.reasons else ""
    from mezzotint.report.proof_words import name_words, spell_interval

    def reach(metric: "object") -> float:
        interval = metric.interval  # type: ignore[attr-defined]
        return max(abs(interval.low), abs(interval.high)) / metric.margin  # type: ignore[attr-defined, no-any-return]

    widest = max(found, key=lambda metric: reach(metric) if math.isfinite(reach(metric)) else math.inf)
    return f", {name_words(widest.name)} {spell_interval(widest)}"
