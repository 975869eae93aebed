"""`mezzotint demo`: pairs of runs that start equal and see the same data, a verdict, and what it cost."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.parity.result import Proof

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
    return CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "runs"), "--seeds", "2", *settings, *args])


@pytest.mark.parametrize("policy", ["bf16-mixed", "bf16-stochastic"])
def test_json(tmp_path: Path, policy: str) -> None:
    body = json.loads(demo(tmp_path, "--json", "--policy", policy).stdout)
    assert body["schema"] == "mezzotint.demo/1"
    proof = Proof.from_json(body)
    control, treatment = proof.runs[:2]
    assert (control.arm, treatment.arm) == ("float32", policy)
    # the first losses differ only by the rounding of the forward pass
    assert treatment.losses[0] == pytest.approx(control.losses[0], rel=2.0**-8)
    assert treatment.losses != control.losses
    plain, mixed = control.memory_bytes, treatment.memory_bytes
    waits = [sizes["activations"] + sizes["cast_cache"] for sizes in (plain, mixed)]
    assert 0.4 < waits[1] / waits[0] < 0.8
    assert plain["cast_cache"] == 0
    assert mixed["cast_cache"] > 0
    assert plain["peak"] > plain["weights"] + plain["states"] + plain["activations"]
    # AdamW in float32: weight and two states of 4 bytes each; with 2-byte weights 10
    state = [sum(sizes[name] for name in ("weights", "masters", "states")) for sizes in (plain, mixed)]
    assert state[0] / control.num_parameters == pytest.approx(12, abs=0.01)
    assert state[1] / treatment.num_parameters == pytest.approx(12 if policy == "bf16-mixed" else 10, abs=0.01)
    # float64 tells them apart: float32 has 24 bits, bfloat16 8
    assert control.values["gradient_error"] < 1e-5 < treatment.values["gradient_error"] < 0.2
    assert control.values["log_prob_error"] < 1e-5 < treatment.values["log_prob_error"] < 0.2
    assert (tmp_path / "runs" / "report.html").exists()


def test_float32_against_itself_is_identical(tmp_path: Path) -> None:
    """Turns in one process do not leak into each other: two equal arms have equal losses, dropout included."""
    result = demo(
        tmp_path, "--policy", "float32", "--set", "model.dropout=0.2", "--set", "optimizer.learning_rate=0.02"
    )
    assert result.exit_code == 0, result.output
    assert "identical" in result.stdout
    for words in ("step time", "peak memory", "state per parameter", "report"):
        assert words in result.stdout
    control, treatment = (
        json.loads((tmp_path / "runs" / "runs" / arm / "seed-1" / "run.json").read_text().partition("\n")[2])
        for arm in ("float32", "again")
    )
    for name in ("losses", "values", "memory_bytes", "weights_digest"):
        assert treatment[name] == control[name]
    assert (tmp_path / "runs" / "runs" / "float32" / "seed-0" / "config.toml").exists()
    assert len((tmp_path / "runs" / "runs" / "again" / "seed-0" / "metrics.jsonl").read_text().splitlines()) == 8
