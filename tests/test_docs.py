"""What the documents say is generated from records or runs as it stands."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from mezzotint.parity.result import Verdict

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_parts_are_fresh() -> None:
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    if version("torch").partition("+")[0] != pinned[1]:
        pytest.skip(f"the pages are made with torch {pinned[1]}, whose private names and timings they list")
    script = ROOT / "scripts" / "generate_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], check=False)
    assert done.returncode == 0, "run python scripts/generate_docs.py"


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_in_the_readme_runs(code: str, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert any(word in out for word in ("stepped", "1000.0", *Verdict))


@pytest.mark.parametrize("page", ["cpu.md", "audit.md"])
def test_code_in_the_pages_runs(page: str, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=tmp_path)


def test_the_script_of_the_proof_is_proved_as_written(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "prove.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"^    (mezzotint prove .*train\.py:make_run)$", page, re.MULTILINE)
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    words = [sys.executable, "-m", "mezzotint.cli.main", *command.split()[1:-1], "--json", command.split()[-1]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    body = json.loads(done.stdout)
    assert done.returncode == body["exit_code"]
    assert body["results"][0]["metrics"][0]["name"] == "accuracy"
    assert len(body["runs"]) == 6
    assert {run["status"] for run in body["runs"]} == {"finished"}
    assert body["results"][0]["verdict"] != "invalid"  # the script learns


def test_commands_in_the_readme_exist() -> None:
    commands = set(re.findall(r"`mezzotint (\w+)", README))
    assert {"demo", "doctor", "train"} <= commands
    for command in commands:
        subprocess.run([sys.executable, "-m", "mezzotint.cli.main", command, "--help"], check=True, capture_output=True)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target


def test_policy_text_in_the_readme_is_what_parse_prints() -> None:
    from mezzotint.policy.grammar import parse_policy

    assert f"`{parse_policy('bf16-mixed')}`" in README.replace("\n", " ")


CLAIMED = sorted(
    set(re.findall(r"`mezzotint (formats [^`]*)`", (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")))
)


def test_commands_of_the_claims_run() -> None:
    from typer.testing import CliRunner

    from mezzotint.cli.main import app

    assert len(CLAIMED) > 8
    for command in CLAIMED:
        assert CliRunner().invoke(app, command.split()).exit_code == 0, command
