"""Kills at random moments: runs of every policy and proofs go on to the losses, weights and verdicts of whole ones.

    python benchmarks/kills.py --record benchmarks/records
    python benchmarks/kills.py --only bf16-mixed fp8-mixed --kills 3

A process that has imported torch forks a child for each life of a run. The child runs `mezzotint train` or
`mezzotint prove` and is ended by SIGKILL, with all processes that it started, at a moment drawn uniformly from a window
that opens when training begins. Only kills that land between the begin and the end of training count; the moment's
phase is read from memory that the child shares. When enough have landed, the run comes to its end and is compared, bit
for bit, with one that was never stopped. Where a run ends sooner, another one begins. Run it on Linux or macOS.
"""

import argparse
import atexit
import contextlib
import datetime
import importlib
import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no OpenMP threads, so its parent must not start any

import harness
from mezzotint.cli import main as command_line
from mezzotint.engine import engine as _engine  # noqa: F401  # loaded here once, not in each child
from mezzotint.errors import MezzotintError
from mezzotint.parity.result import Proof
from mezzotint.policy.presets import PRESETS
from mezzotint.proving import runner, seed, store
from mezzotint.training import checkpoint, loop, trainer  # noqa: F401
from mezzotint.training.checkpoint import STATE, TENSORS, list_checkpoints

MODEL = [
    "model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=32", "model.block_size=32",
    "model.dropout=0.1", f"data.source={json.dumps([argparse.__file__])}",
]  # fmt: skip
SAVE_EVERY = 4
PROOF_SEEDS, PROOF_STEPS, PROOF_JOBS = 4, 40, (1, 2)
LONGEST_SECONDS = 300.0


class Phase(IntEnum):
    """Where a child is; the last one that it wrote is where it was killed."""

    STARTING = 0
    RESUMING = 1
    TRAINING = 2
    WRITING = 3  # a checkpoint, or a finished run of a proof
    ENDED = 4


@dataclass
class Row:
    """What happened to one policy, or to one way to prove."""

    name: str
    kills: int = 0
    kills_while_writing: int = 0
    kills_while_resuming: int = 0
    leftovers: int = 0  # kills that left a half-written file or folder behind
    resumes: int = 0
    runs: int = 1
    seconds: float = 0.0  # of a run that is not stopped
    differences: list[str] = field(default_factory=list)
    refused: str = ""

    @property
    def is_equal(self) -> bool:
        """Whether all runs ended like the one that was never stopped."""
        return not self.refused and not self.differences


