"""`mezzotint bench` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = ("--ops", "matmul,update", "--sizes", "16", "--seconds", "1", "--formats", "bf16")


def mezzotint(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mezzotint.cli.main", "bench", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "run.json"
    done = mezzotint(*QUICK, "--save", path, "--out", path.with_suffix(".html"), "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "matmul 16x16x16" in done.stdout
    assert "bfloat16" in done.stdout
    assert "adamw" in done.stdout
    assert "written:" in done.stderr
    return path


def test_what_is_saved_is_the_json(saved: Path) -> None:
    payload = json.loads(saved.read_text())
    assert payload["schema"] == "mezzotint.bench/1"
    assert {row["format"] for case in payload["cases"] for row in case["measurements"]} == {"float32", "bfloat16"}
    page = saved.with_suffix(".html").read_text()
    assert "Roofline" in page
    assert "mezzotint bench --ops" in page


def test_a_run_compared_with_itself_is_even(saved: Path) -> None:
    done = mezzotint("--compare", saved, saved)
    assert done.returncode == 0
    assert "faster" not in done.stdout
    assert "1.00" in done.stdout


def test_a_slower_run_exits_with_1(saved: Path, tmp_path: Path) -> None:
    payload = json.loads(saved.read_text())
    for case in payload["cases"]:
        case["again_seconds"] = case["measurements"][0]["seconds"]
        for row in case["measurements"]:
            row["seconds"] = [1e-3] * 15
        case["again_seconds"] = [1e-3] * 15
    before = tmp_path / "before.json"
    before.write_text(json.dumps(payload))
    for case in payload["cases"]:
        for row in case["measurements"]:
            row["seconds"] = [2e-3] * 15
        case["again_seconds"] = [2e-3] * 15
    after = tmp_path / "after.json"
    after.write_text(json.dumps(payload))
    done = mezzotint("--compare", before, after, "--json")
    assert done.returncode == 1
    assert {change["verdict"] for change in json.loads(done.stdout)["changes"]} == {"slower"}
    assert mezzotint("--compare", after, before).returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--ops", "convolve"), "unknown operation 'convolve'"),
        (("--formats", "int8"), "unknown number format 'int8'"),
        (("--formats", "fp4"), "float4_e2m1fn is not timed; pass float32"),
        (("--sizes", "0"), "'0' is no size of a matrix"),
        (("--sizes", "big"), "'big' is no size of a matrix"),
        (("--shape", "1x2"), "'1x2' is no shape of a product"),
        (("--device", "cuda:9"), "cuda:9"),
        (("--device", "toaster"), "toaster"),
        (("--compare", "/nowhere.json", "/nowhere.json"), "/nowhere.json cannot be read"),
        (("--compare", __file__, __file__), "is not JSON"),
        (("--out", "/proc/nowhere/report.html"), "/proc/nowhere/report.html cannot be written"),
    ],
)
def test_bad_input_gets_one_sentence(args: tuple[str, ...], message: str) -> None:
    done = mezzotint(*args)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_json_is_all_there_is(tmp_path: Path) -> None:
    done = mezzotint("--ops", "add", "--formats", "fp16", "--seconds", "1", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["schema"] == "mezzotint.bench/1"
