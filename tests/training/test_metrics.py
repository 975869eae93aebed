"""metrics.jsonl: whole lines, valid JSON, cut back exactly."""

import json
import os
from pathlib import Path

import pytest

from mezzotint.errors import TrainingError
from mezzotint.training.metrics import MetricsWriter, read_metrics


def test_lines_are_json_and_not_finite_numbers_are_words(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write({"step": 1, "loss": 0.1, "grad_norm": float("nan"), "scale": float("inf"), "names": ["a"]})
    writer.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    text = (tmp_path / "m.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert line.pop("crc32")
    assert line == {
        "step": 1,
        "loss": 0.1,
        "grad_norm": "nan",
        "scale": "inf",
        "names": ["a"],
    }


def test_resume_drops_later_lines_and_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 6):
        writer.write({"step": step, "loss": step / 3})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    writer = MetricsWriter(path)
    writer.truncate_after(3)
    writer.write({"step": 4, "loss": 9.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1 / 3), (2, 2 / 3), (3, 1.0), (4, 9.0)]


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")

    def full(_file: int, _content: bytes) -> int:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(TrainingError, match=r"No space left.*checkpoints are safe"):
        writer.write({"step": 1})
    monkeypatch.undo()
    writer.close()


def test_flipped_bits_leave_lines_out_and_never_change_a_figure(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = MetricsWriter(path)
    for step in range(1, 4):
        writer.write({"step": step, "loss": step / 3, "grad_norm": float("nan")})
    content, whole = path.read_bytes(), read_metrics(path)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = read_metrics(path)
        assert all(line in whole for line in found)
        assert 1 <= len(found) < 3
        num_damaged = writer.truncate_after(3)
        assert num_damaged >= (place < len(content) - 1)
        assert read_metrics(path) == found
    writer.close()
