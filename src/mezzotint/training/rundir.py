"""The run directory: config.toml, metrics.jsonl, checkpoints/, and a lock while somebody trains into it."""

import os
import re
import shutil
from pathlib import Path
from types import TracebackType

from mezzotint.errors import ConfigError
from mezzotint.training.checkpoint import list_checkpoints

try:
    import fcntl
except ImportError:  # Windows: no lock there, and a second writer is the user's own care
    fcntl = None  # type: ignore[assignment]


class RunDirectory:
    """One run on disk. Use it as a context manager: the lock is given back at the end, and by the system at a kill."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = -1

    @property
    def config_path(self) -> Path:
        """The complete configuration of the run."""
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        """One line per step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @classmethod
    def create(cls, path: Path, config_toml: str) -> "RunDirectory":
        """Make the directory and write its configuration; raise ConfigError, leaving nothing, where that cannot be."""
        if path.exists() and not path.is_dir():
            raise ConfigError(f"--out {path} is a file; pass a folder that does not exist yet")
        if path.exists() and any(path.iterdir()):
            raise ConfigError(
                f"--out {path} exists and is not empty; pass another folder with --out, or go on with that run by "
                f"--resume {path}"
            )
        existed = path.exists()
        try:
            (path / "checkpoints").mkdir(parents=True)
            partial = path / "config.toml.partial"
            partial.write_text(config_toml, encoding="utf-8")
            partial.replace(path / "config.toml")
        except OSError as error:
            if not existed:
                shutil.rmtree(path, ignore_errors=True)
            raise ConfigError(
                f"--out {path} cannot be written: {error.strerror or error}; pass a folder that can"
            ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Return the run directory at `path`, to resume; raise ConfigError where it is none or saved nothing."""
        run = cls(path)
        if not run.config_path.is_file():
            what = "does not exist" if not path.exists() else "holds no config.toml"
            raise ConfigError(f"--resume {path}: it {what}, so it is no run directory; pass one that --out made")
        if not list_checkpoints(run.checkpoints_path):
            raise ConfigError(
                f"--resume {path}: the run saved no checkpoint before it ended; start it again with "
                f"mezzotint train {run.config_path} --out another folder"
            )
        return run

    def __enter__(self) -> "RunDirectory":
        if fcntl is not None:
            self._lock = os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._lock)
                raise ConfigError(
                    f"{self.path} is in use by another process that trains into it; stop it, or pass another --out"
                ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def folder_name(text: str) -> str:
    """Return `text`, a policy or a recipe, as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "-", text).strip("-")


def free_path(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, ... that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate
