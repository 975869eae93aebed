"""Arms that take turns in one process compute what each would have computed alone, bit for bit."""

from pathlib import Path

import pytest
import torch
from proofs import Quiet, prove, small_recipe
from proving_programs import LEARNER, script

from mezzotint.errors import ProofError
from mezzotint.parity.result import RunStatus
from mezzotint.proving.targets import experiment_for
from mezzotint.training.config import with_settings


def test_an_interleaved_run_has_the_losses_of_a_run_alone(tmp_path: Path) -> None:
    target = script(tmp_path)
    arms = ["float32", "bf16-mixed", "fast=float32,lr=0.2"]
    together = prove(tmp_path / "all", experiment_for(target, arms=arms, seeds=2))
    for arm in arms:
        # the same arm beside a copy of itself only: what the others drew has no part in it
        alone = prove(
            tmp_path / arm[:4], experiment_for(target, arms=[arm, f"x={arm.partition('=')[2] or arm}"], seeds=2)
        )
        name = arm.partition("=")[0]
        losses = {run.seed: run.losses for run in alone.runs if run.arm == name}
        assert losses == {run.seed: run.losses for run in together.runs if run.arm == name}
    assert len({run.losses for run in together.runs}) == 6  # arms and seeds do differ


def test_arms_take_turns_and_the_order_turns_around(tmp_path: Path) -> None:
    watcher = Quiet()
    prove(tmp_path / "out", experiment_for(script(tmp_path), seeds=2, steps=4), watcher)
    a, b = "float32", "bf16-mixed"
    assert [arm for arm, _, _ in watcher.steps][:8] == [a, b, b, a, a, b, b, a]


def test_equal_arms_are_identical_with_their_weights(tmp_path: Path) -> None:
    proof = prove(tmp_path / "out", experiment_for(script(tmp_path), arms=["a=float32", "b=float32"], seeds=2))
    assert [str(result.verdict) for result in proof.results] == ["identical"]
    for run in proof.runs:
        assert len(run.weights_digest) == 32
        assert run.num_parameters == 8 * 16 + 16 + 16 + 1
        assert run.memory_bytes["weights"] == 4 * run.num_parameters
        # AdamW: two states of a weight and a step count, a float32, of each of the 4 tensors
        assert run.memory_bytes["states"] == 8 * run.num_parameters + 4 * 4
        assert run.memory_bytes["peak"] > run.memory_bytes["weights"] + run.memory_bytes["states"]
        assert len(run.seconds) == len(run.baseline_seconds) == 12


def test_recipes_compute_what_training_alone_computes(tmp_path: Path) -> None:
    from mezzotint.data.tokens import open_corpus
    from mezzotint.training.config import from_toml
    from mezzotint.training.trainer import Trainer

    experiment = small_recipe(arms=["float32", "fp8-mixed"])
    proof = prove(tmp_path / "out", experiment)
    for run in proof.runs:
        config = with_settings(from_toml(experiment.recipe_toml, "x"), [f"seed={run.seed}", f'policy="{run.arm}"'])
        trainer = Trainer(config, open_corpus(config.data, block_size=config.model.block_size))
        assert run.losses == tuple(trainer.update().loss for _ in range(6))
        assert run.values["validation_loss"] == trainer.validation_loss()


LEAKS = {
    "torch.autocast": 'with torch.autocast("cpu", dtype=torch.bfloat16):\n            yield loss',
    "torch.no_grad": "with torch.no_grad():\n            yield loss",
    "torch.inference_mode": "with torch.inference_mode():\n            yield loss",
    "mz.fast_cpu": "import mezzotint.lowprec.gate as gate\n        gate.enter((torch.bfloat16,))\n        yield loss",
    "a torch function mode": 'with torch.device("cpu"):\n            yield loss',
    "saved_tensors_hooks": "with torch.autograd.graph.saved_tensors_hooks(id, id):\n            yield loss",
}


@pytest.mark.parametrize("name", LEAKS)
def test_a_turn_that_ends_inside_a_context_is_refused(tmp_path: Path, name: str) -> None:
    from mezzotint.lowprec import gate

    text = LEARNER.replace('yield {"loss": loss, "double": 2 * loss.item()}', LEAKS[name])
    try:
        with pytest.raises(ProofError, match=f"arm float32 gave up its turn inside {name}.*before each yield"):
            prove(tmp_path / "out", experiment_for(script(tmp_path, text), seeds=2))
    finally:
        if name == "mz.fast_cpu":
            gate.leave((torch.bfloat16,))
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


SETTINGS = """
import torch

def make_run(seed, policy, mine=False):
    if mine:
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")
        torch.set_num_threads(3)
    for step in range(4):
        own = (torch.get_default_dtype() == torch.float64, torch.are_deterministic_algorithms_enabled(),
               torch.get_float32_matmul_precision() == "high", torch.get_num_threads() == 3)
        assert own == (mine,) * 4, own
        yield 4.0 - step
"""


def test_process_wide_settings_are_each_arms_own(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    experiment = experiment_for(script(tmp_path, SETTINGS), arms=["a=float32", "b=float32,mine=true"], seeds=2)
    proof = prove(tmp_path / "out", experiment)
    assert {run.status for run in proof.runs} == {RunStatus.FINISHED}, proof.runs[1].message
    assert torch.get_default_dtype() == torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == before


def test_a_function_that_returns_losses_does_not_take_turns(tmp_path: Path) -> None:
    text = "def make_run(seed, policy):\n    return [3.0, 2.0, 1.0 + seed], {'auc': 0.9}\n"
    proof = prove(tmp_path / "out", experiment_for(script(tmp_path, text), seeds=2))
    for run in proof.runs:
        assert run.losses == (3.0, 2.0, 1.0 + run.seed)
        assert run.values == {"auc": 0.9, "final_loss": 1.0 + run.seed, "curve": 2.0 + run.seed / 3}
        assert run.baseline_seconds == ()
        assert len(set(run.seconds)) == 1
