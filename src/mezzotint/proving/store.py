"""The folder of a proof: its design, its runs, and what became of it.

    config.toml                      the design, written before the first step
    circumstances.json               what the bits depend on besides the design, and where it was started
    runs/<arm>/seed-<n>/run.json     a finished run, whole or not there
    runs/<arm>/seed-<n>/metrics.jsonl
    proof.json, report.html, summary.md

A run counts when its run.json is there, so a process killed at any moment loses at most the seed it was in.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mezzotint.errors import ProofError, TrainingError, shortened
from mezzotint.files import read_regular, write_whole
from mezzotint.parity.design import Experiment
from mezzotint.parity.result import Run
from mezzotint.proving.design_file import design_from_toml, design_to_toml
from mezzotint.training.rundir import RunDirectory

SCHEMA = "mezzotint.run/1"
_FIRST_KEYS = {"digest", "program", "command", "folder", "environment"}  # of circumstances.json since its first version


class ProofFolder:
    """A proof on disk. Use it as a context manager while it is written: only one process may."""

    def __init__(self, path: Path, experiment: Experiment, circumstances: Mapping[str, Any]) -> None:
        self.path = path
        self.experiment = experiment
        self.circumstances = dict(circumstances)
        self._lock = RunDirectory(path)

    @classmethod
    def create(cls, path: Path, experiment: Experiment, circumstances: Mapping[str, Any]) -> "ProofFolder":
        """Make the folder and write the design. Raises ProofError where it holds something, or cannot be written."""
        if path.exists() and not path.is_dir():
            raise ProofError(f"--out {path} is a file; pass a folder that does not exist yet")
        if path.exists() and any(path.iterdir()):
            raise ProofError(
                f"--out {path} exists and is not empty; pass another folder with --out, or go on with --resume {path}"
            )
        folder = cls(path, experiment, circumstances)
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_whole(path / "circumstances.json", json.dumps(folder._sealed(), indent=1))
            write_whole(path / "config.toml", design_to_toml(experiment))
        except OSError as error:
            raise ProofError(f"--out {path} cannot be written: {error.strerror or error}; pass another") from None
        return folder

    @classmethod
    def open(cls, path: Path) -> "ProofFolder":
        """Return the proof in `path`, to go on with. Raises ProofError where it holds none, or a changed design."""
        config, circumstances = path / "config.toml", path / "circumstances.json"
        if not config.is_file() or not circumstances.is_file():
            what = "does not exist" if not path.exists() else "holds no design"
            raise ProofError(f"--resume {path}: it {what}; pass a folder that mezzotint prove made")
        facts = _circumstances(circumstances)
        experiment = design_from_toml(_text(config), str(config))
        if facts.pop("digest", None) != experiment.digest:
            raise ProofError(
                f"{config} was changed since the proof began (its digest is {experiment.digest} now); put it back, or "
                f"start anew with mezzotint prove {config} --out another folder"
            )
        return cls(path, experiment, facts)

    def _sealed(self) -> dict[str, Any]:
        facts = {"digest": self.experiment.digest, **self.circumstances}
        return {**facts, "sha256": _seal(facts)}

    def remember(self, **facts: Any) -> None:
        """Add facts to the circumstances, for a process that goes on with this folder."""
        self.circumstances.update(facts)
        self._write(self.path / "circumstances.json", json.dumps(self._sealed(), indent=1))

    def __enter__(self) -> "ProofFolder":
        self._lock.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def run_path(self, arm: str, seed: int) -> Path:
        """Return the folder of one run."""
        return self.path / "runs" / arm / f"seed-{seed}"

    def start_run(self, arm: str, seed: int) -> Path:
        """Return the folder of a run, empty but for checkpoints of an interrupted one and what led to them."""
        path = self.run_path(arm, seed)
        try:
            if not (path / "checkpoints").is_dir():
                shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(self._why_not(path, error)) from None
        return path

    def write_run(self, run: Run) -> None:
        """Keep a finished run. Raises TrainingError where the disk takes it no more; finished runs are untouched."""
        body = json.dumps(run.to_json(), allow_nan=False)
        text = json.dumps({"schema": SCHEMA, "digest": self.experiment.digest, "sha256": _sha256(body)}) + "\n" + body
        self._write(self.run_path(run.arm, run.seed) / "run.json", text)

    def read_run(self, arm: str, seed: int) -> Run | None:
        """Return a finished run; None where there is none, or one that is damaged. Raises ProofError for a stranger."""
        path = self.run_path(arm, seed) / "run.json"
        try:
            head, _, body = read_regular(path).decode().partition("\n")
            facts = json.loads(head)
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(facts, dict) or facts.get("schema") != SCHEMA or _sha256(body) != facts.get("sha256"):
            return None
        if facts.get("digest") != self.experiment.digest:
            raise ProofError(
                f"{path} belongs to design {facts.get('digest')}, this folder's is {self.experiment.digest}; remove "
                "the run, or put it back where it came from"
            )
        try:
            run = Run.from_json(json.loads(body))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        return run if (run.arm, run.seed) == (arm, seed) else None  # else it was moved here from another run

    def read_seed(self, seed: int) -> tuple[Run, ...] | None:
        """Return the runs of all arms with a seed, None where one is missing."""
        runs = [self.read_run(arm.name, seed) for arm in self.experiment.arms]
        found = tuple(run for run in runs if run is not None)
        return found if len(found) == len(runs) else None

    def write(self, name: str, text: str) -> Path:
        """Write a file of the folder, whole or not at all. Raises TrainingError where the disk takes it no more."""
        path = self.path / name
        self._write(path, text)
        return path

    def _write(self, path: Path, text: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
        except OSError as error:
            raise TrainingError(self._why_not(path, error)) from None

    def _why_not(self, path: Path, error: OSError) -> str:
        seeds = self.experiment.all_seeds()
        kept = sum(self.read_seed(seed) is not None for seed in seeds)
        what = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"the disk is full ({shutil.disk_usage(self.path.parent).free / 2**20:.1f} MiB free)"
        return (
            f"{path} cannot be written: {what}; the runs of {kept} seed{'s' if kept != 1 else ''} are safe: make room "
            f"and go on with --resume {self.path}"
        )


def _text(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except OSError as error:
        raise ProofError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ProofError(f"{path} is damaged ({shortened(error)}); start anew") from None


def _circumstances(path: Path) -> dict[str, Any]:
    """Return the circumstances without their checksum. Raises ProofError where it does not match them."""
    text = _text(path)
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProofError(f"{path} is damaged ({shortened(error)}); start anew") from None
    seal = facts.pop("sha256", None) if isinstance(facts, dict) else None
    if isinstance(facts, dict) and seal is None and set(facts) >= _FIRST_KEYS:
        raise ProofError(f"{path} has no checksum: an older version of mezzotint wrote this folder; start anew")
    if not isinstance(facts, dict) or seal != _seal(facts):
        raise ProofError(f"{path} is damaged: its checksum does not match its content; start anew")
    return facts


def _seal(facts: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(facts, sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
