"""`mezzotint audit` as users type it: exit codes, output, what is said when there is nothing to judge."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLEAN = """
import sys, torch
from torch import nn
net = nn.Linear(4, 2)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(20):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = net(torch.randn(3, 4)).float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print("step", i)
"""
FAULTY = CLEAN.replace(".float().square()", ".square()")


def mezzotint(folder: Path, *arguments: str, text: str = CLEAN, **options) -> subprocess.CompletedProcess:
    (folder / "train.py").write_text(text)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-m", "mezzotint", "audit", *arguments], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=240, check=False, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_a_clean_script(tmp_path: Path):
    done = mezzotint(tmp_path, "train.py", "--steps", "7")  # the script's own option
    assert done.returncode == 0, done.stderr
    assert "nothing wrong found in 3 steps" in done.stdout
    assert "step 2" in done.stdout
    assert "step 4" not in done.stdout
    report = (tmp_path / "mezzotint-audit.html").read_text()
    assert "nothing wrong found" in report


@pytest.mark.slow
def test_json_is_alone_on_standard_output(tmp_path: Path):
    done = mezzotint(tmp_path, "--json", "--no-report", "--steps", "2", "train.py", text=FAULTY)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "mezzotint.audit/1"
    assert [step["is_skipped"] for step in result["steps"]] == [False, False]
    (finding,) = [one for one in result["findings"] if one["severity"] != "info"]
    assert (finding["code"], finding["path"], finding["line"]) == ("MZ201", "train.py", 8)
    assert finding["op"] == "aten.mean.default"
    assert "step 1" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("print(1)", 2, "without a single torch operation"),
        ("import torch; torch.ones(3).add(1)", 2, "of operations 2 and of backward passes 0 were seen"),
        ("import sys; sys.exit(4)", 2, "called sys.exit(4) before a training step had ended"),
        ("import torch; input()", 2, "reads standard input"),
        (CLEAN + "\n", 0, ""),
        (CLEAN.replace('print("step", i)', "raise KeyError(i)"), 2, "raised KeyError: 0 at train.py:12 after 1 "),
        (FAULTY.replace('print("step", i)', "raise KeyError(i)"), 1, "raised KeyError: 0"),
    ],
)  # fmt: skip
def test_endings_and_exit_codes(tmp_path: Path, text: str, code: int, said: str):
    done = mezzotint(tmp_path, "--no-report", "train.py", text=text, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.py"], "absent.py does not exist"),
        (["train.py:absent"], "has no function absent"),
        (["--policy", "bf17", "train.py"], "bf17"),
        (["--out", "no/such/folder/a.html", "train.py"], "cannot be written"),
        (["-m", "no_such_module"], "cannot be found"),
    ],
)
def test_misuse_is_one_sentence(tmp_path: Path, arguments: list[str], said: str):
    done = mezzotint(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path):
    text = CLEAN.replace(
        "optimizer = torch",
        "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "net = nn.parallel.DistributedDataParallel(net)\noptimizer = torch",
    )
    (tmp_path / "train.py").write_text(text)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "mezzotint", "audit", "train.py",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing wrong found in 3 steps") == 1
    assert {path.name for path in tmp_path.glob("*.html")} == {
        "mezzotint-audit-rank0.html",
        "mezzotint-audit-rank1.html",
    }


@pytest.mark.slow
def test_rules_are_listed_and_explained():
    command = [sys.executable, "-m", "mezzotint", "rules"]
    listed = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert len(listed["rules"]) > 25
    told = subprocess.run([*command, "clip-before-unscale"], capture_output=True, text=True, check=True).stdout
    assert "MZ221" in told
    assert "scaler.unscale_(optimizer)" in told
    unknown = subprocess.run([*command, "MZ999"], capture_output=True, text=True, check=False)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)


CULPRIT = """
import torch
from torch import nn

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(8, 8)
        nn.init.constant_(self.scale.bias, 200.0)
    def forward(self, x):
        y = self.scale(x)
        return y - y.mean(-1, keepdim=True)

model = nn.Sequential(nn.Linear(8, 8), Norm(), nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for i in range(50):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(32, 8)).float().square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.slow
def test_bisect_prints_a_policy(tmp_path: Path):
    done = mezzotint(tmp_path, "--bisect", "--tolerance", "0.1", "--json", "train.py", text=CULPRIT)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["schema"] == "mezzotint.bisect/1"
    assert result["keep"] == "1.scale"  # a float32 sum is enough: what follows is promoted
    assert result["error_after"] <= 0.1 < result["error_before"]
    from mezzotint.policy.policy import Policy

    assert Policy.parse(f"bf16-mixed, keep={result['keep']}").keep == ("1.scale",)
    done = mezzotint(tmp_path, "--bisect", "--tolerance", "0.9", "train.py", text=CULPRIT.replace("200.0", "0.0"))
    assert "nothing has to stay in float32" in done.stdout
    done = mezzotint(tmp_path, "--bisect", "train.py", text="print(1)")
    assert done.returncode == 2
    assert "does not train in float32" in done.stderr
