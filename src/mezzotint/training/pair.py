"""Two or more policies trained side by side: same weights, same data, turn by turn in one process.

Taking turns makes the times comparable on a machine whose speed changes: each ratio is between two updates that ran
next to each other. One pair of runs shows what mixed precision costs and saves; it proves little about quality, since
another seed moves the final loss as well.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mezzotint.errors import ConfigError
from mezzotint.training.loop import metrics_line
from mezzotint.training.memory import StateMemory, StepMemory, state_memory
from mezzotint.training.metrics import MetricsWriter
from mezzotint.training.rundir import RunDirectory
from mezzotint.training.trainer import Trainer

WARMUP_UPDATES = 3  # not timed: first touches of memory, compiled loops


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What one policy reached and cost. Times are medians over its updates; the ratio is paired with the first arm's.

    `time_ratio` is this arm's update time over the first arm's, `time_ratio_spread` half its interquartile range.
    """

    name: str
    policy: str
    train_loss: float
    validation_loss: float
    seconds_per_update: float
    tokens_per_second: float
    time_ratio: float
    time_ratio_spread: float
    step_memory: StepMemory
    state_memory: StateMemory
    skipped: int
    losses: tuple[float, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Arm":
        """Return the arm whose fields `data` holds, as `mezzotint demo --json` prints them."""
        memories = {
            "step_memory": StepMemory(**data["step_memory"]),
            "state_memory": StateMemory(**data["state_memory"]),
        }
        return cls(**{**data, **memories, "losses": tuple(data["losses"])})


def train_side_by_side(
    trainers: Sequence[Trainer],
    names: Sequence[str],
    runs: Sequence[RunDirectory],
    on_update: Callable[[int, dict[str, float], float], None],
) -> tuple[Arm, ...]:
    """Train all to the end in turn; `on_update(step, losses by name, seconds of the round)` follows each round."""
    steps = {trainer.config.train.steps for trainer in trainers}
    if len(steps) != 1:
        raise ConfigError(f"arms of {sorted(steps)} steps cannot be compared; give all the same train.steps")
    memories = [trainer.measure_memory() for trainer in trainers]
    seconds: list[list[float]] = [[] for _ in trainers]
    losses: list[list[float]] = [[] for _ in trainers]
    tokens = 0
    writers = [MetricsWriter(run.metrics_path) for run in runs]
    for step in range(1, steps.pop() + 1):
        order = range(len(trainers)) if step % 2 else reversed(range(len(trainers)))
        for index in order:
            start = time.perf_counter()
            record = trainers[index].update()
            seconds[index].append(time.perf_counter() - start)
            losses[index].append(record.loss)
            tokens = record.num_tokens
            writers[index].write(metrics_line(record, seconds[index][-1]))
        on_update(step, {name: losses[i][-1] for i, name in enumerate(names)}, sum(times[-1] for times in seconds))
    for writer in writers:
        writer.close()
    return tuple(
        _arm(name, trainer, memories[index], seconds[index], seconds[0], losses[index], tokens)
        for index, (name, trainer) in enumerate(zip(names, trainers, strict=True))
    )


def _arm(
    name: str,
    trainer: Trainer,
    memory: StepMemory,
    seconds: list[float],
    first: list[float],
    losses: list[float],
    tokens: int,
) -> Arm:
    ratios = [a / b for a, b in zip(seconds[WARMUP_UPDATES:], first[WARMUP_UPDATES:], strict=True)] or [1.0]
    median = statistics.median(seconds[WARMUP_UPDATES:] or seconds)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [1.0, 1.0, 1.0]
    tail = losses[-max(len(losses) // 10, 1) :]
    return Arm(
        name=name,
        policy=str(trainer.engine.policy),
        train_loss=statistics.fmean(tail),
        validation_loss=trainer.validation_loss(),
        seconds_per_update=median,
        tokens_per_second=tokens / median,
        time_ratio=statistics.median(ratios),
        time_ratio_spread=(quartiles[2] - quartiles[0]) / 2,
        step_memory=memory,
        state_memory=state_memory(trainer.engine),
        skipped=trainer.engine.skipped_steps,
        losses=tuple(losses),
    )
