"""`mezzotint train` as a user meets it: a run, a resume, a signal, and one sentence for everything that is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.errors import MezzotintError

SMALL = [
    "train.steps=6",
    "train.save_every=3",
    "train.evaluate_every=3",
    "train.evaluate_batches=1",
    "train.batch_size=2",
    "train.accumulate=1",
    "train.sample_tokens=8",
    "model.dim=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.ffn_dim=64",
    "model.block_size=32",
    "data.max_bytes=100000",
]


def settings(*more: str) -> list[str]:
    return [word for setting in (*SMALL, *more) for word in ("--set", setting)]


def run(*args: str):
    """Run the command in this process; an error is raised as the error it is."""
    return CliRunner().invoke(app, ["train", *args])


def sentence(*args: str) -> str:
    """Return the error of a command that must fail with one of ours."""
    result = run(*args)
    assert isinstance(result.exception, MezzotintError), result.exception or result.output
    text = str(result.exception)
    assert "\n" not in text
    return text


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_leaves_config_metrics_checkpoints_and_a_sample(tmp_path: Path) -> None:
    result = run("tiny-1m", "--policy", "bf16-mixed", "--out", "r", *settings())
    assert result.exit_code == 0, result.output
    assert "6 steps" in result.stdout
    folder = tmp_path / "r"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["outcome"] == "stepped" for line in lines)
    assert "validation_loss" in lines[2]
    assert "validation_loss" in lines[5]
    assert (folder / "config.toml").exists()
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1].endswith("6")


def test_the_config_file_reproduces_the_run(tmp_path: Path) -> None:
    assert run("tiny-1m", "--policy", "float32", "--out", "a", *settings()).exit_code == 0
    assert run("a/config.toml", "--out", "b").exit_code == 0

    def losses(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert losses("a") == losses("b")


@pytest.mark.parametrize("policy", ["bf16-mixed", "fp8-mixed", "nvfp4", "bf16-saved"])
def test_policies_and_modules_that_save(policy: str, tmp_path: Path) -> None:
    """A run under each, and a second, shorter one, whose first losses are the same."""
    more = ("train.has_fused_modules=true", "model.is_residual_compact=true")
    assert run("tiny-1m", "--policy", policy, "--out", "whole", *settings(*more)).exit_code == 0
    assert run("tiny-1m", "--policy", policy, "--out", "r", *settings(*more, "train.steps=3")).exit_code == 0

    def losses(name: str) -> list[float]:
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [row["loss"] for row in map(json.loads, rows) if "loss" in row]

    assert len(losses("whole")) >= 6
    assert losses("r")[:2] == losses("whole")[:2]


def test_json_is_one_object_and_nothing_else() -> None:
    result = run("tiny-1m", "--policy", "float32", "--out", "r", "--json", *settings())
    body = json.loads(result.stdout)
    assert body["schema"] == "mezzotint.train/1"
    assert body["steps"] == 6
    assert body["validation_loss"] > 0


def test_list_names_every_recipe() -> None:
    result = run("--list")
    assert result.exit_code == 0
    for name in ("tiny-1m", "demo", "small-10m", "base-124m", "xl-1b"):
        assert name in result.stdout


def test_tensorboard_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert run("tiny-1m", "--policy", "float32", "--out", "r", "--tensorboard", *settings()).exit_code == 0
    assert any((tmp_path / "r" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["tiny-2m"], ["tiny-2m", "tiny-1m"]),
        ([], ["name a recipe"]),
        (["nowhere.toml"], ["nowhere.toml", "cannot be read"]),
        (["tiny-1m", "--set", "optimizer.learning_rate=-1"], ["learning_rate", "-1"]),
        (["tiny-1m", "--set", "train.stepz=5"], ["train.stepz", "train.steps"]),
        (["tiny-1m", "--set", "train.steps=five"], ["train.steps", "five"]),
        (["tiny-1m", "--policy", "bf17-mixed"], ["bf17-mixed", "bf16-mixed"]),
        (["tiny-1m", "--data", "missing.txt"], ["missing.txt"]),
        (["tiny-1m", "--resume", "nowhere"], ["--resume", "RECIPE"]),
        (["--resume", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_gets_one_sentence_and_leaves_nothing(args: list[str], words: list[str], tmp_path: Path) -> None:
    text = sentence(*args, *([] if "--resume" in args else ["--out", "r"] if args else []))
    assert all(word in text for word in words), text
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["empty"]), (b"short", ["block"]), (b"text\0binary" * 100, ["binary"]), (b"\xff\xfe\x00" * 50, [])],
)
def test_bad_data_get_one_sentence_and_leave_nothing(content: bytes, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_bytes(content)
    text = sentence("tiny-1m", "--data", "data.txt", "--out", "r", *settings())
    assert "data.txt" in text or "block" in text
    assert all(word in text for word in words), text
    assert not (tmp_path / "r").exists()


def test_a_folder_that_exists_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "precious").write_text("x")
    text = sentence("tiny-1m", "--out", "r", *settings())
    assert "--out" in text
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["precious"]


def test_resume_of_a_finished_run_says_so(tmp_path: Path) -> None:
    assert run("tiny-1m", "--policy", "float32", "--out", "r", *settings()).exit_code == 0
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    assert run("--resume", "r").exit_code == 0
    assert (tmp_path / "r" / "metrics.jsonl").read_text() == before


def test_a_diverging_run_ends_with_a_sentence() -> None:
    text = sentence(
        "tiny-1m", "--policy", "float32", "--out", "r",
        *settings("optimizer.learning_rate=1e38", "train.steps=60", "schedule.warmup_steps=0"),
    )  # fmt: skip
    assert "loss" in text or "gradient" in text


def process(*args: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mezzotint.cli.main", "train", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_errors_are_written_to_stderr_with_exit_code_2() -> None:
    child = process("tiny-2m")
    out, errors = child.communicate(timeout=240)
    assert child.returncode == 2
    assert out == ""
    assert errors.startswith("mezzotint: error: ")
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number: int, code: int, tmp_path: Path) -> None:
    whole = run("tiny-1m", "--policy", "float32", "--out", "whole", *settings("train.steps=150"))
    assert whole.exit_code == 0
    child = process(
        "tiny-1m", "--policy", "float32", "--out", "r", *settings("train.steps=150", "train.save_every=1000")
    )
    metrics = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 3):
        time.sleep(0.005)
    child.send_signal(number)
    _, errors = child.communicate(timeout=240)
    assert child.returncode == code, errors
    assert "mezzotint train --resume r" in errors
    assert run("--resume", "r").exit_code == 0

    def losses(name: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    # the child ran with one thread, this process may have more: compare what does not depend on it
    assert len(losses("r")) == len(losses("whole")) == 150
    assert losses("r") == pytest.approx(losses("whole"), rel=1e-3)


def test_a_full_disk_keeps_the_checkpoints_and_the_run_goes_on_later(tmp_path: Path) -> None:
    """Training into a file system that fills up ends with a sentence; with room again, it goes on to the end."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {made.stderr.strip()}")
    try:
        text = sentence(
            "tiny-1m",
            "--policy",
            "float32",
            "--out",
            "disk/r",
            *settings("train.save_every=1", "train.keep_checkpoints=9"),
        )
        assert "full" in text or "No space" in text
        assert "safe" in text
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert run("--resume", "disk/r").exit_code == 0
        lines = [json.loads(line) for line in (disk / "r" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    assert run("tiny-1m", "--policy", "float32", "--out", "r", *settings()).exit_code == 0
    before = (tmp_path / "r" / "metrics.jsonl").read_text()
    newest = tmp_path / "r" / "checkpoints" / "step-00000006" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    result = run("--resume", "r")
    assert result.exit_code == 0
    assert "tensors.safetensors is damaged" in result.stderr
    assert "resuming after step 3" in result.stderr

    def losses(text: str) -> list[float]:
        return [json.loads(line)["loss"] for line in text.splitlines()]

    assert losses((tmp_path / "r" / "metrics.jsonl").read_text()) == losses(before)


def test_changed_data_are_noticed_on_resume(tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("some text to learn from\n" * 500)
    args = ["tiny-1m", "--policy", "float32", "--out", "r", "--data", "data.txt"]
    assert run(*args, *settings()).exit_code == 0
    (tmp_path / "data.txt").write_text("some other text\n" * 500)
    result = run("--resume", "r")
    assert "training data changed since the checkpoint" in str(result.exception)


def test_auto_is_decided_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.toml holds the policy that was chosen; a resume does not measure, and so cannot choose another."""
    result = run("tiny-1m", "--out", "r", *settings())
    assert result.exit_code == 0, result.output
    assert "auto " in result.stderr
    config = (tmp_path / "r" / "config.toml").read_text()
    assert 'policy = "params=float32, compute=' in config

    def measure_again(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("chosen again")

    monkeypatch.setattr("mezzotint.policy.choose.choose", measure_again)
    monkeypatch.setattr("mezzotint.engine.setup.choose", measure_again)
    assert run("--resume", "r").exit_code == 0
