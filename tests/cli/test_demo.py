"""`mezzotint demo`: both arms start equal, see the same data, and their figures are measured."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.training.pair import Arm

SMALL = [
    "train.steps=8",
    "train.batch_size=2",
    "train.evaluate_batches=2",
    "model.dim=64",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ffn_dim=128",
    "model.block_size=64",
    "data.max_bytes=100000",
]


def demo(tmp_path: Path, *args: str):
    settings = [word for setting in SMALL for word in ("--set", setting)]
    return CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "runs"), *settings, *args])


def test_the_table_and_the_caveat(tmp_path: Path) -> None:
    result = demo(tmp_path)
    assert result.exit_code == 0, result.output
    for words in ("validation loss", "step time", "tokens per second", "peak", "bytes per parameter", "ratio"):
        assert words in result.stdout
    assert "proves little" in result.stdout
    assert (tmp_path / "runs" / "float32" / "config.toml").exists()
    assert len((tmp_path / "runs" / "bf16-mixed" / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-stochastic"])
def test_json(tmp_path: Path, policy: str) -> None:
    body = json.loads(demo(tmp_path, "--json", "--policy", policy).stdout)
    assert body["schema"] == "mezzotint.demo/1"
    control, treatment = (Arm.from_json(arm) for arm in body["arms"])
    assert (control.name, treatment.name) == ("float32", policy)
    # the first losses differ only by the rounding of the forward pass
    assert treatment.losses[0] == pytest.approx(control.losses[0], rel=2.0**-8)
    assert treatment.losses != control.losses
    assert control.time_ratio == 1.0
    assert 0.4 < treatment.step_memory.activations_bytes / control.step_memory.activations_bytes < 0.8
    assert control.step_memory.peak_bytes > control.step_memory.activations_bytes
    # AdamW in float32: weight and two states of 4 bytes each; with 2-byte weights 10
    assert control.state_memory.bytes_per_parameter == pytest.approx(12, abs=0.01)
    assert treatment.state_memory.bytes_per_parameter == pytest.approx(12 if policy == "bf16-mixed" else 10, abs=0.01)


def test_float32_against_itself_is_identical(tmp_path: Path) -> None:
    """Turns in one process do not leak into each other: two equal arms have equal losses, dropout included."""
    body = json.loads(demo(tmp_path, "--json", "--policy", "float32", "--set", "model.dropout=0.2").stdout)
    control, treatment = (Arm.from_json(arm) for arm in body["arms"])
    assert treatment.losses == control.losses
    assert treatment.validation_loss == control.validation_loss
    assert treatment.step_memory == control.step_memory
