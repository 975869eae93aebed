"""A run killed at random moments, again and again, has the losses of the run that was never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = 20
SETTINGS = [
    "train.steps=400",  # far more than twenty kills use up, also where polling is late
    "train.save_every=4",
    "train.evaluate_every=40",
    "train.evaluate_batches=2",
    "train.batch_size=4",
    "train.accumulate=2",
    "train.sample_tokens=0",
    "model.dim=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.ffn_dim=64",
    "model.block_size=32",
    "model.dropout=0.1",
    "data.max_bytes=200000",
]


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "mezzotint.cli.main", "train", *args]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def losses(run: Path) -> list[tuple[int, float, float | None]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line.get("validation_loss")) for line in lines]


@pytest.mark.slow
@pytest.mark.timeout(800)
@pytest.mark.parametrize("policy", ["bf16-mixed"])
def test_killed_twenty_times_the_losses_are_those_of_the_uninterrupted_run(tmp_path: Path, policy: str) -> None:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(
        command("tiny-1m", "--policy", policy, "--out", str(whole), *settings),
        check=True,
        capture_output=True,
        env=environment(),
    )
    chance = random.Random(0)
    kills = 0
    is_first = True
    for _ in range(4 * KILLS):
        begin = command("tiny-1m", "--policy", policy, "--out", str(cut), *settings)
        process = subprocess.Popen(
            begin if is_first else command("--resume", str(cut)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        is_first = is_first and not any(cut.glob("checkpoints/step-*"))
        wait_until = time.monotonic() + 60
        before = checkpoints(cut)
        while kills < KILLS and process.poll() is None and time.monotonic() < wait_until:
            # let it get somewhere: at least one new checkpoint, then a random moment of the following updates
            if checkpoints(cut) - before:
                time.sleep(chance.uniform(0.0, 0.05))
                break
            time.sleep(0.005)
        if kills < KILLS and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        _, errors = process.communicate()
        is_first = is_first and not checkpoints(cut)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert kills == KILLS, f"the run ended after {kills} kills"
    assert process.returncode == 0
    assert losses(cut) == losses(whole)


def checkpoints(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoints/step-*")}
