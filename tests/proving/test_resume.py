"""A proof killed at any moment goes on to the identical verdict; what belongs to another design is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from proofs import Quiet, prove, resume, small_recipe, substance
from proving_programs import LEARNER, script

from mezzotint.errors import ProofError
from mezzotint.parity.result import Proof
from mezzotint.proving import seed as seed_module
from mezzotint.proving.conclusion import write_proof
from mezzotint.proving.design_file import design_from_toml
from mezzotint.proving.store import ProofFolder
from mezzotint.proving.targets import experiment_for


class _Killed(BaseException):
    pass


def killed_after(monkeypatch: pytest.MonkeyPatch, num_writes: int) -> None:
    """Let the process "die" at its n-th write of a finished run."""
    original = ProofFolder.write_run
    count = iter(range(num_writes))

    def write_run(self, run) -> None:
        if next(count, None) is None:
            raise _Killed
        original(self, run)

    monkeypatch.setattr(ProofFolder, "write_run", write_run)


@pytest.mark.parametrize("num_writes", [0, 1, 2, 3])
def test_interrupted_between_any_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int) -> None:
    experiment = experiment_for(script(tmp_path), seeds=2, metrics=["accuracy:1%:higher", "double"])
    whole = prove(tmp_path / "whole", experiment)
    with monkeypatch.context() as patch:
        killed_after(patch, num_writes)
        with pytest.raises(_Killed):
            prove(tmp_path / "cut", experiment)
    watcher = Quiet()
    assert substance(resume(tmp_path / "cut", watcher)) == substance(whole)
    assert watcher.seeds == ([0, 1] if num_writes < 2 else [1])
    assert substance(resume(tmp_path / "cut", Quiet())) == substance(whole)


def test_a_sequential_proof_ends_at_the_same_look(tmp_path: Path) -> None:
    experiment = experiment_for(script(tmp_path), arms=["a=float32", "b=float32,noise=0.001"], seeds=2, max_seeds=5)
    watcher = Quiet()
    whole = prove(tmp_path / "whole", experiment, watcher)
    assert 2 <= len(watcher.seeds) <= 5
    # seeds beyond the deciding one, as parallel processes may leave them, change nothing
    longer = ProofFolder.open(tmp_path / "whole")
    further = prove(tmp_path / "more", experiment.replace(seeds=(0, 1, 2, 3, 4), max_seeds=0))
    for run in further.runs:
        if longer.read_run(run.arm, run.seed) is None:
            longer.start_run(run.arm, run.seed)
            longer.write_run(run)
    assert substance(resume(tmp_path / "whole")) == substance(whole)


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("jobs", [1, 2])
def test_killed_by_the_system_at_random_moments(tmp_path: Path, jobs: int) -> None:
    target = script(tmp_path, LEARNER.replace("yield {", "import time; time.sleep(0.01); yield {"))
    whole = prove(tmp_path / "whole", experiment_for(target, seeds=4), jobs=jobs)
    command = [sys.executable, "-m", "mezzotint", "prove"]
    begin = [*command, "--seeds", "4", "--jobs", str(jobs), "--out", str(tmp_path / "cut"), target]
    chance = random.Random(jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    cut = tmp_path / "cut"
    for kill in range(4):
        is_begun = (cut / "config.toml").exists()
        process = subprocess.Popen(
            [*command, "--resume", str(cut)] if is_begun else begin,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        before = progress(cut)
        deadline = time.monotonic() + 60
        while process.poll() is None and progress(cut) <= before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode in (-signal.SIGKILL, 0, 1, 3), kill
    done = subprocess.run([*command, "--resume", str(cut), "--json"], capture_output=True, check=False, env=environment)
    assert done.returncode == whole.exit_code, done.stderr.decode()
    again = Proof.from_json(json.loads((cut / "proof.json").read_text()))
    assert substance(again) == substance(Proof.from_json(json.loads(json.dumps(whole.to_json()))))
    assert not list(cut.rglob(".worker-*"))


def progress(folder: Path) -> int:
    """Return how much the metrics of all runs hold."""
    return sum(path.stat().st_size for path in folder.glob("runs/*/*/metrics.jsonl"))


def test_a_changed_design_script_or_run_is_refused(tmp_path: Path) -> None:
    target = script(tmp_path)
    prove(tmp_path / "out", experiment_for(target, seeds=2))
    config = tmp_path / "out" / "config.toml"
    text = config.read_text()
    config.write_text(text.replace("alpha = 0.05", "alpha = 0.2"))
    with pytest.raises(ProofError, match="was changed since the proof began"):
        resume(tmp_path / "out")
    config.write_text(text)
    script(tmp_path, LEARNER.replace("0.05", "0.06"))
    with pytest.raises(ProofError, match=r"train.py:make_run or its data changed since"):
        resume(tmp_path / "out")
    script(tmp_path)
    run = tmp_path / "out" / "runs" / "float32" / "seed-0" / "run.json"
    good = run.read_text()
    run.write_text(good.replace(design_from_toml(text, "x").digest, "0" * 16))
    with pytest.raises(ProofError, match="belongs to design 0000000000000000"):
        resume(tmp_path / "out")


def test_a_folder_of_an_older_version_is_called_that(tmp_path: Path) -> None:
    prove(tmp_path / "out", experiment_for(script(tmp_path), seeds=2))
    path = tmp_path / "out" / "circumstances.json"
    facts = json.loads(path.read_text())
    del facts["sha256"]
    path.write_text(json.dumps(facts))
    with pytest.raises(ProofError, match=r"circumstances\.json has no checksum: an older version of mezzotint wrote"):
        resume(tmp_path / "out")


def test_a_damaged_run_is_trained_again(tmp_path: Path) -> None:
    experiment = experiment_for(script(tmp_path), seeds=2)
    whole = prove(tmp_path / "out", experiment)
    run = tmp_path / "out" / "runs" / "bf16-mixed" / "seed-1" / "run.json"
    run.write_text(run.read_text().replace("accuracy", "accurate"))
    watcher = Quiet()
    assert substance(resume(tmp_path / "out", watcher)) == substance(whole)
    assert watcher.seeds == [1]


def test_the_design_is_on_disk_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = small_recipe(arms=["float32", "eager=bf16-mixed,train.accumulate=2"], max_seeds=3, metrics=["curve"])

    def no_step(*_args, **_options):
        found = design_from_toml((tmp_path / "out" / "config.toml").read_text(), "config.toml")
        assert found == experiment
        raise _Killed

    monkeypatch.setattr(seed_module, "_advance", no_step)
    with pytest.raises(_Killed):
        prove(tmp_path / "out", experiment)
    # config.toml is a target itself, and spells the same design
    assert experiment_for(str(tmp_path / "out" / "config.toml"), seeds=5) == experiment


def test_only_one_process_may_write(tmp_path: Path) -> None:
    experiment = experiment_for(script(tmp_path), seeds=2)
    prove(tmp_path / "out", experiment)
    with ProofFolder.open(tmp_path / "out"), pytest.raises(ValueError, match="in use by another process"):
        resume(tmp_path / "out")
    with pytest.raises(ProofError, match="exists and is not empty"):
        prove(tmp_path / "out", experiment)


def test_the_three_files(tmp_path: Path) -> None:
    proof = prove(tmp_path / "out", experiment_for(script(tmp_path), seeds=2))
    assert write_proof(ProofFolder.open(tmp_path / "out"), proof) == []
    assert substance(Proof.from_json(json.loads((tmp_path / "out" / "proof.json").read_text()))) == substance(proof)
    assert "bf16-mixed" in (tmp_path / "out" / "report.html").read_text()
    assert "bf16-mixed" in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 7])
def test_a_long_recipe_goes_on_from_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    # one arm ends early, one needs masters, one has delayed scales and a loss scale
    arms = ["float32", "hot=float32,optimizer.learning_rate=1e39", "m=bf16-master", "s=fp8-mixed,scaling=dynamic"]
    experiment = small_recipe(arms=arms, steps=9)
    whole = prove(tmp_path / "whole", experiment)
    assert not list((tmp_path / "whole").rglob("checkpoints"))
    original, rounds = seed_module.SeedCheckpoints.save_if_due, []

    def save_and_die(self, number: int, turns) -> None:
        original(self, number, turns)
        rounds.append(number)
        if number == at:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(seed_module, "CHECKPOINT_SECONDS", 0.0)
        patch.setattr(seed_module.SeedCheckpoints, "save_if_due", save_and_die)
        with pytest.raises(_Killed):
            prove(tmp_path / "cut", experiment)
    if at == 7:  # the newest checkpoint of one arm is damaged: the round before serves
        newest = max((tmp_path / "cut" / "runs" / "m" / "seed-0" / "checkpoints").iterdir())
        (newest / "state.json").write_text("{}")
    watcher = Quiet()
    assert substance(resume(tmp_path / "cut", watcher)) == substance(whole)
    first = next(step for arm, step, _ in watcher.steps if arm == "float32")
    assert first == (at if at == 7 else at + 1)
    assert not list((tmp_path / "cut").rglob("checkpoints"))
