"""A training run from its first update, or from a checkpoint, to its last: metrics, evaluation, saving, stopping.

A signal (Ctrl-C, SIGTERM) lets the update finish, saves, and says how to go on. A run killed at any moment goes on
from its newest checkpoint that is whole, with the losses of a run that was never stopped.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from mezzotint.engine.result import Outcome
from mezzotint.errors import CheckpointError, MezzotintError, described, shortened
from mezzotint.policy.scaling import ScalingKind
from mezzotint.trace.watch import StepWatch
from mezzotint.training.checkpoint import load_newest, save_checkpoint
from mezzotint.training.config import check_resumable, from_toml, to_toml
from mezzotint.training.metrics import MetricsWriter, read_metrics
from mezzotint.training.progress import Reporter, Status, Stopwatch, resident_bytes
from mezzotint.training.rundir import RunDirectory
from mezzotint.training.tracker import Tracker
from mezzotint.training.trainer import Trainer, UpdateRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended. `stopped_by` is the signal that stopped it, None where it came to its end."""

    updates: int
    skipped: int
    loss: float
    validation_loss: float | None
    sample: str | None
    stopped_by: int | None


def run_training(
    trainer: Trainer, run: RunDirectory, reporter: Reporter, *, resume: bool, tracker: Tracker
) -> RunSummary:
    """Train to the end, or until a signal; write metrics and checkpoints into `run`.

    Raises CheckpointError when resuming finds no checkpoint that is whole and fits, NonFiniteError when NaN persists
    (the last checkpoint is then as good as ever), TrainingError when the disk is full.
    """
    with closing(MetricsWriter(run.metrics_path)) as writer:
        return _run(trainer, run, reporter, writer, resume=resume, tracker=tracker)


def _run(
    trainer: Trainer, run: RunDirectory, reporter: Reporter, writer: MetricsWriter, *, resume: bool, tracker: Tracker
) -> RunSummary:
    if resume:
        _go_back(trainer, run, reporter)
        num_damaged = writer.truncate_after(trainer.num_updates)
        if num_damaged:
            reporter.note(f"warning: {run.metrics_path}: {num_damaged} damaged lines are left out")
        num_missing = trainer.num_updates - len(read_metrics(run.metrics_path)) - num_damaged
        if num_missing > 0:
            reporter.note(f"warning: {run.metrics_path}: the lines of {num_missing} earlier steps are missing")
    stopwatch = Stopwatch()
    every = trainer.config.train
    loss, validation = _last_figures(run) if resume else (math.nan, None)
    saved_at = trainer.num_updates if resume else -1
    watcher = _Watcher(every.watch_every, reporter)
    with _signals() as stop_signal:
        while not trainer.is_finished and stop_signal() is None:
            with watcher.around(trainer.num_updates + 1) as figures:
                record = _timed_update(trainer, stopwatch)
            loss = record.loss
            line = {**metrics_line(record, stopwatch.last_seconds), **figures}
            watcher.follow(record)
            if record.update % every.evaluate_every == 0 or trainer.is_finished:
                validation = line["validation_loss"] = trainer.validation_loss()
            writer.write(line)
            tracker.write(line)
            reporter.status(_status(trainer, record, stopwatch))
            if "validation_loss" in line:
                reporter.note(f"step {record.update}: validation loss {validation:.4f}")
            if record.update % every.save_every == 0 or trainer.is_finished:
                _save(trainer, run)
                saved_at = record.update
        stopped_by = stop_signal()
        if stopped_by is not None and saved_at != trainer.num_updates:
            _save(trainer, run)
    is_over = trainer.is_finished and stopped_by is None
    return RunSummary(
        updates=trainer.num_updates,
        skipped=trainer.engine.skipped_steps,
        loss=loss,
        validation_loss=validation,
        sample=trainer.sample() if is_over and every.sample_tokens else None,
        stopped_by=stopped_by,
    )


def _save(trainer: Trainer, run: RunDirectory) -> None:
    run.check_exists()
    keep = trainer.config.train.keep_checkpoints
    save_checkpoint(run.checkpoints_path, trainer.num_updates, checkpoint_state(trainer), keep=keep)


