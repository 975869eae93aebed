"""Seeds in parallel processes: how many memory allows, threads divided among them, and a worker for each seed.

A worker reads the design from the folder, so nothing but the folder and a seed is passed to it. Its progress comes
back as lines on its standard output. It ends when its parent does, whose end closes its standard input.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from mezzotint.errors import ProofError, TrainingError
from mezzotint.hardware import host
from mezzotint.proving.store import ProofFolder

MARGIN = 1.25  # of memory that a further process may need beyond the first one's peak


@dataclass(slots=True)
class _Worker:
    seed: int
    process: "subprocess.Popen[str]"
    errors: Path
    reader: threading.Thread = field(init=False)

    def close(self) -> str:
        """Close what belongs to a process that has ended, and return its last words."""
        self.reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        said = self.errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        self.errors.unlink(missing_ok=True)
        return said[-1] if said else ""


def affordable_jobs(wanted: int) -> tuple[int, str]:
    """Return how many seeds may run at a time by the memory that this process has needed, and why."""
    peak, free = _peak_bytes(), host.free_memory_bytes()
    counts = [wanted]
    words = ""
    if peak and free is not None:
        counts.append(int(free / (peak * MARGIN)))
        words = f"a seed takes {peak / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    if torch.cuda.is_available():
        of_card, (free_of_card, _) = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()
        if of_card:
            counts.append(int((free_of_card + torch.cuda.memory_reserved()) / (of_card * MARGIN)))
            words = f"a seed takes {of_card / 2**30:.1f} GiB of the card, {free_of_card / 2**30:.1f} GiB are free"
    return max(min(counts), 1), words


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Workers:
    """Up to `jobs` worker processes; use it as a context manager, at whose end those that still run are ended."""

    def __init__(
        self, folder: ProofFolder, jobs: int, threads: int, on_step: Callable[[str, int, float], None]
    ) -> None:
        self._folder, self._jobs, self._threads, self._on_step = folder, jobs, threads, on_step
        self._running: list[_Worker] = []

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running:
            worker.process.terminate()
        for worker in self._running:
            worker.process.wait()
            worker.close()
        self._running.clear()

    @property
    def seeds(self) -> list[int]:
        """The seeds that are being trained."""
        return [worker.seed for worker in self._running]

    def fill(self, seeds: Sequence[int]) -> None:
        """Start workers for the first of these seeds, as many as have room."""
        for seed in seeds[: self._jobs - len(self._running)]:
            self._running.append(self._start(seed))

    def _start(self, seed: int) -> _Worker:
        errors = self._folder.path / f".worker-{seed}.err"
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._threads), "MKL_NUM_THREADS": str(self._threads)}
        with errors.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "mezzotint.proving.worker", str(self._folder.path), str(seed)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
            )
        worker = _Worker(seed, process, errors)
        worker.reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        worker.reader.start()
        return worker

    def _read(self, lines: IO[str]) -> None:
        for line in lines:
            step: dict[str, Any] = json.loads(line)
            self._on_step(step["arm"], step["step"], float(step["loss"]))

    def wait(self) -> int:
        """Wait for the next worker to end and return its seed. Raises what the worker raised, in its words."""
        while True:
            for worker in self._running:
                try:
                    code = worker.process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
                self._running.remove(worker)
                said = worker.close()
                if code or self._folder.read_seed(worker.seed) is None:
                    raise _failure(worker.seed, code, said)
                return worker.seed


def _failure(seed: int, code: int, said: str) -> Exception:
    if code == 2:
        return ProofError(said.removeprefix("mezzotint: error: "))
    if code < 0:
        return TrainingError(
            f"the process of seed {seed} was ended by signal {-code}, as the system does where memory runs out; "
            "finished seeds are kept: go on with --resume and fewer --jobs"
        )
    return TrainingError(f"the process of seed {seed} ended with code {code}: {said}; finished seeds are kept")
