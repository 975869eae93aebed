"""The run directory: made whole or not at all, opened only where there is one, locked while in use."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mezzotint.errors import ConfigError, TrainingError
from mezzotint.training.checkpoint import save_checkpoint
from mezzotint.training.rundir import RunDirectory, free_path


def test_create_and_open(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "deep" / "run", "x = 1\n")
    assert run.config_path.read_text() == "x = 1\n"
    with pytest.raises(ConfigError, match="saved no checkpoint"):
        RunDirectory.open(run.path)
    save_checkpoint(run.checkpoints_path, 1, {}, keep=1)
    assert RunDirectory.open(run.path).path == run.path


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert RunDirectory.create(tmp_path / "run", "").config_path.exists()


@pytest.mark.parametrize("kind", ["full", "file", "below a file"])
def test_a_place_that_cannot_be_used_is_left_alone(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "run"
    if kind == "full":
        place.mkdir()
        (place / "precious").write_text("x")
    else:
        place.write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="--out"):
        RunDirectory.create(place / "inner" if kind == "below a file" else place, "")
    assert sorted(tmp_path.rglob("*")) == before


def test_no_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written: Permission denied"):
        RunDirectory.create(tmp_path / "run", "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["missing", "no config"])
def test_open_refuses_what_is_no_run(tmp_path: Path, kind: str) -> None:
    if kind == "no config":
        (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="no run directory"):
        RunDirectory.open(tmp_path / "run")


HOLDER = """
import sys, time
from pathlib import Path
from mezzotint.training.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(280)
"""


def test_the_lock_keeps_a_second_process_out_until_the_first_is_gone(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="in use by another process"), run:
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with run:
        pass


def test_free_path(tmp_path: Path) -> None:
    assert free_path(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert free_path(tmp_path / "a") == tmp_path / "a-3"


def test_names_that_no_file_system_takes(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(ConfigError, match="--out") as caught:
            RunDirectory.create(tmp_path / name, "")
        assert len(str(caught.value)) < 400
        with pytest.raises(ConfigError, match="--resume"):
            RunDirectory.open(tmp_path / name)


def test_a_directory_that_was_removed_is_said(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    run.metrics_path.touch()
    run.check_exists()
    run.config_path.unlink()
    with pytest.raises(TrainingError, match="was removed while the run"):
        run.check_exists()


def test_a_folder_that_takes_no_lock(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "")
    (run.path / ".lock").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"), run:
        pass
