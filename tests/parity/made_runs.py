"""Designs and runs made of numbers, for tests of verdicts."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mezzotint.parity.design import Arm, Better, Experiment, Metric, Source
from mezzotint.parity.result import Run, RunStatus

LOSS = Metric(name="final_loss", margin=0.005)
CONTROL, TREATMENT = "float32", "bf16-mixed"


def design(*metrics: Metric, seeds: Iterable[int] = range(5), arms: Sequence[str] = (), **fields: Any) -> Experiment:
    names = (CONTROL, *(arms or (TREATMENT,)))
    return Experiment(
        source=Source.CODE,
        target="made",
        arms=tuple(Arm(name=name, policy="float32") for name in names),
        seeds=tuple(seeds),
        steps=20,
        metrics=metrics or (LOSS,),
        **fields,
    )


def curve(end: float, start: float = 10.3, steps: int = 20) -> tuple[float, ...]:
    """Losses from `start` to `end`, which no 16-bit format holds exactly."""
    return tuple(start + (end - start) * step / (steps - 1) for step in range(steps))


def run(arm: str, seed: int, values: dict[str, float], **fields: Any) -> Run:
    defaults = {"status": RunStatus.FINISHED, "losses": curve(2.7 + seed / 7 + (arm != CONTROL) / 1000)}
    return Run(arm=arm, seed=seed, values=values, **{**defaults, **fields})


def paired(
    controls: Sequence[float], treatments: Sequence[float], name: str = LOSS.name, arm: str = TREATMENT, **fields: Any
) -> tuple[Run, ...]:
    """Runs of seeds 0, 1, ... whose metric `name` has these values."""
    runs = []
    for seed, (control, treatment) in enumerate(zip(controls, treatments, strict=True)):
        runs += [run(CONTROL, seed, {name: control}, **fields), run(arm, seed, {name: treatment}, **fields)]
    return tuple(runs)


def changed(runs: Iterable[Run], change: Callable[[Run], Run | None]) -> tuple[Run, ...]:
    """The runs, each passed through `change`; None leaves one out."""
    return tuple(new for old in runs if (new := change(old)) is not None)


ABSOLUTE = Metric(name="final_loss", margin=0.02, is_relative=False)
ACCURACY = Metric(name="accuracy", margin=0.01, is_relative=False, better=Better.HIGHER)
