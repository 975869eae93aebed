"""metrics.jsonl: one JSON object a line and step, written at once, cut back when a run resumes.

The last key of a line is the CRC-32 of the text before it, so a changed line is noticed and left out.
"""

import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.errors import TrainingError
from mezzotint.files import read_regular, write_whole

_SEALED = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)


class MetricsWriter:
    """Appends lines to `path`. A line is one write, so a killed process leaves at most one torn line behind it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # not waiting: a pipe in its place is an error
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0), 0o644)
        except OSError as error:
            raise TrainingError(f"{path} cannot be written: {error.strerror or error}; nothing was changed") from None

    def write(self, line: Mapping[str, Any]) -> None:
        """Append `line`; NaN and infinities become texts ("nan", "inf"). Raises TrainingError on a full disk."""
        content = _sealed(json.dumps({key: _plain(value) for key, value in line.items()}, allow_nan=False))
        try:
            written = os.write(self._file, content)
            if written < len(content):
                os.write(self._file, content[written:])
        except OSError as error:
            free = _free_bytes(self.path.parent) / 2**20
            raise TrainingError(
                f"{self.path} cannot be written: {error.strerror or error} ({free:.1f} MiB free); the checkpoints are "
                "safe: make room and go on with --resume"
            ) from None

    def truncate_after(self, step: int) -> int:
        """Drop the lines of later steps than `step`, and damaged ones, by replacing the file; return how many
        damaged ones there were. A torn last line counts as none: a killed process leaves one.
        """
        lines, num_damaged = verified_lines(self.path)
        kept = [text for text, line in lines if line["step"] <= step]
        try:
            write_whole(self.path, b"".join(text + b"\n" for text in kept))
            self.close()
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise TrainingError(f"{self.path} cannot be written: {error.strerror or error}") from None
        return num_damaged

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; damaged ones and a torn last one are left out. Raises TrainingError."""
    return [line for _, line in verified_lines(path)[0]]


def verified_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], int]:
    """Return the lines of a metrics file that are whole, as they stand and as values, and the number of others.

    Lines that repeat or go back in step are damaged too. A last line without its end is torn, not damaged. Raises
    TrainingError where the file cannot be read.
    """
    try:
        *texts, _torn = read_regular(path).split(b"\n")
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror or error}") from None
    found: list[tuple[bytes, dict[str, Any]]] = []
    for text in texts:
        line = _verified(text)
        if line is not None and (not found or line["step"] > found[-1][1]["step"]):
            found.append((text, line))
    return found, len(texts) - len(found)


def _sealed(text: str) -> bytes:
    body = text.removesuffix("}").encode()
    separator = b"" if body == b"{" else b", "
    return body + separator + b'"crc32": "%08x"}\n' % zlib.crc32(body)


def _verified(text: bytes) -> dict[str, Any] | None:
    """Return the values of a line without its checksum, None where it is damaged."""
    match = _SEALED.fullmatch(text)
    if match is None or zlib.crc32(match[1]) != int(match[2], 16):
        return None
    try:
        line = json.loads(match[1] + b"}")
    except (ValueError, RecursionError):
        return None
    return line if type(line.get("step")) is int else None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _free_bytes(folder: Path) -> int:
    while not folder.exists():  # it was removed while a run wrote into it
        folder = folder.parent
    return shutil.disk_usage(folder).free
