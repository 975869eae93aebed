"""A whole experiment: seed after seed until its design is fulfilled or decided, kept on disk as it goes."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from mezzotint.errors import ProofError, TrainingError
from mezzotint.parity.design import Experiment, Source
from mezzotint.parity.result import ArmResult, Proof, Run
from mezzotint.parity.verdict import is_decided, judge
from mezzotint.proving.conclusion import conclude
from mezzotint.proving.own_state import start_cuda
from mezzotint.proving.processes import Workers, affordable_jobs
from mezzotint.proving.seed import CHECKPOINTS, train_seed
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


def start_proof(path: Path, experiment: Experiment, command: str, *, jobs: int = 1) -> ProofFolder:
    """Make the folder of a proof, which will run `jobs` seeds at a time, and write its design."""
    program = Program(experiment)  # what cannot be run leaves nothing behind
    return ProofFolder.create(path, experiment, {**circumstances(program.digest, command), "jobs": jobs})


def circumstances(program: str, command: str) -> dict[str, Any]:
    """Return what the bits depend on besides the design, and what was typed where."""
    return {"program": program, "command": command, "folder": str(Path.cwd()), "environment": environment()}


def run_proof(folder: ProofFolder, watcher: Watcher) -> Proof:
    """Run what is missing of an experiment, as many seeds at a time as its folder says, and conclude.

    Seeds on disk are kept. Raises what `train_seed` raises; what is finished stays on disk.
    """
    experiment = folder.experiment
    if experiment.source is Source.SCRIPT and not Path(experiment.target.rpartition(":")[0]).exists():
        raise ProofError(
            f"{experiment.target} is not in {Path.cwd()}; the proof was begun in {folder.circumstances['folder']}"
        )
    with folder:
        program = Program(experiment)
        check_program(folder, program, watcher)
        start_cuda()
        runs = _all_runs(folder, program, watcher)
        return conclude(folder, runs)


def _all_runs(folder: ProofFolder, program: Program, watcher: Watcher) -> list[Run]:
    """Return the runs that the verdict rests on: of the seeds of the design, and further ones until it is decided.

    The first seed runs alone and shows how much memory one takes. How many fit is kept in the folder, because threads
    are divided among them, and sums depend on threads.
    """
    while True:
        runs, missing = _so_far(folder)
        if not missing:
            return runs
        if runs and folder.circumstances.get("jobs", 1) > 1:
            if "threads_per_job" not in folder.circumstances:
                _decide_jobs(folder, watcher)
                continue
            _train_in_processes(folder, watcher)
            continue
        _train_here(folder, program, missing[0], runs, watcher)


def _decide_jobs(folder: ProofFolder, watcher: Watcher) -> None:
    wanted = folder.circumstances["jobs"]
    jobs, why = affordable_jobs(wanted)
    if jobs < wanted:
        watcher.note(f"{jobs} of {wanted} seeds at a time, because {why}")
    folder.remember(jobs=jobs, threads_per_job=max(torch.get_num_threads() // jobs, 1))


def _so_far(folder: ProofFolder) -> tuple[list[Run], list[int]]:
    """Return the runs of the seeds on disk, in order, and the seeds that are still wanted."""
    experiment = folder.experiment
    runs: list[Run] = []
    missing: list[int] = []
    for place, seed in enumerate(experiment.all_seeds()):
        if place >= len(experiment.seeds) and not missing and is_decided(experiment, runs):
            break
        found = folder.read_seed(seed)
        if found is None:
            missing.append(seed)
        elif not missing:
            runs.extend(found)
    return runs, missing


def _train_here(folder: ProofFolder, program: Program, seed: int, before: Sequence[Run], watcher: Watcher) -> None:
    experiment = folder.experiment
    seeds = experiment.all_seeds()
    watcher.seed_begins(seed, seeds.index(seed) + 1, len(seeds))
    found = run_seed(folder, program, seed, watcher)
    watcher.seed_ended(found, judge(experiment, [*before, *found]) if before else ())


def _train_in_processes(folder: ProofFolder, watcher: Watcher) -> None:
    """Train missing seeds in workers until none is missing; those beyond the seed that decides are ended."""
    experiment = folder.experiment
    jobs, threads = int(folder.circumstances["jobs"]), int(folder.circumstances["threads_per_job"])
    watcher.note(f"{jobs} seeds at a time, {threads} thread{'s' if threads > 1 else ''} each")
    failure: TrainingError | None = None
    with Workers(folder, jobs, threads, watcher.stepped) as workers:
        while True:
            runs, missing = _so_far(folder)
            if not missing:
                for seed in workers.seeds:  # a worker whose runs are there, but which has not ended yet
                    if (ended := folder.read_seed(seed)) is not None:
                        watcher.seed_ended(ended, ())
                return
            if failure is None:
                workers.fill([seed for seed in missing if seed not in workers.seeds])
            elif not workers.seeds:
                raise failure
            try:
                seed = workers.wait()
            except TrainingError as error:
                failure = error  # the others come to their ends first
                continue
            ended = folder.read_seed(seed)
            if ended is None:
                raise ProofError(f"seed {seed} left no runs in {folder.path}; go on with --resume")
            runs, _ = _so_far(folder)
            watcher.seed_ended(ended, judge(experiment, runs) if len(runs) > len(experiment.arms) else ())


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
    for path in paths.values():
        shutil.rmtree(path / CHECKPOINTS, ignore_errors=True)
    return runs


def check_program(folder: ProofFolder, program: Program, watcher: Watcher, *, is_worker: bool = False) -> None:
    """Refuse to go on with another program, and say where the machine is another; a worker has its own threads."""
    then = folder.circumstances
    if then["program"] != program.digest:
        raise ProofError(
            f"{folder.experiment.target} or its data changed since the proof in {folder.path} began; put it back, or "
            "start anew with another --out"
        )
    for key, value in environment().items():
        before = then["environment"].get(key)
        if before != value and key != "kernels" and not (is_worker and key == "threads"):
            watcher.note(f"warning: {key} was {before} and is {value}, so runs may differ in their last bits")
