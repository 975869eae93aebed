"""`mezzotint prove` as users type it: targets and options, exit codes, what is written where, how it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mezzotint.cli.main import app, main
from mezzotint.parity.result import Proof

# what the seed decides is exact, so the verdicts do not depend on chance
SCRIPT = """
import sys

def make_run(seed, policy, bias=0.0, steps=20, wobble=0.0):
    for step in range(steps):
        loss = (10.0 + seed) / (step + 1) + bias + wobble * (-1) ** seed
        yield loss
    print("printed", *sys.argv[1:])
    return {"accuracy": 0.5 + 0.01 * seed - bias}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


def prove(*arguments: str):
    return CliRunner().invoke(app, ["prove", *arguments])


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command as the shell does and return the error; the exit code is 2."""
    monkeypatch.setattr(sys, "argv", ["mezzotint", "prove", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arm", "code", "verdict"),
    [
        ("same=float32", 0, "identical"),
        ("close=float32,bias=0.0001", 0, "equivalent"),
        ("worse=float32,bias=0.5", 1, "worse"),
        ("lucky=float32,bias=-0.3", 0, "better"),
        ("noisy=float32,wobble=0.05", 3, "undecided"),
    ],
)
def test_exit_codes(folder: Path, arm: str, code: int, verdict: str) -> None:
    result = prove(
        "--arm", "float32", "--arm", arm, "--seeds", "4", "--out", "out", "train.py:make_run", "--epochs", "3"
    )
    assert result.exit_code == code, result.output
    assert verdict in result.stdout
    proof = Proof.from_json(json.loads((folder / "out" / "proof.json").read_text()))
    assert [str(one.verdict) for one in proof.results] == [verdict]
    assert proof.experiment.arguments == ("--epochs", "3")
    assert "printed --epochs 3" in result.stderr
    assert "printed" not in result.stdout
    assert "seed 4/4 ended" in result.stderr
    for name in ("config.toml", "report.html", "summary.md"):
        assert (folder / "out" / name).stat().st_size > 100
    lines = (folder / "out" / "runs" / "float32" / "seed-3" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert json.loads(lines[0])["loss"] == 13.0


def test_metrics_steps_and_summary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/mezzotint", "prove", "train.py:make_run"])
    result = prove(
        "--arm", "a=float32", "--arm", "b=float32,bias=0.004", "--seeds", "3", "--steps", "5", "--out", "out", "--json",
        "--metric", "accuracy:2%:higher", "--margin", "0.1", "--summary", "pr.md", "train.py:make_run",
    )  # fmt: skip
    body = json.loads(result.stdout)
    assert (body["schema"], body["exit_code"], result.exit_code) == ("mezzotint.prove/1", 0, 0)
    assert body["folder"] == "out"
    proof = Proof.from_json(body)
    assert {len(run.losses) for run in proof.runs} == {5}
    primary = [metric for metric in proof.experiment.metrics if metric.is_primary]
    assert [(one.name, one.margin, str(one.better)) for one in primary] == [("accuracy", 0.02, "higher")]
    assert [one.margin for one in proof.experiment.metrics if one.name in ("final_loss", "curve")] == [0.1, 0.1]
    assert "b" in (folder / "pr.md").read_text()
    assert proof.command == "mezzotint prove train.py:make_run"


def test_resume_goes_on_with_the_design_and_nothing_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prove("--seeds", "3", "--out", "out", "train.py:make_run")
    (folder / "out" / "runs" / "bf16-mixed" / "seed-1" / "run.json").unlink()
    again = prove("--resume", "out", "--json")
    assert again.exit_code == first.exit_code
    assert "seed 2/3 ended" in again.stderr
    assert "seed 1/3" not in again.stderr
    assert "--seeds and --out would have no effect with --resume" in refused(
        monkeypatch, capsys, "--resume", "out", "--seeds", "4", "--out", "x"
    )
    assert "it does not exist; pass a folder" in refused(monkeypatch, capsys, "--resume", "nowhere")
    config = str(folder / "out" / "config.toml")
    assert "is a whole design, which options do not change" in refused(monkeypatch, capsys, config, "--steps", "3")
    assert prove("--out", "third", config).exit_code == first.exit_code


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arm", "float32", "train.py:make_run"], "an experiment of 1 arm is refused"),
        (["--arm", "float32", "--arm", "b=bf17-mixed", "train.py:make_run"], "unknown policy 'bf17-mixed'"),
        (["--arm", "float32", "--arm", "b=lr=3", "train.py:make_run"], "names no policy; write b=float32,lr=3"),
        (["--arm", "float32", "--arm", "b=float32,lr", "train.py:make_run"], "'lr' is neither a policy nor key=value"),
        (["--metric", "x:-1", "train.py:make_run"], "'-1' is neither a margin"),
        (["--set", "a=1", "train.py:make_run"], "--set is for recipes"),
        (["train.py"], "name the function in it that makes a run: train.py:make_run"),
        (["other.py:make_run"], "other.py cannot be read from"),
        (["no-such-recipe"], "unknown recipe 'no-such-recipe'"),
        (["demo", "more"], "which takes no arguments"),
        (["--out", "train.py", "train.py:make_run"], "--out train.py is a file"),
        (["--alpha", "0.9", "train.py:make_run"], "alpha=0.9 is refused"),
    ],
)
def test_misuse_is_a_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    words = " ".join(refused(monkeypatch, capsys, *arguments).replace("│", " ").split())
    assert said in words
    assert "Traceback" not in words
    assert not (folder / "runs").exists()


def test_options_may_follow_a_recipe(folder: Path) -> None:
    from mezzotint.proving.design_file import design_from_toml

    small = ["model.dim=32", "model.num_layers=1", "model.num_heads=2", "model.ffn_dim=32", "model.block_size=16"]
    small += ["train.batch_size=2", "data.max_bytes=100000"]
    settings = [word for setting in small for word in ("--set", setting)]
    arms = ["--arm", "a=float32", "--arm", "b=bf16-master,train.accumulate=2"]
    result = prove("--out", "out", "tiny-1m", "--seeds", "2", "--steps", "3", *settings, *arms)
    assert result.exit_code in (0, 1, 3), result.output
    experiment = design_from_toml((folder / "out" / "config.toml").read_text(), "x")
    assert (experiment.target, experiment.steps, experiment.seeds) == ("tiny-1m", 3, (0, 1))
    assert experiment.arms[1].settings == ("train.accumulate=2",)
    assert "dim = 32" in experiment.recipe_toml
    run = json.loads((folder / "out" / "runs" / "b" / "seed-1" / "run.json").read_text().partition("\n")[2])
    assert set(run["values"]) == {
        "validation_loss",
        "final_loss",
        "curve",
        "distance",
        "gradient_error",
        "log_prob_error",
    }
    assert run["memory_bytes"]["masters"] == 2 * run["memory_bytes"]["weights"]
    assert run["tokens_per_step"] == 2 * 16 * 2


# a suite that was started in the background ignores SIGINT, and so would its children
STARTED = """
import signal
from mezzotint.cli.main import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(folder: Path) -> None:
    (folder / "train.py").write_text(SCRIPT.replace("yield loss", "import time; time.sleep(0.05); yield loss"))
    process = subprocess.Popen(
        [sys.executable, "-c", STARTED, "prove", "--seeds", "50", "--out", "out", "train.py:make_run"],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (folder / "out/runs/float32/seed-0/run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130, errors
    assert "mezzotint prove --resume out" in errors
    assert "Traceback" not in errors
