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
    assert json.loads(text, parse_constant=refuse) == {
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
