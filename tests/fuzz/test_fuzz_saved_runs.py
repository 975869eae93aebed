"""Run folders and token caches with damaged bytes: a resumed run has the same bits, or is refused by a sentence."""

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from hostile import check, contents, damaged, empty_folder, examples, run
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_files import SMALL

from mezzotint.errors import MezzotintError
from mezzotint.training.checkpoint import load_newest
from mezzotint.training.metrics import read_metrics
from mezzotint.training.values import flatten

STEPS = 4
RUN = SMALL.replace("steps = 1\n", f"steps = {STEPS}\nsave_every = 1\nevaluate_every = 2\nsample_tokens = 0\n")
LINES = ("step", "loss", "grad_norm", "learning_rate", "outcome", "loss_scale", "nonfinite", "tokens")


def environment(folder: Path) -> mock._patch_dict:
    """Let a command find a token cache in a folder."""
    return mock.patch.dict(os.environ, {"MEZZOTINT_CACHE": str(folder / "cache")})


@cache
def saved() -> tuple[Path, dict[str, bytes]]:
    """Return a folder with a run that was stopped after half of its steps, and its files' contents."""
    made = Path(tempfile.mkdtemp(prefix="mezzotint-fuzz-run-"))
    with empty_folder() as folder, environment(folder):
        (folder / "text.txt").write_text("some words to train on, " * 200)
        (folder / "small.toml").write_text(RUN)
        ended = run("train", "small.toml", "--out", "run")
        assert ended.code == 0, ended
        for step in range(STEPS // 2 + 1, STEPS + 1):
            shutil.rmtree(folder / "run" / "checkpoints" / f"step-{step:08d}")
        shutil.copytree(folder, made, dirs_exist_ok=True)
    return made, {name: content for name, content in contents(made).items() if not name.endswith("/")}


def result_of(folder: Path) -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
    """Return what a finished run has to show: its lines, and the tensors of its last checkpoint."""
    lines = [{key: line.get(key) for key in LINES} for line in read_metrics(folder / "run" / "metrics.jsonl")]
    checkpoint, _ = load_newest(folder / "run" / "checkpoints")
    return lines, flatten(checkpoint.state)[1]


@cache
def expected() -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
    """Return the result of the resumed run where nothing is damaged."""
    with empty_folder() as folder, environment(folder):
        shutil.copytree(saved()[0], folder, dirs_exist_ok=True)
        ended = run("train", "--resume", "run")
        assert ended.code == 0, ended
        return result_of(folder)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """A file of a stopped run or of its token cache, and what became of it."""
    name = draw(st.sampled_from(sorted(name for name in saved()[1] if name.startswith(("run", "cache")))))
    kind = draw(st.sampled_from(["bytes", "bytes", "bytes", "gone", "folder", "pipe"]))
    return name, kind, draw(damaged(saved()[1][name])) if kind == "bytes" else b""


def put(path: Path, kind: str, content: bytes) -> None:
    path.unlink()
    if kind == "bytes":
        path.write_bytes(content)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)


@examples(8)
@given(damages())
def test_a_damaged_run_goes_on_with_the_same_bits_or_not_at_all(damage: tuple[str, str, bytes]) -> None:
    name, kind, content = damage
    lines, tensors = expected()
    with empty_folder() as folder, environment(folder):
        shutil.copytree(saved()[0], folder, dirs_exist_ok=True)
        put(folder / name, kind, content)
        ended = run("train", "--resume", "run")
        check(ended, ("train", "--resume", "run", name, kind))
        if ended.code != 0:
            assert ended.code == 2, ended
            return
        found, weights = result_of(folder)
    assert found == [line for line in lines if line["step"] in {one["step"] for one in found}]
    missing = len(lines) - len(found)
    assert not missing or "metrics" in ended.err, f"{missing} lines are gone, and nothing is said: {ended}"
    assert weights.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(weights[key], tensor), f"{key} differs: {ended}"


@examples(100)
@given(st.deferred(lambda: damaged(saved()[1]["run/metrics.jsonl"])))
def test_metrics_readers_never_give_other_figures(content: bytes) -> None:
    with empty_folder() as folder:
        path = folder / "metrics.jsonl"
        path.write_bytes(saved()[1]["run/metrics.jsonl"])
        good = read_metrics(path)
        path.write_bytes(content)
        try:
            found = read_metrics(path)
        except MezzotintError:
            return
    steps = [line["step"] for line in found]
    assert steps == sorted(set(steps))
    assert all(line in good for line in found)
