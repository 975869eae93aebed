"""The run directory: config.toml, metrics.jsonl, checkpoints/, and a lock while somebody trains into it."""

import os
import re
import shutil
from pathlib import Path
from types import TracebackType

from mezzotint.errors import ConfigError, TrainingError, shortened
from mezzotint.files import write_whole
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
        try:
            existed = path.exists()
            is_file = existed and not path.is_dir()
            is_full = existed and not is_file and any(path.iterdir())
        except (OSError, ValueError) as error:  # a name too long, a zero byte, a folder that cannot be read
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--out {shortened(path)} cannot be used: {reason}; pass another folder") from None
        if is_file:
            raise ConfigError(f"--out {path} is a file; pass a folder that does not exist yet")
        if is_full:
            raise ConfigError(
                f"--out {path} exists and is not empty; pass another folder with --out, or go on with that run by "
                f"--resume {path}"
            )
        try:
            (path / "checkpoints").mkdir(parents=True)
            write_whole(path / "config.toml", config_toml)
        except (OSError, ValueError) as error:
            if not existed:
                shutil.rmtree(path, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--out {shortened(path)} cannot be written: {reason}; pass a folder that can") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Return the run directory at `path`, to resume; raise ConfigError where it is none or saved nothing."""
        run = cls(path)
        try:
            has_config, exists = run.config_path.is_file(), path.exists()
        except (OSError, ValueError) as error:  # a name too long, a zero byte
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--resume {shortened(path)} cannot be read: {reason}; pass a run directory") from None
        if not has_config:
            what = "does not exist" if not exists else "holds no config.toml"
            raise ConfigError(f"--resume {path}: it {what}, so it is no run directory; pass one that --out made")
        if not list_checkpoints(run.checkpoints_path):
            raise ConfigError(
                f"--resume {path}: the run saved no checkpoint before it ended; start it again with "
                f"mezzotint train {run.config_path} --out another folder"
            )
        return run

    def check_exists(self) -> None:
        """Raise TrainingError where the directory was removed or replaced while it was in use."""
        if not self.config_path.exists() or not self.metrics_path.exists():
            raise TrainingError(
                f"{self.path} was removed while the run trained into it, so nothing more is saved and it cannot be "
                "resumed; start it again with another --out"
            )

    def __enter__(self) -> "RunDirectory":
        if fcntl is not None:
            try:
                self._lock = os.open(self.path / ".lock", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
            except OSError as error:
                raise ConfigError(
                    f"{self.path} cannot be written: {error.strerror or error}; copy the folder to a place that can be "
                    "written and go on there"
                ) from None
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._lock)
                self._lock = -1
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
    return re.sub(r"[^\w.=-]+", "-", text).strip("-")[:60]  # of at most 240 bytes, as file systems take


def free_path(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, ... that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate = path.with_name(f"{path.name}-{number}")
        number += 1
    return candidate