class Shared:
    """Memory that a child shares with its parent: the phase, and when training began and ended there."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)

    @property
    def phase(self) -> Phase:
        """The child's phase."""
        return Phase(self._memory[0])

    @phase.setter
    def phase(self, value: Phase) -> None:
        self._memory[0] = value

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Note a phase for the length of a block."""
        before, self.phase = self.phase, phase
        yield
        self.phase = before

    def wrap(self, owner: Any, name: str, phase: Phase, after: Phase | None = None) -> None:
        """Let calls of a function note their phase, and `after` when they are through."""
        function = getattr(owner, name)

        def noting(*args: Any, **options: Any) -> Any:
            with self.during(phase):
                found = function(*args, **options)
            if after is not None:
                self.phase = after
            return found

        setattr(owner, name, noting)


@dataclass(frozen=True)
class Life:
    """How a child ended: by our signal or with a code, in which phase."""

    phase: Phase
    code: int
    said: str
    seconds: float


def live(arguments: list[str], log: Path, killed_after: float | None) -> Life:
    """Run a command of mezzotint in a fork; kill it so many seconds after training began, unless it is None."""
    shared = Shared()
    child = os.fork()
    if child == 0:
        os.setsid()
        _be_command(arguments, log, shared)
    _wait_until(lambda: shared.phase is not Phase.STARTING or _has_ended(child))
    began = time.monotonic()
    if killed_after is not None:
        _wait_until(lambda: _has_ended(child), killed_after)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):  # processes that it started
        os.killpg(child, signal.SIGKILL)
    said = log.read_text(errors="replace").strip().splitlines()
    code = os.waitstatus_to_exitcode(status)
    return Life(shared.phase, code, said[-1] if said else "", time.monotonic() - began)


def _be_command(arguments: list[str], log: Path, shared: Shared) -> None:
    """Become a command of mezzotint, and end with its exit code."""
    atexit._clear()  # a command that ran a script calls exit functions: the parent's would delete its folders
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    shared.wrap(loop, "_go_back", Phase.RESUMING)
    shared.wrap(loop, "save_checkpoint", Phase.WRITING)
    shared.wrap(seed, "save_checkpoint", Phase.WRITING)
    shared.wrap(store.ProofFolder, "write_run", Phase.WRITING)
    shared.wrap(loop, "run_training", Phase.TRAINING, Phase.ENDED)
    shared.wrap(runner, "run_proof", Phase.TRAINING, Phase.ENDED)
    seed.CHECKPOINT_SECONDS = 0.1  # so that proofs of seconds have checkpoints too
    sys.argv = ["mezzotint", *arguments]
    code = 1
    try:
        command_line.main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _wait_until(condition: Callable[[], bool], seconds: float = LONGEST_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.0005)


@dataclass(frozen=True)
class Subject:
    """Something to kill: how it begins and goes on, and what is to be the same in the end."""

    name: str
    begin: list[str]  # without --out
    goes_on: str  # the command that takes --resume
    outcome: Callable[[Path], dict[str, Any]]
    codes: tuple[int, ...] = (0,)

    def progress(self, folder: Path) -> set[Path]:
        """Return what a run can go on from."""
        return set(folder.rglob("step-*")) | set(folder.rglob("run.json"))

    def can_resume(self, folder: Path) -> bool:
        """Return whether there is something to go on with."""
        if self.goes_on == "prove":
            return (folder / "config.toml").exists()
        return bool(list_checkpoints(folder / "checkpoints"))


def kill_again_and_again(subject: Subject, kills: int, chance: random.Random, folder: Path) -> Row:
    """Return what came of `kills` kills of a subject."""
    row = Row(subject.name)
    whole = folder / "whole"
    life = live([*subject.begin, "--out", str(whole)], folder / "log", None)
    if life.code not in subject.codes:
        row.refused = life.said
        return row
    row.seconds, expected = life.seconds, subject.outcome(whole)
    window = 2 * life.seconds / kills
    while True:
        cut = folder / f"cut-{row.runs}"
        while row.kills < kills:
            before = subject.progress(cut)
            life = live(_next(subject, cut, row), folder / "log", chance.uniform(0, window))
            if life.code != -signal.SIGKILL:
                window *= 0.8  # so that the next run is killed more often
                break
            _count(row, life, cut)
            if subject.progress(cut) == before:
                window *= 1.2  # so that runs come to their next checkpoints, on machines of any speed
        else:
            life = live(_next(subject, cut, row), folder / "log", None)
        if life.code not in subject.codes:
            row.differences.append(f"exit code {life.code}: {life.said}")
            return row
        found = subject.outcome(cut)
        row.differences += [key for key in expected if expected[key] != found.get(key)]
        if row.kills >= kills or row.differences:
            return row
        row.runs += 1


def _next(subject: Subject, cut: Path, row: Row) -> list[str]:
    """Return the command that begins a run or goes on with it."""
    if subject.can_resume(cut):
        row.resumes += 1
        return [subject.goes_on, "--resume", str(cut)]
    shutil.rmtree(cut, ignore_errors=True)  # killed before there was anything to go on with
    return [*subject.begin, "--out", str(cut)]


def _count(row: Row, life: Life, cut: Path) -> None:
    if life.phase in (Phase.STARTING, Phase.ENDED):
        return
    row.kills += 1
    row.kills_while_writing += life.phase is Phase.WRITING
    row.kills_while_resuming += life.phase is Phase.RESUMING
    row.leftovers += any(True for _ in cut.rglob(".partial-*"))


def training(policy: str, steps: int) -> Subject:
    """Return a small run in a policy."""
    settings = [
        *MODEL, f"train.steps={steps}", f"train.save_every={SAVE_EVERY}", "train.evaluate_every=40",
        "train.evaluate_batches=2", "train.batch_size=4", "train.accumulate=2", "train.sample_tokens=0",
    ]  # fmt: skip
    words = [word for setting in settings for word in ("--set", setting)]
    begin = ["train", "tiny-1m", "--policy", policy, *words]
    return Subject(policy, begin, "train", _end_of_training)


def _end_of_training(folder: Path) -> dict[str, Any]:
    """Return what decides: every line of the metrics but its time, and the newest checkpoint byte by byte."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"], line["crc32"]
    newest = list_checkpoints(folder / "checkpoints")[-1]
    return {
        "metrics.jsonl": lines,
        "final step": newest.name,
        **{f"final {name}": (newest / name).read_bytes() for name in (TENSORS, STATE)},
    }


def proving(jobs: int) -> Subject:
    """Return a small proof with so many seeds at a time."""
    settings = [*MODEL, "train.batch_size=4", "train.evaluate_batches=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    begin = [
        "prove", "--seeds", str(PROOF_SEEDS), "--steps", str(PROOF_STEPS), "--jobs", str(jobs),
        "--arm", "float32", "--arm", "bf16-stochastic", *words, "demo",
    ]  # fmt: skip
    return Subject(f"prove-{jobs}", begin, "prove", _end_of_proof, codes=(0, 1, 3))


def _end_of_proof(folder: Path) -> dict[str, Any]:
    """Return what decides: all of a proof but times, and what depends on them."""
    proof = Proof.from_json(json.loads((folder / "proof.json").read_text()))
    runs = {(run.arm, run.seed): (run.status, run.losses, run.values, run.weights_digest) for run in proof.runs}
    return {
        **{f"run {arm} {seed}": repr(value) for (arm, seed), value in runs.items()},
        "verdicts": repr([(one.arm, one.verdict, one.reasons, one.metrics) for one in proof.results]),
        "looks": proof.num_looks,
        "exit code": proof.exit_code,
    }


def check_fork(subject: Subject, folder: Path) -> bool:
    """Return whether a fork computes what a process of its own does."""
    command = [sys.executable, "-m", "mezzotint", *subject.begin, "--out", str(folder / "process")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode not in subject.codes:
        raise SystemExit(f"{subject.name}: {done.stderr.strip()}")
    life = live([*subject.begin, "--out", str(folder / "fork")], folder / "log", None)
    return life.code == done.returncode and subject.outcome(folder / "fork") == subject.outcome(folder / "process")


def table(rows: list[Row]) -> str:
    """Return the rows for people."""
    header = ["what", "kills", "in a write", "while resuming", "left half a file", "resumes", "runs", "equal"]
    cells = [
        [row.name, *map(str, (row.kills, row.kills_while_writing, row.kills_while_resuming, row.leftovers)),
         str(row.resumes), str(row.runs), _words(row)]
        for row in rows
    ]  # fmt: skip
    return harness.markdown_table(header, cells)


def _words(row: Row) -> str:
    if row.refused:
        return f"not run: {row.refused}"
    return "yes" if row.is_equal else f"NO: {'; '.join(row.differences)}"


def load_what_children_load(subject: Subject, folder: Path) -> None:
    """Import here what a run imports, so that each child need not."""
    importlib.import_module("torch._dynamo")
    modules = folder / "modules"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sys.argv = ["mezzotint", *subject.begin, "--out", str(folder / "loads")]
            command_line.has_run_script = lambda _since=0: False  # main() would end this process before it has told
            with contextlib.suppress(SystemExit), (folder / "log").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                command_line.main()
            modules.write_text("\n".join(sys.modules))
            code = 0
        finally:
            os._exit(code)
    os.waitpid(child, 0)
    for name in modules.read_text().split() if modules.exists() else ():
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    proofs = {f"prove-{jobs}": jobs for jobs in PROOF_JOBS}
    parser.add_argument("--only", nargs="+", choices=[*PRESETS, *proofs], default=[*PRESETS, *proofs])
    parser.add_argument("--kills", type=int, default=25, help="kills of each that land inside the run")
    parser.add_argument("--steps", type=int, default=200, help="updates of a training run")
    parser.add_argument(
        "--unchecked", dest="is_unchecked", action="store_true", help="do not compare a fork with a process first"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--record", type=Path, help="folder to write a dated record into, where today's rows are kept")
    args = parser.parse_args()
    facts = harness.machine()
    rows = _rows_of_today(args.record, args.only) if args.record else []
    with tempfile.TemporaryDirectory(prefix="mezzotint-kills-") as name:
        subjects = [proving(proofs[one]) if one in proofs else training(one, args.steps) for one in args.only]
        load_what_children_load(subjects[0], Path(name))
        if not args.is_unchecked and not check_fork(subjects[0], Path(name)):
            raise SystemExit(f"{subjects[0].name}: a fork computes other numbers than a process of its own")
        for subject in subjects:
            folder = Path(tempfile.mkdtemp(dir=name))
            row = kill_again_and_again(subject, args.kills, random.Random(f"{args.seed} {subject.name}"), folder)
            shutil.rmtree(folder)
            rows.append(row)
            print(f"{row.name}: {row.kills} kills, {_words(row)}", file=sys.stderr, flush=True)
            if args.record:
                _record(args.record, rows, facts)
    print(table(rows))
    sys.exit(0 if all(row.is_equal or row.refused for row in rows) else 1)


def _rows_of_today(folder: Path, without: list[str]) -> list[Row]:
    """Return the rows that other calls have recorded today."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    path = folder / f"kills-{today}.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())["results"]
    kept = [{key: value for key, value in row.items() if key != "equal"} for row in found]
    return [Row(**row) for row in kept if row["name"] not in without]


def _record(folder: Path, rows: list[Row], facts: dict[str, Any]) -> None:
    order = [*PRESETS, *(f"prove-{jobs}" for jobs in PROOF_JOBS)]
    results = [{**asdict(row), "equal": row.is_equal} for row in sorted(rows, key=lambda row: order.index(row.name))]
    harness.write_record(folder, "kills", {"kills": table(rows)}, results, facts)


if __name__ == "__main__":
    try:
        main()
    except MezzotintError as error:
        sys.exit(str(error))
