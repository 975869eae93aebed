"""A whole experiment: seed after seed until its design is fulfilled or decided, kept on disk as it goes."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mezzotint.errors import ProofError
from mezzotint.parity.design import Experiment, Source
from mezzotint.parity.result import ArmResult, Proof, Run
from mezzotint.parity.verdict import is_decided, judge
from mezzotint.proving.conclusion import conclude
from mezzotint.proving.own_state import start_cuda
from mezzotint.proving.seed import train_seed
from mezzotint.proving.sources import Program
from mezzotint.proving.store import ProofFolder
from mezzotint.training.loop import environment


class Watcher(Protocol):
    """Shows an experiment to somebody while it runs."""

    def seed_begins(self, seed: int, place: int, num_seeds: int) -> None:
        """A seed begins, the `place`-th of at most `num_seeds`."""

    def stepped(self, arm: str, step: int, loss: float) -> None:
        """An arm made a step."""

    def seed_ended(self, runs: Sequence[Run], results: Sequence[ArmResult]) -> None:
        """A seed ended; `results` are the verdicts so far."""

    def note(self, text: str) -> None:
        """Something to know."""


def start_proof(path: Path, experiment: Experiment, command: str) -> ProofFolder:
    """Make the folder of a proof and write its design."""
    program = Program(experiment)  # what cannot be run leaves nothing behind
    return ProofFolder.create(path, experiment, circumstances(program.digest, command))


def circumstances(program: str, command: str) -> dict[str, Any]:
    """Return what the bits depend on besides the design, and what was typed where."""
    return {"program": program, "command": command, "folder": str(Path.cwd()), "environment": environment()}


def run_proof(folder: ProofFolder, watcher: Watcher, *, jobs: int = 1) -> Proof:
    """Run what is missing of an experiment, and conclude.

    Seeds on disk are kept. Raises what `train_seed` raises; what is finished stays on disk.
    """
    experiment = folder.experiment
    if experiment.source is Source.SCRIPT and not Path(experiment.target.rpartition(":")[0]).exists():
        raise ProofError(
            f"{experiment.target} is not in {Path.cwd()}; the proof was begun in {folder.circumstances['folder']}"
        )
    program = Program(experiment)
    _check_program(folder, program, watcher)
    start_cuda()
    with folder:
        runs = _all_runs(folder, program, watcher)
        return conclude(folder, runs)


def _all_runs(folder: ProofFolder, program: Program, watcher: Watcher) -> list[Run]:
    """Return the runs that the verdict rests on: of the seeds of the design, and further ones until it is decided."""
    experiment = folder.experiment
    seeds = experiment.all_seeds()
    runs: list[Run] = []
    for place, seed in enumerate(seeds):
        if place >= len(experiment.seeds) and is_decided(experiment, runs):
            break
        found = folder.read_seed(seed)
        if found is None:
            watcher.seed_begins(seed, place + 1, len(seeds))
            found = run_seed(folder, program, seed, watcher)
            runs.extend(found)
            watcher.seed_ended(found, judge(experiment, runs) if place else ())
        else:
            runs.extend(found)
    return runs


def run_seed(
    folder: ProofFolder, program: Program, seed: int, watcher: Watcher, *, is_traded_off: bool = False
) -> tuple[Run, ...]:
    """Run all arms of one seed and keep them."""
    paths = {arm.name: folder.start_run(arm.name, seed) for arm in folder.experiment.arms}
    runs = train_seed(
        seed,
        program.makers(seed, paths),
        paths,
        watcher.stepped,
        has_own_errors=program.has_own_errors,
        is_traded_off=is_traded_off,
    )
    for run in runs:
        folder.write_run(run)
    return runs


def _check_program(folder: ProofFolder, program: Program, watcher: Watcher) -> None:
    """Refuse to go on with another program, and say where the machine is another."""
    then = folder.circumstances
    if then["program"] != program.digest:
        raise ProofError(
            f"{folder.experiment.target} or its data changed since the proof in {folder.path} began; put it back, or "
            "start anew with another --out"
        )
    for key, value in environment().items():
        before = then["environment"].get(key)
        if before != value and key != "kernels":
            watcher.note(f"warning: {key} was {before} and is {value}, so runs may differ in their last bits")


def free_cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
