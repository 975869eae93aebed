"""`mz.prove`: the proof around a training loop of one's own.

with mz.prove("runs/mine", arms=["float32", "bf16-mixed"], seeds=5, metrics=["accuracy:0.5%:higher"]) as proof:
    for run in proof.runs():
        for loss in train(run.seed, run.policy):
            run.log(loss=loss)
        run.result(accuracy=evaluate())
print(proof.results[0].verdict)
"""

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from mezzotint.errors import NonFiniteError, ProofError, described, echoed
from mezzotint.parity.design import Arm, Experiment, Metric, Source
from mezzotint.parity.losses import final_loss, mean_loss
from mezzotint.parity.result import ArmResult, Proof, Run, RunStatus
from mezzotint.parity.verdict import is_decided
from mezzotint.policy.policy import Policy
from mezzotint.proving.conclusion import conclude, write_proof
from mezzotint.proving.design_text import DEFAULT_ARMS, DEFAULT_MARGIN, choose_metrics, parse_arm, parse_metric
from mezzotint.proving.own_state import seed_everything
from mezzotint.proving.runner import circumstances
from mezzotint.proving.seed import is_out_of_memory
from mezzotint.proving.store import ProofFolder
from mezzotint.proving.targets import decided
from mezzotint.proving.weights import weights_digest
from mezzotint.training.config import typed_value
from mezzotint.training.metrics import MetricsWriter

_RESERVED = ("loss", "final_loss", "curve")


