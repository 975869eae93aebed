"""One seed of a proof in a process of its own: python -m mezzotint.proving.worker FOLDER SEED."""

import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from mezzotint.errors import MezzotintError
from mezzotint.parity.result import ArmResult, Run
from mezzotint.process import exit_now, guarded
from mezzotint.proving.own_state import start_cuda
from mezzotint.proving.runner import check_program, run_seed
from mezzotint.proving.sources import Program
from mezzotint.proving.store import ProofFolder
from mezzotint.torch_internals.python import end_after_script


class _Lines:
    """Writes each step as a line of JSON."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    def seed_begins(self, seed: int, place: int, num_seeds: int) -> None:
        """Nobody reads it."""

    def stepped(self, arm: str, step: int, loss: float) -> None:
        self._out.write(json.dumps({"arm": arm, "step": step, "loss": str(loss)}) + "\n")
        self._out.flush()

    def seed_ended(self, runs: Sequence[Run], results: Sequence[ArmResult]) -> None:
        """Nobody reads it."""

    def note(self, text: str) -> None:
        sys.stderr.write(text + "\n")


def main(path: str, seed: str) -> int:
    """Run one seed and return the exit code."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lines = _Lines(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # what the script prints is no progress
    try:
        folder = ProofFolder.open(Path(path))
        program = Program(folder.experiment)
        check_program(folder, program, lines, is_worker=True)
        start_cuda()
        with guarded():
            run_seed(folder, program, int(seed), lines, is_traded_off=True)
    except MezzotintError as error:
        sys.stderr.write(f"mezzotint: error: {error}\n")
        return 2
    return 0


def _end_with_parent() -> None:
    # not through sys.stdin, whose lock a thread may not hold when the interpreter ends
    while os.read(0, 1):
        pass
    exit_now(1)


if __name__ == "__main__":
    end_after_script(main(*sys.argv[1:]))
