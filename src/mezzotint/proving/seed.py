"""All arms of one seed, trained in turns: step by step in one process, each on its own random numbers and settings.

Taking turns makes times comparable on a machine whose speed changes: a ratio is between two steps that ran next to
each other. The order turns around with every step, so that no arm always runs behind the same other one.
"""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import CheckpointError, NonFiniteError, ProofError, UserError, described
from mezzotint.parity.losses import final_loss, mean_loss
from mezzotint.parity.result import Run, RunStatus
from mezzotint.process import HardExit, exit_call, guarded
from mezzotint.proving.own_state import OwnState
from mezzotint.proving.slowness import write_profile
from mezzotint.proving.trainee import Closing, Trainee
from mezzotint.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from mezzotint.training.metrics import MetricsWriter, read_metrics

CHECKPOINT_SECONDS = 60.0  # between two checkpoints of a long seed
CHECKPOINTS = "checkpoints"
OnStep = Callable[[str, int, float], None]  # arm, its step, its loss


@dataclass(slots=True)
class _Turn:
    """One arm's place in the round."""

    arm: str
    make: Callable[[], Trainee]
    state: OwnState
    writer: MetricsWriter
    trainee: Trainee | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    status: RunStatus | None = None
    message: str = ""
    closing: Closing = field(default_factory=Closing)
    takes_turns: bool = True

    @property
    def is_over(self) -> bool:
        return self.status is not None


def train_seed(
    seed: int,
    makers: Mapping[str, Callable[[], Trainee]],
    folders: Mapping[str, Path],
    on_step: OnStep,
    *,
    has_own_errors: bool,
    is_traded_off: bool,
) -> tuple[Run, ...]:
    """Train the arms that `makers` make to their ends and return their runs, in this order; the first is the control.

    What goes wrong in one arm ends that arm alone and is recorded. An arm that runs out of memory beside the others is
    tried once more by itself. With `has_own_errors` a refusal of ours (an impossible policy) is an outcome of the
    user's code; else it ends everything. Where the folders hold checkpoints of an interrupted seed, it goes on from
    them, bit for bit. Raises ProofError, TrainingError for a full disk, KeyboardInterrupt.
    """
    turns = [
        _Turn(arm, make, OwnState(seed, f"arm {arm}"), MetricsWriter(folders[arm] / "metrics.jsonl"))
        for arm, make in makers.items()
    ]
    try:
        checkpoints = SeedCheckpoints(folders)
        first = checkpoints.restore(turns)
        in_turns = _in_turns(turns, on_step, checkpoints, first=first, has_own_errors=has_own_errors)
        for turn in [turn for turn in turns if turn.status is RunStatus.OUT_OF_MEMORY and len(turns) > 1]:
            again = _Turn(turn.arm, turn.make, OwnState(seed, f"arm {turn.arm}"), _emptied(turn.writer))
            turns[turns.index(turn)] = again
            in_turns.discard(turn.arm)
            _in_turns([again], on_step, None, first=0, has_own_errors=has_own_errors)
    finally:
        for turn in turns:
            _release(turn)
            turn.writer.close()
    for turn in turns:
        if turn.closing.profile is not None:
            write_profile(folders[turn.arm], turn.closing.profile)
    control = turns[0]
    return tuple(
        _run(seed, turn, control.seconds if turn.arm in in_turns else [], is_traded_off=is_traded_off) for turn in turns
    )


def _in_turns(
    turns: Sequence[_Turn],
    on_step: OnStep,
    checkpoints: "SeedCheckpoints | None",
    *,
    first: int,
    has_own_errors: bool,
) -> set[str]:
    """Advance all arms from round `first` to their ends; return which of them took turns with the first arm."""
    number = first
    while not all(turn.is_over for turn in turns):
        for turn in turns if number % 2 == 0 else reversed(turns):
            if not turn.is_over:
                _advance(turn, on_step, has_own_errors=has_own_errors)
                if turn.status not in (None, RunStatus.FINISHED):
                    _free_memory()  # for the others, which go on
        number += 1
        if checkpoints is not None:
            checkpoints.save_if_due(number, turns)
    for turn in turns:
        turn.takes_turns = getattr(turn.trainee, "takes_turns", True)
        if turn.status is RunStatus.FINISHED and turn.trainee is not None:
            _guarded(turn, partial(_finish, turn, turn.trainee), has_own_errors)
        _release(turn)
    _free_memory()
    return {turn.arm for turn in turns if turn.takes_turns and turns[0].takes_turns}


