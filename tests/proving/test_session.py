"""`mz.prove` around a loop of one's own: seeded alike, kept, resumed, judged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from proofs import substance

import mezzotint as mz
from mezzotint.errors import ProofError
from mezzotint.parity.result import RunStatus, Verdict


def train(run, factor: float = 1.0) -> None:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.ones(4, 1)
    for _ in range(10):
        inputs = torch.randn(16, 4)
        loss = factor * (model(inputs) - inputs @ target).square().mean() + 1e-3 * np.random.rand()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss, tokens=64, norm=model.weight.norm())
    run.result(model=model, score=1 + loss.item())


def test_a_whole_proof(tmp_path: Path) -> None:
    with mz.prove(tmp_path / "out", arms=["float32", "copy=float32"], seeds=2, metrics=["score:1%"]) as proof:
        for run in proof.runs():
            assert run.policy == mz.Policy.parse("float32")
            train(run)
    (result,) = proof.results
    assert result.verdict is Verdict.IDENTICAL
    first = proof.proof.runs[0]
    assert set(first.values) == {"score", "norm", "final_loss", "curve"}
    assert (first.tokens_per_step, first.num_parameters, len(first.seconds)) == (64, 5, 10)
    assert len({run.losses for run in proof.proof.runs}) == 2  # the seeds differ, the arms do not
    for name in ("proof.json", "report.html", "summary.md", "runs/copy/seed-1/metrics.jsonl"):
        assert (tmp_path / "out" / name).exists()


def test_it_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    options = {"arms": ["float32", "b=float32,factor=1.001"], "seeds": 3, "metrics": ["score"]}

    def whole(folder: Path, stop_at: int | None = None) -> mz.prove:
        with mz.prove(folder, **options) as proof:
            for place, run in enumerate(proof.runs()):
                if place == stop_at:
                    raise KeyboardInterrupt
                asked.append((run.arm, run.seed))
                train(run, **run.settings)
        return proof

    asked: list[tuple[str, int]] = []
    uncut = whole(tmp_path / "uncut")
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        whole(tmp_path / "cut", stop_at=3)
    assert len(asked) == 3
    again = whole(tmp_path / "cut")
    assert asked == [(arm, seed) for seed in range(3) for arm in ("float32", "b")]
    assert substance(again.proof) == substance(uncut.proof)
    options["seeds"] = 4
    with pytest.raises(ProofError, match="holds a proof of another design"):
        whole(tmp_path / "cut")


def test_runs_that_fail_or_diverge(tmp_path: Path) -> None:
    with mz.prove(tmp_path / "out", arms=["float32", "nan=float32", "bug=float32"], seeds=2) as proof:
        for run in proof.runs():
            with run:
                train(run)
                if run.arm == "bug":
                    raise KeyError("k")
                if run.arm == "nan":
                    run.log(loss=float("nan"))
                    assert run.is_over
                    run.log(loss=1.0)
    nan, bug = (next(run for run in proof.proof.runs if run.arm == arm) for arm in ("nan", "bug"))
    assert (nan.status, len(nan.losses)) == (RunStatus.DIVERGED, 11)
    assert bug.status is RunStatus.FAILED
    assert "KeyError: 'k' at " in bug.message
    assert [result.verdict for result in proof.results] == [Verdict.WORSE, Verdict.INVALID]


def test_misuse(tmp_path: Path) -> None:
    proof = mz.prove(tmp_path / "out")
    with pytest.raises(ProofError, match="is a context"):
        next(proof.runs())
    with pytest.raises(ProofError, match="logged no step"), proof:
        for _ in proof.runs():
            pass
    with proof:
        for run in proof.runs():
            with pytest.raises(ProofError, match="loss='x' is no number"):
                run.log(loss="x")
            with pytest.raises(ProofError, match="curve is recorded by every run"):
                run.result(curve=3)
            break
    with pytest.raises(ProofError, match="runs are missing in"):
        proof.results  # noqa: B018
