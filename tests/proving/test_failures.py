"""What goes wrong in one arm is recorded as such, and the others go on."""

import errno
import os
from pathlib import Path

import pytest
import torch
from proofs import Quiet, prove, resume, small_recipe, substance
from proving_programs import LEARNER, script

from mezzotint.errors import PolicyError, ProofError, TrainingError
from mezzotint.parity.result import RunStatus, Verdict
from mezzotint.proving import store
from mezzotint.proving.targets import experiment_for

FAULTS = {
    "loss = loss * float('nan')": (RunStatus.DIVERGED, "the loss was nan at step 6"),
    "raise ValueError('a bad batch')": (RunStatus.FAILED, "step 6: ValueError: a bad batch at {path}:19"),
    "import sys; sys.exit(3)": (RunStatus.FAILED, "the script called sys.exit(3)"),
    "raise MemoryError": (RunStatus.OUT_OF_MEMORY, "step 6: MemoryError at {path}:19"),
    "torch.empty(1 << 60)": (RunStatus.OUT_OF_MEMORY, "step 6: RuntimeError:"),
    "raise torch.OutOfMemoryError('CUDA out of memory')": (RunStatus.OUT_OF_MEMORY, "step 6: OutOfMemoryError"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_treatment_that_ends_early(tmp_path: Path, fault: str) -> None:
    text = LEARNER.replace(
        "        optimizer.zero_grad()",
        f"        if policy.is_mixed and step == 5: {fault}\n        optimizer.zero_grad()",
    )
    proof = prove(
        tmp_path / "out", experiment_for(script(tmp_path, text), arms=["float32", "bf16-mixed", "z=float32"], seeds=2)
    )
    status, message = FAULTS[fault]
    for run in proof.runs:
        if run.arm == "bf16-mixed":
            assert run.status is status
            assert run.message.startswith(message.format(path=tmp_path / "train.py"))
            assert len(run.losses) == (6 if status is RunStatus.DIVERGED else 5)
            assert run.values == {}
        else:
            assert run.status is RunStatus.FINISHED
            assert len(run.losses) == 12
    assert proof.results[0].verdict is (Verdict.WORSE if status is RunStatus.DIVERGED else Verdict.INVALID)
    assert proof.results[1].verdict is Verdict.IDENTICAL


def test_an_arm_without_room_beside_the_others_is_run_by_itself(tmp_path: Path) -> None:
    text = LEARNER + (
        "ALIVE = __import__('sys').__dict__.setdefault('_alive_runs', [])\n"
        "inner = make_run\n"
        "def make_run(seed, policy):\n"
        "    if policy.is_mixed and ALIVE: raise MemoryError\n"
        "    ALIVE.append(1)\n"
        "    try:\n"
        "        return (yield from inner(seed, policy))\n"
        "    finally:\n"
        "        ALIVE.pop()\n"
    )
    proof = prove(tmp_path / "out", experiment_for(script(tmp_path, text), seeds=2))
    assert {run.status for run in proof.runs} == {RunStatus.FINISHED}
    assert [bool(run.baseline_seconds) for run in proof.runs] == [True, False, True, False]
    same = prove(tmp_path / "same", experiment_for(script(tmp_path), seeds=2))
    assert [run.losses for run in same.runs] == [run.losses for run in proof.runs]


def test_nan_in_a_recipe_ends_that_arm(tmp_path: Path) -> None:
    # a learning rate at which the loss overflows; the engine gives up by NonFiniteError, or the loss is not finite
    proof = prove(
        tmp_path / "out", small_recipe(arms=["float32", "hot=float32,optimizer.learning_rate=1e39"], steps=12)
    )
    assert {run.status for run in proof.runs if run.arm == "hot"} == {RunStatus.DIVERGED}
    assert {run.status for run in proof.runs if run.arm == "float32"} == {RunStatus.FINISHED}
    assert proof.results[0].verdict is Verdict.WORSE


def test_a_policy_that_a_recipe_cannot_have_ends_everything(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="float8"):
        prove(tmp_path / "out", small_recipe(arms=["float32", "x=compute=float8_e4m3fn"]))
    with pytest.raises(ProofError, match="arm x sets seed, which is the design's"):
        prove(tmp_path / "two", small_recipe(arms=["float32", "x=float32,seed=3"]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def make_run(seed): yield 1.0", r"cannot be called as make_run\(seed, policy\): too many"),
        ("def make_run(seed, policy): return 3", "returned int; make it a generator"),
        ("def make_run(seed, policy): yield 'x'", "yielded loss='x'; yield a number"),
        ("def make_run(seed, policy): yield {'a': 1}", r"without 'loss', but with \['a'\]"),
        ("def make_run(seed, policy):\n    yield 1.0\n    return 3", "returned int at its end; return a mapping"),
        ("def make_run(seed, policy):\n    yield 1.0\n    return {'curve': 3}", "returned curve, which every run has"),
        ("import torch\ndef make_run(seed, policy): yield torch.ones(2)", r"loss=a tensor of shape \(2,\)"),
        ("make_run = 3", "has no function make_run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ProofError, match=said):
        prove(tmp_path / "out", experiment_for(script(tmp_path, text), seeds=2))


def test_a_script_that_is_none_leaves_nothing(tmp_path: Path) -> None:
    for text, said in (("def other(): pass", "has no function make_run"), ("def make_run(:", "not a Python script")):
        with pytest.raises(ProofError, match=said):
            prove(tmp_path / "out", experiment_for(script(tmp_path, text), seeds=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_writes", [1, 3])
def test_a_full_disk_is_said_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_writes: int
) -> None:
    experiment = experiment_for(script(tmp_path), seeds=3)
    whole = prove(tmp_path / "whole", experiment)
    original, count = store.write_whole, iter(range(2 + num_writes))  # the design's two files go first

    def write_whole(path: Path, text: str) -> None:
        if next(count, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, text)

    monkeypatch.setattr(store, "write_whole", write_whole)
    kept = num_writes // 2
    with pytest.raises(TrainingError, match=rf"the disk is full \(.* free\); the runs of {kept} seeds? .*--resume"):
        prove(tmp_path / "out", experiment)
    monkeypatch.undo()
    watcher = Quiet()
    assert substance(resume(tmp_path / "out", watcher)) == substance(whole)
    assert watcher.seeds == [0, 1, 2][kept:]


def test_a_disk_that_fills_during_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.write

    def write(descriptor: int, content: bytes) -> int:
        if b'"step": 7' in content:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, content)

    experiment = experiment_for(script(tmp_path), seeds=2)
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl cannot be written: No space left on device"):
        prove(tmp_path / "out", experiment)
    monkeypatch.undo()
    assert len(resume(tmp_path / "out").runs) == 4


def test_out_of_memory_is_told_from_other_errors() -> None:
    from mezzotint.proving.seed import is_out_of_memory

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))