class SeedCheckpoints:
    """Checkpoints of all arms of a seed, for arms that can be saved; a round counts when all arms have it."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self._folders = {arm: folder / CHECKPOINTS for arm, folder in folders.items()}
        self._saved_at = time.monotonic()

    def save_if_due(self, number: int, turns: Sequence[_Turn]) -> None:
        """Save the state after round `number`, about once a minute."""
        running = [turn.trainee for turn in turns if turn.trainee is not None]
        if time.monotonic() - self._saved_at < CHECKPOINT_SECONDS or not all(hasattr(one, "state") for one in running):
            return
        for turn in turns:
            state = {
                "status": str(turn.status) if turn.status is not None else None,
                "message": turn.message,
                "steps": len(turn.losses),
                "trainee": turn.trainee.state() if turn.trainee is not None else None,  # type: ignore[attr-defined]
            }
            save_checkpoint(self._folders[turn.arm], number, state, keep=2)
        self._saved_at = time.monotonic()

    def restore(self, turns: Sequence[_Turn]) -> int:
        """Bring the arms to the newest round that all of them have whole, and return it; 0 where there is none."""
        found = [{path.name for path in list_checkpoints(self._folders[turn.arm])} for turn in turns]
        for name in sorted(set.intersection(*found), reverse=True):
            try:
                saved = [load_checkpoint(self._folders[turn.arm] / name) for turn in turns]
            except CheckpointError:
                continue
            lines = [
                read_metrics(turn.writer.path)[: one.state["steps"]] for turn, one in zip(turns, saved, strict=True)
            ]
            if all(len(rows) == one.state["steps"] for rows, one in zip(lines, saved, strict=True)):
                for turn, one, rows in zip(turns, saved, lines, strict=True):
                    _restore(turn, one.state, rows)
                return saved[0].step
        for turn in turns:
            turn.writer.truncate_after(0)
        return 0


def _restore(turn: _Turn, state: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Bring one arm back to where it was saved."""
    turn.writer.truncate_after(state["steps"])
    turn.losses = [float(line["loss"]) for line in lines]
    turn.seconds = [float(line["seconds"]) for line in lines]
    turn.status = RunStatus(state["status"]) if state["status"] is not None else None
    turn.message = state["message"]
    if state["trainee"] is not None:
        with turn.state.active():
            turn.trainee = turn.make()
            turn.trainee.load(state["trainee"])  # type: ignore[attr-defined]


def _finish(turn: _Turn, trainee: Trainee) -> None:
    turn.closing = trainee.finish()


def _advance(turn: _Turn, on_step: OnStep, *, has_own_errors: bool) -> None:
    line: Mapping[str, Any] | None = None
    seconds = 0.0

    def step() -> None:
        nonlocal line, seconds
        if turn.trainee is None:
            turn.trainee = turn.make()
        _wait_for_devices()
        start = time.perf_counter()
        line = turn.trainee.step()
        _wait_for_devices()
        seconds = time.perf_counter() - start

    _guarded(turn, step, has_own_errors)
    if turn.is_over:
        _release(turn)
        return
    if line is None:
        turn.status = RunStatus.FINISHED
        return
    loss = float(line["loss"])
    turn.losses.append(loss)
    turn.seconds.append(seconds)
    turn.writer.write({**line, "step": len(turn.losses), "seconds": seconds})
    on_step(turn.arm, len(turn.losses), loss)
    if not math.isfinite(loss):
        turn.status, turn.message = RunStatus.DIVERGED, f"the loss was {loss} at step {len(turn.losses)}"
        _release(turn)


def _guarded(turn: _Turn, action: Callable[[], None], has_own_errors: bool) -> None:
    """Run `action` on the arm's state, and note how it failed if it did."""
    try:
        with turn.state.active(), guarded():
            action()
    except ProofError:
        raise
    except NonFiniteError as error:
        turn.status, turn.message = RunStatus.DIVERGED, f"step {len(turn.losses) + 1}: {error}"
    except UserError as error:
        if not has_own_errors:
            raise
        turn.status, turn.message = RunStatus.FAILED, described(error)
    except SystemExit as error:
        if isinstance(error, HardExit) or not turn.losses:
            raise ProofError(
                f"the script called {exit_call(error)} after {len(turn.losses)} steps of {turn.arm}, so nothing can be "
                "said of it; let it raise an error, or return"
            ) from None
        turn.status, turn.message = RunStatus.FAILED, f"the script called {exit_call(error)}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a script may raise GeneratorExit, or a class derived from BaseException
        is_memory = is_out_of_memory(error)
        turn.status = RunStatus.OUT_OF_MEMORY if is_memory else RunStatus.FAILED
        turn.message = f"step {len(turn.losses) + 1}: {described(error)}"


_CUDA_ERROR_MEMORY_ALLOCATION = 2


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    if getattr(error, "error_code", None) == _CUDA_ERROR_MEMORY_ALLOCATION:  # a torch.AcceleratorError
        return True
    # neither has an exception type: the names of the allocator and of the status tell, whatever the words around them
    return any(name in str(error) for name in ("DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED"))


def _release(turn: _Turn) -> None:
    """Free what a run held."""
    trainee, turn.trainee = turn.trainee, None
    if trainee is None:
        return
    # a generator that refuses to end has had its say
    with turn.state.active(is_checked=False), contextlib.suppress(BaseException), guarded():
        trainee.close()


def _free_memory() -> None:
    """Let the device have what closed runs held, also in cycles."""
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def _emptied(writer: MetricsWriter) -> MetricsWriter:
    writer.truncate_after(0)
    return writer


def _wait_for_devices() -> None:
    """Let queued work end, so that a step's time is its own."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _run(seed: int, turn: _Turn, baseline: Sequence[float], *, is_traded_off: bool) -> Run:
    closing = turn.closing
    values: dict[str, float] = {}
    if turn.status is RunStatus.FINISHED:
        values = dict(closing.values)
        if turn.losses:
            values.update(final_loss=final_loss(turn.losses), curve=mean_loss(turn.losses))
    paired = baseline[: len(turn.seconds)]
    seconds = turn.seconds
    if seconds and not turn.takes_turns:  # all steps were trained within the first one's time
        seconds = [sum(seconds) / len(seconds)] * len(seconds)
    return Run(
        arm=turn.arm,
        seed=seed,
        status=turn.status or RunStatus.FAILED,
        losses=tuple(turn.losses),
        values=values,
        message=turn.message,
        seconds=tuple(seconds),
        baseline_seconds=tuple(paired) if len(paired) == len(turn.seconds) else (),
        tokens_per_step=closing.tokens_per_step,
        memory_bytes=closing.memory_bytes,
        num_parameters=closing.num_parameters,
        weights_digest=closing.weights_digest,
        skipped_steps=closing.skipped_steps,
        is_traded_off=is_traded_off,
    )
