"""Options without an effect are refused, and hostile scripts cannot end a command without a verdict."""

import base64
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mezzotint as mz
from mezzotint.cli.main import app
from mezzotint.errors import ConfigError, MezzotintError, ProofError, UserError

USELESS = (
    "prove --resume out --alpha 0.2",
    "prove --resume out --alpha 0.05",
    "prove --resume out --margin 0.0",
    "prove --resume out --max-seeds 0",
    "audit --bisect --policy bf16-mixed train.py",
    "audit --bisect --out y train.py",
    "audit --bisect --no-report train.py",
    "audit --bisect --gpu H100 train.py",
    "audit --bisect --no-ranges train.py",
    "audit --bisect --steps 3 train.py",
    "audit --gpu H100 --no-ranges train.py",
    "audit --metric gradient train.py",
    "audit --tolerance 0.05 train.py",
    "audit --no-report --out x.html train.py",
    "plan --strategy ddp train.py",
    "plan --no-report --out x.html train.py",
    "plan --json --batch 4 train.py",
    "plan --from-config c.json -m",
    "bench --compare a b --seconds 40",
    "bench --compare a b --save c",
    "bench --ops norm --sizes 64",
    "policy --diff a --device cuda",
    "policy --diff a --against b --dtype bf16",
    "policy softmax --device cpu",
    "train --list --tensorboard",
    "train --list --policy auto",
)


@pytest.mark.parametrize("line", USELESS)
def test_an_option_without_an_effect_is_refused(line: str):
    result = CliRunner().invoke(app, line.split())
    assert isinstance(result.exception, ConfigError), result.output
    assert "would have no effect" in str(result.exception)


@pytest.mark.parametrize("ignore", [["MZ999"], ["nonsense"], [3], [["MZ201"]], "MZ201", 5])
def test_unknown_codes_are_refused_before_the_step_runs(ignore: object):
    with pytest.raises(ConfigError):
        mz.assert_policy(lambda: pytest.fail("ran"), "bf16-mixed", ignore=ignore)


TRAIN = """
import os, sys, time, json, builtins, signal, torch
net = torch.nn.Linear(2, 2); o = torch.optim.SGD(net.parameters(), 0.1)
def step():
    o.zero_grad(); net(torch.ones(1, 2)).sum().backward(); o.step()
"""
BEFORE_A_STEP = (
    "import os; os._exit(0)",
    "from os import _exit; _exit(0)",
    "import posix; posix._exit(0)",
    "import ctypes; ctypes.CDLL(None)._exit(0)",
    "import ctypes; ctypes.pythonapi['exit'](0)",
    "import os; os.execv('/bin/true', ['true'])",
    "import os; os.execlp('true', 'true')",
    "raise GeneratorExit",
    "raise type('Own', (BaseException,), {})('x')",
    "raise SystemExit",
    "raise SystemExit('words')",
    "raise SystemExit(False)",
    "raise SystemExit(True)",
    "import builtins; del builtins.print, builtins.open, builtins.isinstance",
    "def f(): f()\nf()",
    "import sys; sys.stdout = sys.stderr = None",
    "import sys; sys.stdout.detach()",
    "import os; os.close(1)",
)


