"""A checkpoint is whole or refused, and the one before it serves."""

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mezzotint.errors import CheckpointError
from mezzotint.training import checkpoint
from mezzotint.training.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)

FILES = [TENSORS, STATE, MANIFEST]


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "weights": {"w": torch.randn(20, 10, generator=generator)}, "rates": [1e-3, float("inf")]}


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Return a folder with checkpoints of steps 1 and 2."""
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state(step), keep=5)
    return tmp_path


def test_what_was_saved_comes_back(two: Path) -> None:
    found, refusals = load_newest(two)
    assert found.step == 2
    assert refusals == []
    assert torch.equal(found.state["weights"]["w"], state(2)["weights"]["w"])
    assert found.state["rates"] == [1e-3, float("inf")]


def test_nothing_is_pickled(two: Path) -> None:
    assert sorted(path.name for path in list_checkpoints(two)[0].iterdir()) == sorted(FILES)
    assert all(b"\x80\x04" not in path.read_bytes()[:2] for path in list_checkpoints(two)[0].iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_checkpoint(tmp_path, step, state(step), keep=3)
    assert steps(tmp_path) == [5, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (5, 6, 7)]


def test_saving_a_step_again_replaces_it(two: Path) -> None:
    save_checkpoint(two, 2, {"other": 1}, keep=5)
    assert load_newest(two)[0].state == {"other": 1}


def assert_refused_and_the_one_before_used(folder: Path) -> None:
    with pytest.raises(CheckpointError):
        load_checkpoint(list_checkpoints(folder)[-1])
    found, refusals = load_newest(folder)
    assert found.step == 1
    assert torch.equal(found.state["weights"]["w"], state(1)["weights"]["w"])
    assert len(refusals) == 1
    assert "\n" not in refusals[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tenths", range(10))
def test_truncated_at_every_tenth(two: Path, name: str, tenths: int) -> None:
    path = list_checkpoints(two)[-1] / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * tenths // 10])
    assert_refused_and_the_one_before_used(two)


@pytest.mark.parametrize("name", FILES)
def test_flipped_bytes(two: Path, name: str) -> None:
    """Any changed byte is noticed: all of the manifest's, and 60 places of the others."""
    path = list_checkpoints(two)[-1] / name
    content = path.read_bytes()
    chance = random.Random(0)
    places = range(len(content)) if name == MANIFEST else sorted(chance.sample(range(len(content)), 60))
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert_refused_and_the_one_before_used(two)
    path.write_bytes(content)
    assert load_newest(two)[0].step == 2


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(two: Path, name: str) -> None:
    (list_checkpoints(two)[-1] / name).unlink()
    assert_refused_and_the_one_before_used(two)


def test_none_is_whole(two: Path) -> None:
    for path in list_checkpoints(two):
        (path / TENSORS).write_bytes(b"")
    with pytest.raises(CheckpointError, match="is whole"):
        load_newest(two)


def test_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_newest(tmp_path)


def test_another_schema_is_named(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SCHEMA", "mezzotint.checkpoint/9")
    save_checkpoint(two, 3, state(3), keep=5)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"schema mezzotint\.checkpoint/9"):
        load_checkpoint(list_checkpoints(two)[-1])


def test_leftovers_of_a_killed_writer_are_removed(two: Path) -> None:
    (two / ".partial-00000003-1").mkdir()
    (two / ".partial-00000003-1" / TENSORS).write_bytes(b"half")
    assert load_newest(two)[0].step == 2
    save_checkpoint(two, 3, state(3), keep=5)
    assert not list(two.glob(".partial-*"))


def test_a_renamed_checkpoint_is_refused(two: Path) -> None:
    list_checkpoints(two)[-1].rename(two / "step-00000009")
    found, refusals = load_newest(two)
    assert found.step == 1
    assert "holds step 2" in refusals[0]


ODD_MANIFESTS = [
    "[]", "3", "null", "{}", "[" * 3000 + "]" * 3000, "9" * 5000, "NaN", '"text"', "\\x00",
    '{"schema": "mezzotint.checkpoint/1", "step": true, "files": {}}',
    '{"schema": "mezzotint.checkpoint/1", "step": NaN, "files": {}}',
    '{"schema": "mezzotint.checkpoint/1", "step": 2, "step": 2, "files": {}}',
    '{"schema": "mezzotint.checkpoint/1", "step": 2, "files": {"../x": {"bytes": 1, "sha256": ""}}}',
    '{"schema": ["x"], "step": 2, "files": 3}',
]  # fmt: skip


@pytest.mark.parametrize("body", ODD_MANIFESTS, ids=range(len(ODD_MANIFESTS)))
def test_a_sealed_manifest_with_odd_content(two: Path, body: str) -> None:
    seal = hashlib.sha256(body.encode()).hexdigest()
    (list_checkpoints(two)[-1] / MANIFEST).write_text(f"{seal}\n{body}")
    assert_refused_and_the_one_before_used(two)


@pytest.mark.parametrize(
    "tree",
    ["3 4", '{"$tensor": "nobody"}', '{"$dtype": "load"}', '{"$new": 1}', "[" * 3000 + "]" * 3000, '{"$dict": 3}'],
)
def test_a_sealed_state_with_odd_content(two: Path, monkeypatch: pytest.MonkeyPatch, tree: str) -> None:
    monkeypatch.setattr(checkpoint.json, "dumps", lambda value, **_: tree)
    monkeypatch.setattr(
        checkpoint,
        "_sealed",
        lambda manifest: (
            (body := repr(manifest).replace("'", '"').encode())
            and hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        ),
    )
    save_checkpoint(two, 2, state(2), keep=5)
    monkeypatch.undo()
    assert_refused_and_the_one_before_used(two)


def test_a_pipe_in_place_of_a_file(two: Path) -> None:
    path = list_checkpoints(two)[-1] / STATE
    path.unlink()
    os.mkfifo(path)
    assert_refused_and_the_one_before_used(two)


def test_a_run_that_was_removed_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was removed while the run"):
        save_checkpoint(tmp_path / "run" / "checkpoints", 1, state(1), keep=1)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"needs 3\.8 MiB.*start the run again"):
        save_checkpoint(tmp_path, 1, {"w": torch.zeros(1_000_000)}, keep=1)


WRITER = """
import sys, torch
from pathlib import Path
from mezzotint.training.checkpoint import save_checkpoint
for step in range(1, 10_000):
    save_checkpoint(Path(sys.argv[1]), step, {"step": step, "w": torch.full((200_000,), float(step))}, keep=2)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_writer_killed_at_random_moments_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    chance = random.Random(1)
    for trial in range(6):
        folder = tmp_path / str(trial)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True)
        told = 0
        for _ in range(3):
            told = int(writer.stdout.readline())
        time.sleep(chance.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
        told = max([told, *map(int, rest.split())])
        found, _ = load_newest(folder)
        assert found.step in (told, told + 1)
        assert bool((found.state["w"] == found.step).all())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    made = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"mounting a small file system is not permitted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_that_was_saved(small_disk: Path) -> None:
    save_checkpoint(small_disk, 1, state(1), keep=1)
    with pytest.raises(CheckpointError, match=r"step 2 was not saved.*full.*step-00000001 and older are safe"):
        save_checkpoint(small_disk, 2, {"w": torch.zeros(500_000)}, keep=1)
    assert sorted(path.name for path in small_disk.iterdir()) == ["step-00000001"]
    assert load_newest(small_disk)[0].step == 1
    save_checkpoint(small_disk, 3, state(3), keep=1)
    assert steps(small_disk) == [3]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="was not saved"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, state(1), keep=1)
