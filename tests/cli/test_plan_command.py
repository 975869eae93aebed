"""`mezzotint plan` and `mezzotint audit --gpu` as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mezzotint.cli.main import main

SCRIPT = """
import argparse
import torch
from torch import nn
parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=64)
width = parser.parse_args().width
model = nn.Sequential(nn.Embedding(1001, width), nn.Linear(width, 1001)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for step in range(50):
    tokens = torch.randint(0, 1001, (8, 32)).cuda()
    with torch.autocast("cuda"):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print("loss", loss.item())
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder with the script in it."""
    (folder / "train.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, "-m", "mezzotint", *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "160"}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_plan(tmp_path: Path) -> None:
    done = run(
        tmp_path, "plan", "--gpu", "H100,V100", "--policy", "as written,float32", "--price", "2", "--batch", "8",
        "--trace", "trace.json", "train.py", "--width", "256",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "H100-SXM-80GB" in done.stdout
    assert "V100-SXM2-32GB" in done.stdout
    assert "tokens/s" in done.stdout
    assert "1001 is off the tensor cores' tile: 1024" in done.stdout
    assert "assumed item" in done.stdout
    assert "train.py:17" in done.stdout
    assert "loss 1.0" not in done.stdout
    page = (tmp_path / "mezzotint-plan.html").read_text()
    assert "Memory over the step" in page
    assert "http://" not in page.split("<body>")[1].replace("http://www.w3.org", "")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_plan_as_json(tmp_path: Path) -> None:
    done = run(tmp_path, "plan", "--json", "--no-report", "--policy", "bf16", "train.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "mezzotint.plan/1"
    (plan,) = found["plans"]
    assert plan["step_seconds_low"] <= plan["step_seconds"] <= plan["step_seconds_high"]
    assert plan["peak_allocated_bytes"] == sum(plan["at_peak_bytes"].values())
    assert not (tmp_path / "mezzotint-plan.html").exists()


def test_audit_on_a_ghost_finds_what_exists_on_cuda_only(tmp_path: Path) -> None:
    done = run(tmp_path, "audit", "--gpu", "A100", "--no-report", "train.py")
    assert done.returncode == 1, done.stderr
    assert "MZ226 warning  float16 gradients without loss scaling" in done.stdout
    assert "MZ202" in done.stdout
    assert "on a simulated A100" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "H1O0", "train.py"), "did you mean H100"),
        (("--gpu", "MI300X", "train.py"), "no CUDA card"),
        (("--policy", "int8", "train.py"), "cannot be planned"),
        (("missing.py",), "does not exist"),
        (("--out", "/nowhere/x.html", "train.py"), "cannot be written to"),
    ],
)
def test_bad_options(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["mezzotint", "plan", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_bad_scripts(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import torch\nx = torch.rand(8, device=0)\ny = torch.repeat_interleave(x, x.long())\n"
    )
    (tmp_path / "never_ends.py").write_text(
        "import torch\nweight = torch.ones(2, device=0, requires_grad=True)\n"
        "optimizer = torch.optim.SGD([weight], lr=0.1)\n"
        "while True:\n    try:\n        weight.sum().backward()\n        optimizer.step()\n"
        "    except:\n        continue\n"
    )
    for script, message in (("waits.py", "waits.py:3"), ("never_ends.py", "caught the signal to stop")):
        done = run(tmp_path, "plan", script)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