@pytest.mark.parametrize("text", BEFORE_A_STEP)
@pytest.mark.parametrize("command", ["audit", "plan"])
def test_no_script_ends_a_command_without_a_verdict(command: str, text: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(text)
    ending = os._exit
    options = ["--no-report", *(["--policy", "bf16", "--gpu", "H100"] if command == "plan" else [])]
    result = CliRunner().invoke(app, [command, *options, "train.py"])
    assert os._exit is ending
    if isinstance(result.exception, SystemExit):
        assert result.exit_code == 2
        assert "script" in result.output
    else:
        assert isinstance(result.exception, UserError), repr(result.exception)


@pytest.mark.parametrize("text", [
    "sys.stdout = None", "os.chdir('/')", "time.perf_counter = None", "json.dumps = None",
    "builtins.open = None", "sys.setrecursionlimit(150)", "sys.excepthook = None", "sys.argv = []",
])  # fmt: skip
def test_a_verdict_survives_what_a_script_changes(text: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN + f"step(); step(); {text}")
    result = CliRunner().invoke(app, ["audit", "--json", "--no-report", "train.py"])
    assert result.exit_code in (0, 1), repr(result.exception)
    assert '"verdict"' in result.stdout
    assert Path.cwd() == tmp_path


HOSTILE_RUN = """
import ctypes, os, sys
{at_import}
def make_run(seed, policy):
    for step in range(3):
        {in_a_step}
        yield 1.0 / (seed + step + 1)
"""
ENDINGS = {
    "os._exit(0)": "os._exit(0)",
    "sys.exit(0)": "sys.exit(0)",
    "sys.exit()": "sys.exit(None)",
    "ctypes.CDLL(None)._exit(0)": "_exit(0)",
    "os.execv('/bin/true', ['true'])": "os.execv(/bin/true)",
}


@pytest.mark.parametrize("place", ["at_import", "in_a_step"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_no_script_ends_a_proof_without_a_verdict(ending: str, place: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(HOSTILE_RUN.format(**{"at_import": "", "in_a_step": "pass", place: ending}))
    result = CliRunner().invoke(app, ["prove", "--seeds", "2", "--out", "out", "train.py:make_run"])
    assert isinstance(result.exception, ProofError), repr(result.exception)
    assert f"the script called {ENDINGS[ending]}" in str(result.exception)


@pytest.mark.parametrize("text", ["os.close(1)", "sys.stdout = None", "sys.stdout.detach()"])
def test_a_proof_survives_what_a_script_changes(text: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(HOSTILE_RUN.format(at_import=text, in_a_step="pass"))
    result = CliRunner().invoke(app, ["prove", "--seeds", "2", "--json", "--out", "out", "train.py:make_run"])
    assert isinstance(result.exception, SystemExit | None), repr(result.exception)
    assert json.loads(result.stdout)["exit_code"] == result.exit_code != 2


def test_a_plan_of_a_script_without_cuda_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text(TRAIN + "step(); step(); step()")
    result = CliRunner().invoke(app, ["plan", "--no-report", "--policy", "bf16", "train.py"])
    assert isinstance(result.exception, UserError)
    assert "ran nothing on CUDA" in str(result.exception)


def test_errors_echo_at_most_200_characters():
    assert len(str(ConfigError(f"value {'x' * 10_000} is wrong"))) < 250
    assert len(str(MezzotintError("a b " * 10_000))) <= 2000


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "1" * 400, '{"schema": "mezzotint.bench/1"}', "9" * 5000])
def test_odd_json_is_refused_by_compare(text: str, tmp_path: Path):
    (tmp_path / "a.json").write_text(text)
    result = CliRunner().invoke(app, ["bench", "--compare", *[str(tmp_path / "a.json")] * 2])
    assert isinstance(result.exception, UserError)
    assert len(str(result.exception)) < 600 + len(str(tmp_path))


def test_pages_allow_their_own_scripts_and_nothing_else():
    from mezzotint.report.page import _with_policy

    page = _with_policy('<meta charset="utf-8"><script>let a = 1;</script>')
    digest = base64.b64encode(hashlib.sha256(b"let a = 1;").digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert not re.search(r"script-src[^;]*unsafe", page)


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs owners of files")
def test_the_shared_cache_is_private(tmp_path: Path):
    from mezzotint.data.tokens import _private

    folder = _private(tmp_path / "own")
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(OSError, match=r"another user|exists"):
        _private(tmp_path / "link")


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from mezzotint.cli.main import main
for line in ("doctor", "train tiny-1m", "audit x.py", "plan x.py", "prove x.py:f", "bench", "demo", "policy"):
    sys.argv = ["mezzotint", *line.split()]
    try:
        main()
    except SystemExit as error:
        print(error.code)
"""


def test_without_torch_each_command_says_so(tmp_path: Path):
    (tmp_path / "x.py").write_text("def f(): pass")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["2"] * 8, done.stderr
    assert (
        done.stderr.splitlines()
        == ["mezzotint: error: PyTorch is not installed for this Python; install it: pip install torch"] * 8
    )


def test_what_libraries_say_while_they_are_imported_is_kept_out(capfd, recwarn):
    from mezzotint.process import quiet_imports

    logger = logging.getLogger("some.library")
    with quiet_imports():
        logger.warning("an Enum subclass")
        warnings.warn("an Enum subclass", stacklevel=1)
    assert not recwarn
    assert "Enum" not in capfd.readouterr().err
    logger.warning("afterwards")
    assert logger.isEnabledFor(logging.WARNING)
