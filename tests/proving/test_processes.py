"""Seeds in parallel: how many memory allows, and that what they compute is what one process computes."""

from pathlib import Path

import pytest
from proofs import Quiet, prove, resume, substance
from proving_programs import LEARNER, script

from mezzotint.errors import ProofError
from mezzotint.proving import processes
from mezzotint.proving.processes import affordable_jobs
from mezzotint.proving.store import ProofFolder
from mezzotint.proving.targets import experiment_for

GIB = 2**30


@pytest.mark.parametrize(
    ("peak", "free", "jobs"), [(1, 100, 4), (1, 3, 2), (2, 3, 1), (4, 1, 1), (0, 3, 4), (1, None, 4)]
)
def test_memory_decides_how_many(monkeypatch: pytest.MonkeyPatch, peak: int, free: int | None, jobs: int) -> None:
    monkeypatch.setattr(processes, "_peak_bytes", lambda: peak * GIB)
    monkeypatch.setattr(processes.host, "free_memory_bytes", lambda: None if free is None else free * GIB)
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: False)
    assert affordable_jobs(4)[0] == jobs


@pytest.mark.slow
def test_parallel_seeds_compute_the_same_and_their_times_are_marked(tmp_path: Path) -> None:
    experiment = experiment_for(script(tmp_path), seeds=3)
    alone = prove(tmp_path / "alone", experiment)
    watcher = Quiet()
    beside = prove(tmp_path / "beside", experiment, watcher, jobs=2)
    assert substance(beside)["runs"] == substance(alone)["runs"]
    assert [run.is_traded_off for run in beside.runs] == [False, False, True, True, True, True]
    assert ProofFolder.open(tmp_path / "beside").circumstances["threads_per_job"] == 1
    assert {arm for arm, _, _ in watcher.steps} == {"float32", "bf16-mixed"}


@pytest.mark.slow
def test_a_worker_that_is_refused_or_killed_is_told(tmp_path: Path) -> None:
    text = LEARNER.replace("    for step", "    if seed == 1: import os; os.kill(os.getpid(), 9)\n    for step")
    experiment = experiment_for(script(tmp_path, text), seeds=3)
    with pytest.raises(RuntimeError, match=r"the process of seed 1 was ended by signal 9.*fewer --jobs"):
        prove(tmp_path / "killed", experiment, jobs=2)
    assert ProofFolder.open(tmp_path / "killed").read_seed(2) is not None  # its neighbour came to its end
    text = LEARNER.replace("yield {", "yield 'x' if seed == 1 else {")
    with pytest.raises(ProofError, match="yielded loss='x'; yield a number"):
        prove(tmp_path / "refused", experiment_for(script(tmp_path, text), seeds=3), jobs=2)
    assert not list(tmp_path.rglob(".worker-*"))
    script(tmp_path, LEARNER)
    with pytest.raises(ProofError, match="changed since"):
        resume(tmp_path / "refused")