class ProofRun:
    """One run to be made: train with `seed` and `policy`, `log` each step, and give the `result`.

    Before it is handed out, torch, numpy and Python are seeded with `seed`, so that all arms of a seed begin alike.
    As a context manager it records an error of its body as the end of this run, and lets the others go on.
    """

    def __init__(self, arm: Arm, seed: int, writer: MetricsWriter) -> None:
        self.arm = arm.name
        self.seed = seed
        self.policy = Policy.parse(arm.policy)
        pairs = (setting.split("=", 1) for setting in arm.settings)
        self.settings: dict[str, Any] = {key.strip(): typed_value(value) for key, value in pairs}
        self._writer = writer
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._figures: dict[str, list[tuple[int, float]]] = {}
        self._values: dict[str, float] = {}
        self._tokens: int | None = None
        self._status: RunStatus | None = None
        self._message = ""
        self._digest = ""
        self._num_parameters: int | None = None
        self._last = time.perf_counter()

    @property
    def is_over(self) -> bool:
        """Whether the run has diverged or failed, so that further steps count no more."""
        return self._status is not None

    def log(self, *, loss: Any, tokens: int | None = None, **figures: Any) -> None:
        """Record one step: its training loss, how many tokens it had, and any further numbers."""
        if self.is_over:
            return
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        value = _number("loss", loss)
        now = time.perf_counter()
        self._losses.append(value)
        self._seconds.append(now - self._last)
        self._tokens = tokens if tokens is not None else self._tokens
        numbers = {name: _number(name, figure) for name, figure in figures.items()}
        for name, number in numbers.items():
            self._figures.setdefault(name, []).append((len(self._losses), number))
        self._writer.write({"step": len(self._losses), "loss": value, **numbers, "seconds": self._seconds[-1]})
        if not math.isfinite(value):
            self._status, self._message = RunStatus.DIVERGED, f"the loss was {value} at step {len(self._losses)}"
        self._last = time.perf_counter()

    def result(self, *, model: nn.Module | None = None, **figures: Any) -> None:
        """Record final figures; of a `model` that is given, the weights' digest and number."""
        taken = [name for name in _RESERVED if name in figures]
        if taken:
            raise ProofError(f"{taken[0]} is recorded by every run; give the figure another name")
        for name, value in figures.items():
            number = _number(name, value)
            if math.isfinite(number):
                self._values[name] = number
        if model is not None:
            self._digest = weights_digest(model.state_dict())
            self._num_parameters = sum(parameter.numel() for parameter in model.parameters())

    def __enter__(self) -> "ProofRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or not isinstance(error, Exception) or isinstance(error, ProofError):
            return False
        if isinstance(error, NonFiniteError):
            self._status = RunStatus.DIVERGED
        else:
            self._status = RunStatus.OUT_OF_MEMORY if is_out_of_memory(error) else RunStatus.FAILED
        self._message = f"step {len(self._losses) + 1}: {described(error)}"
        return True

    def finished(self) -> Run:
        """Return what was recorded."""
        if not self._losses and self._status is None:
            raise ProofError(f"arm {self.arm}, seed {self.seed} logged no step; call run.log(loss=...) for each")
        values: dict[str, float] = {}
        if self._status is None:
            first_of_tail = len(self._losses) - max(len(self._losses) // 10, 1)
            for name, recorded in self._figures.items():
                tail = [number for step, number in recorded if step > first_of_tail] or [recorded[-1][1]]
                values[name] = statistics.fmean(tail)
            values = {name: value for name, value in {**values, **self._values}.items() if math.isfinite(value)}
            values.update(final_loss=final_loss(self._losses), curve=mean_loss(self._losses))
        return Run(
            arm=self.arm,
            seed=self.seed,
            status=self._status or RunStatus.FINISHED,
            losses=tuple(self._losses),
            values=values,
            message=self._message,
            seconds=tuple(self._seconds),
            tokens_per_step=self._tokens,
            num_parameters=self._num_parameters,
            weights_digest=self._digest,
        )


class prove:  # noqa: N801  used as a verb: with mz.prove(...)
    """A proof around one's own training loop; `out` is its folder, from which an interrupted one goes on.

    `arms` and `metrics` are spelled as on the command line, or are values of `mezzotint.parity.design`; the first arm
    is the control. `seeds` is a number, or the seeds themselves. With `max_seeds` seeds are added until the verdict
    stands. Runs that are on disk are not asked for again. Raises ProofError where `out` holds another design.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        arms: Sequence[str | Arm] = DEFAULT_ARMS,
        seeds: int | Sequence[int] = 5,
        metrics: Sequence[str | Metric] = (),
        max_seeds: int = 0,
        margin: float | None = None,
        alpha: float = 0.05,
    ) -> None:
        _check(out, arms, seeds, metrics, margin=margin, max_seeds=max_seeds, alpha=alpha)
        wanted = [
            parse_metric(metric, margin or DEFAULT_MARGIN) if isinstance(metric, str) else metric for metric in metrics
        ]
        self._experiment = Experiment(
            source=Source.CODE,
            target=Path(sys.argv[0]).name or "python",
            arms=tuple(decided(parse_arm(arm) if isinstance(arm, str) else arm) for arm in arms),
            seeds=tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
            steps=None,
            metrics=choose_metrics(Source.CODE, wanted, margin),
            max_seeds=max_seeds,
            alpha=alpha,
        )
        self._path = Path(out)
        self._folder: ProofFolder | None = None
        self._runs: list[Run] = []
        self._is_complete = False
        self.proof: Proof | None = None

    def __enter__(self) -> "prove":
        """Make the folder, or open it to go on."""
        if (self._path / "config.toml").exists():
            self._folder = ProofFolder.open(self._path)
            if self._folder.experiment != self._experiment:
                raise ProofError(
                    f"{self._path} holds a proof of another design; pass another folder, or the arms, seeds and "
                    "metrics that it was begun with"
                )
        else:
            self._folder = ProofFolder.create(self._path, self._experiment, circumstances("", " ".join(sys.argv)))
        self._folder.__enter__()
        return self

    def runs(self) -> Iterator[ProofRun]:
        """Yield the runs that are missing, seed by seed, the control first, until the design is fulfilled."""
        folder, experiment = self._opened(), self._experiment
        self._runs = []
        for place, seed in enumerate(experiment.all_seeds()):
            if place >= len(experiment.seeds) and is_decided(experiment, self._runs):
                break
            for arm in experiment.arms:
                found = folder.read_run(arm.name, seed)
                if found is None:
                    writer = MetricsWriter(folder.start_run(arm.name, seed) / "metrics.jsonl")
                    try:
                        seed_everything(seed)
                        run = ProofRun(arm, seed, writer)
                        yield run
                    finally:
                        writer.close()
                    found = run.finished()
                    folder.write_run(found)
                self._runs.append(found)
        self._is_complete = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Judge, and write proof.json, report.html and summary.md; after an error, or a break, only what is there."""
        folder = self._opened()
        try:
            if error is None and self._is_complete:
                self.proof = conclude(folder, self._runs)
                refusals = write_proof(folder, self.proof)
                if refusals:
                    raise ProofError(refusals[0])
        finally:
            folder.__exit__(kind, error, trace)

    @property
    def results(self) -> tuple[ArmResult, ...]:
        """The verdict on each treatment. Raises ProofError before all runs are there."""
        if self.proof is None:
            raise ProofError(f"runs are missing in {self._path}; let the loop over proof.runs() come to its end")
        return self.proof.results

    def _opened(self) -> ProofFolder:
        if self._folder is None:
            raise ProofError("mz.prove is a context; write with mz.prove(...) as proof:")
        return self._folder


def _check(out: Any, arms: Any, seeds: Any, metrics: Any, **numbers: Any) -> None:
    """Refuse arguments of other types than `prove` takes; what the numbers may be, the design checks."""
    if not isinstance(out, str | Path):
        raise ProofError(f"out={echoed(out)} is no path; pass the folder of the proof as a str or a pathlib.Path")
    for name, given, kinds, example in (
        ("arms", arms, (str, Arm), "['float32', 'bf16-mixed']"),
        ("metrics", metrics, (str, Metric), "['accuracy:0.5%:higher']"),
        ("seeds", () if _is_whole(seeds) else seeds, (int,), "5, or the seeds themselves: [0, 1, 2]"),
    ):
        is_list = isinstance(given, Sequence) and not isinstance(given, str)
        if not is_list or not all(isinstance(one, kinds) and not isinstance(one, bool) for one in given):
            raise ProofError(f"{name}={echoed(given)} is refused; pass for example {example}")
    for name, value in numbers.items():
        is_number = _is_whole(value) or (isinstance(value, float) and name != "max_seeds")
        if not is_number and not (value is None and name == "margin"):
            raise ProofError(f"{name}={echoed(value)} is no number; pass one, or leave it out")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    try:
        return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)
    except (TypeError, ValueError, RuntimeError):
        raise ProofError(f"{name}={str(value)[:40]!r} is no number; pass a number or a tensor of one element") from None
