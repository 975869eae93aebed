"""metrics.jsonl: one JSON object a line and step, written at once, cut back when a run resumes."""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.errors import TrainingError


class MetricsWriter:
    """Appends lines to `path`. A line is one write, so a killed process leaves at most one torn line behind it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append `line`; NaN and infinities become texts ("nan", "inf"). Raises TrainingError on a full disk."""
        content = (json.dumps({key: _plain(value) for key, value in line.items()}, allow_nan=False) + "\n").encode()
        try:
            written = os.write(self._file, content)
            if written < len(content):
                os.write(self._file, content[written:])
        except OSError as error:
            free = shutil.disk_usage(self.path.parent).free / 2**20
            raise TrainingError(
                f"{self.path} cannot be written: {error.strerror or error} ({free:.1f} MiB free); the checkpoints are "
                "safe: make room and go on with --resume"
            ) from None

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps than `step`, and a torn one, by replacing the file."""
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)
        self.close()
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a torn last line is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