class _Watcher:
    """Measures every so many updates, and the one after an update that was not finite; alarms go to the terminal."""

    def __init__(self, every: int, reporter: Reporter) -> None:
        self._every = every
        self._is_wanted = False
        self._lines: list[dict[str, Any]] = []
        self._watch = StepWatch(write=self._lines.append)
        self._reporter = reporter

    @contextmanager
    def around(self, update: int) -> Iterator[dict[str, Any]]:
        """Measure the update that runs inside, if it is its turn; yields what is to be added to its metrics."""
        figures: dict[str, Any] = {}
        if not self._every or (update % self._every and not self._is_wanted):
            yield figures
            return
        self._is_wanted = False
        with self._watch.recording(update):
            yield figures
        self._tell()
        figures["watch"] = {key: value for key, value in self._lines[0].items() if key not in ("kind", "step")}
        self._lines.clear()

    def follow(self, record: UpdateRecord) -> None:
        """Take note of how an update ended."""
        result = record.result
        self._is_wanted = bool(result.nonfinite)
        if self._every:
            self._watch.add_scale(record.update, result.loss_scale, is_skipped=result.outcome is Outcome.SKIPPED)
            self._tell()
            self._lines.clear()

    def _tell(self) -> None:
        for line in self._lines:
            if line["kind"] == "alarm":
                self._reporter.note(f"step {line['step']}: {line['message']}; {line['advice']}")


def _last_figures(run: RunDirectory) -> tuple[float, float | None]:
    """Return the last loss and validation loss that the metrics hold; NaN and None where there are none."""
    lines = read_metrics(run.metrics_path)
    validations = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return float(lines[-1]["loss"]) if lines else math.nan, validations[-1] if validations else None


def metrics_line(record: UpdateRecord, seconds: float) -> dict[str, Any]:
    """Return the line of metrics.jsonl for an update: everything but `seconds` is the same in every repetition."""
    result = record.result
    return {
        "step": record.update,
        "loss": record.loss,
        "grad_norm": result.grad_norm,
        "learning_rate": record.learning_rate,
        "outcome": str(result.outcome),
        "loss_scale": result.loss_scale,
        "nonfinite": list(result.nonfinite),
        "tokens": record.num_tokens,
        "seconds": seconds,
    }


def checkpoint_state(trainer: Trainer) -> dict[str, Any]:
    """Return what a checkpoint stores: the trainer's state, and the environment its bits depend on."""
    return {"trainer": trainer.state_dict(), "config": to_toml(trainer.config), "environment": environment()}


def environment() -> dict[str, Any]:
    """Return what the bits of a run depend on besides its configuration."""
    from mezzotint.lowprec.switch import status

    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": [f"{choice.format}: {choice.path}" for choice in status()],
    }


def _go_back(trainer: Trainer, run: RunDirectory, reporter: Reporter) -> None:
    checkpoint, refusals = load_newest(run.checkpoints_path)
    for refusal in refusals:
        reporter.note(f"warning: {refusal}")
    try:
        then = checkpoint.state.get("config")
        if then is not None:
            check_resumable(from_toml(then, str(checkpoint.path)), trainer.config, str(run.config_path))
        differences = _differences(checkpoint.state["environment"], environment())
        trainer.load_state_dict(checkpoint.state["trainer"])
        if trainer.num_updates != checkpoint.step:
            raise CheckpointError(f"{checkpoint.path} holds the state of step {trainer.num_updates}")
    except MezzotintError:
        raise
    except Exception as error:  # sealed, but not what mezzotint writes
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {shortened(described(error))}") from None
    for difference in differences:
        reporter.note(f"warning: {difference}, so the continued run may differ in the last bits")
    reporter.note(f"resuming after step {trainer.num_updates} from {checkpoint.path}")


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{key} was {then[key]} and is {now[key]}" for key in now if key in then and then[key] != now[key]]


def _timed_update(trainer: Trainer, stopwatch: Stopwatch) -> UpdateRecord:
    start = time.perf_counter()
    record = trainer.update()
    stopwatch.add(time.perf_counter() - start)
    return record


def _status(trainer: Trainer, record: UpdateRecord, stopwatch: Stopwatch) -> Status:
    total = trainer.config.train.steps
    is_scaled = trainer.engine.policy.scaling.kind is not ScalingKind.NONE
    on_cuda = trainer.device.type == "cuda"
    return Status(
        update=record.update,
        num_updates=total,
        loss=record.loss,
        tokens_per_second=record.num_tokens / stopwatch.mean_seconds,
        loss_scale=record.result.loss_scale if is_scaled else None,
        skipped=trainer.engine.skipped_steps,
        memory_bytes=torch.cuda.max_memory_allocated() if on_cuda else resident_bytes(),
        eta_seconds=(total - record.update) * stopwatch.mean_seconds,
    )


@contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """Catch SIGINT and SIGTERM; yields a function that returns the first that came, None before.

    A second one acts as usual, for whoever cannot wait. Outside the main thread nothing is caught, since Python
    delivers signals there only.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, note)
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
