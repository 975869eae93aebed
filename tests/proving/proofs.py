"""Experiments on small programs, run in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezzotint.parity.design import Experiment
from mezzotint.parity.result import ArmResult, Proof, Run
from mezzotint.proving.runner import run_proof, start_proof
from mezzotint.proving.store import ProofFolder
from mezzotint.proving.targets import experiment_for

RECIPE = [
    "model.dim=32", "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=64", "model.block_size=16",
    "model.dropout=0.1", "train.batch_size=4", "train.evaluate_batches=1", "data.max_bytes=100000",
]  # fmt: skip


class Quiet:
    """A watcher that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int, float]] = []
        self.seeds: list[int] = []
        self.notes: list[str] = []
        self.verdicts: list[list[str]] = []

    def seed_begins(self, seed: int, place: int, num_seeds: int) -> None:
        self.seeds.append(seed)

    def stepped(self, arm: str, step: int, loss: float) -> None:
        self.steps.append((arm, step, loss))

    def seed_ended(self, runs: Sequence[Run], results: Sequence[ArmResult]) -> None:
        self.verdicts.append([str(result.verdict) for result in results])

    def note(self, text: str) -> None:
        self.notes.append(text)


def small_recipe(**changes: Any) -> Experiment:
    """Return a design on the demo recipe, of seconds."""
    values: dict[str, Any] = {"seeds": 2, "steps": 6, "settings": RECIPE}
    return experiment_for("demo", **{**values, **changes})


def prove(folder: Path, experiment: Experiment, watcher: Quiet | None = None, **options: Any) -> Proof:
    """Run a whole experiment into `folder`."""
    return run_proof(start_proof(folder, experiment, "mezzotint prove", **options), watcher or Quiet())


def resume(folder: Path, watcher: Quiet | None = None) -> Proof:
    """Go on with a folder."""
    return run_proof(ProofFolder.open(folder), watcher or Quiet())


def substance(proof: Proof) -> dict[str, Any]:
    """Return what has to be the same however often a proof was interrupted: all but times."""
    timed = ("step_time", "tokens_per_second")
    return {
        "runs": [
            (
                run.arm,
                run.seed,
                run.status,
                list(map(repr, run.losses)),
                run.values,
                run.message,
                run.weights_digest,
                run.memory_bytes,
            )
            for run in proof.runs
        ],
        "results": [
            (one.arm, one.verdict, one.reasons, one.metrics, [c for c in one.costs if c.name not in timed])
            for one in proof.results
        ],
        "looks": proof.num_looks,
    }
