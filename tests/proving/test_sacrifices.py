"""Planted sacrifices are caught, and what is none is not: the smallest version of benchmarks/prove_sacrifices.py.

Three seeds of 16 steps are enough where the same bits are compared but for the plant. Margins are ten times what
float32 itself is off by against float64.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mezzotint.parity.design import CURVE, DISTANCE, Arm, Experiment, Metric, Source
from mezzotint.parity.losses import final_loss, mean_loss
from mezzotint.parity.result import ArmResult, Run, RunStatus, Verdict
from mezzotint.parity.verdict import judge

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import prove_programs

SEEDS, STEPS = (0, 1, 2), 16
LOSSES = (CURVE,)
GRADIENT = Metric(name="gradient_error", margin=3e-6, is_relative=False)
LOG_PROB = Metric(name="log_prob_error", margin=1e-6, is_relative=False)


def run(policy: str, plant: str, seed: int) -> Run:
    # updates begin to round away where the warm-up of the learning rate ends, at step 20
    num_steps = 2 * STEPS if policy == "bf16-master" else STEPS
    steps, losses = prove_programs.planted(seed, policy, num_steps, plant), []
    while True:
        try:
            losses.append(next(steps)["loss"])
        except StopIteration as end:
            values = {**end.value, "final_loss": final_loss(losses), "curve": mean_loss(losses)}
            return Run(arm="", seed=seed, status=RunStatus.FINISHED, losses=tuple(losses), values=values)


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, str], list[Run]]:
    """Runs by policy and plant, made once."""
    return {}


def verdict_on(
    runs: dict[tuple[str, str], list[Run]], plant: str, *metrics: Metric, policy: str = "float32", control: str = "none"
) -> ArmResult:
    """The verdict on a plant against a healthy run of the same policy."""
    experiment = Experiment(
        source=Source.CODE,
        target="planted",
        arms=(Arm(name="healthy", policy=policy), Arm(name=plant, policy=policy)),
        seeds=SEEDS,
        steps=STEPS,
        metrics=metrics,
        min_learning=0.05,
    )
    found = []
    for arm, what in (("healthy", control), (plant, plant)):
        if (policy, what) not in runs:
            runs[policy, what] = [run(policy, what, seed) for seed in SEEDS]
        found += [replace(one, arm=arm) for one in runs[policy, what]]
    return judge(experiment, found)[0]


@pytest.mark.parametrize(
    ("plant", "metric"),
    [
        ("log-softmax-bf16", LOG_PROB),
        ("log-softmax-bf16", GRADIENT),
        ("rms-norm-fp16", LOG_PROB),
        ("rms-norm-fp16", GRADIENT),
        ("rotary-bf16", LOG_PROB),
        ("rotary-bf16", GRADIENT),
        ("learning-rate", replace(DISTANCE, is_primary=True)),
    ],
)
def test_probes_catch_what_the_losses_do_not_show(runs: dict, plant: str, metric: Metric) -> None:
    assert verdict_on(runs, plant, metric).verdict is Verdict.WORSE
    assert verdict_on(runs, plant, *LOSSES).verdict is Verdict.EQUIVALENT


def test_lost_master_weights_travel_less_far(runs: dict) -> None:
    distance = replace(DISTANCE, is_primary=True, margin=0.002)
    assert verdict_on(runs, "lost-masters", distance, policy="bf16-master").verdict is Verdict.WORSE


def test_a_run_that_does_not_train(runs: dict) -> None:
    found = verdict_on(runs, "no-training", *LOSSES)
    assert found.verdict is Verdict.WORSE
    assert "did not learn in 3 of 3 runs" in found.reasons[0]
    assert verdict_on(runs, "no-training", *LOSSES, control="no-training").verdict is Verdict.INVALID


def test_the_same_run_again_is_identical_and_other_seeds_are_equivalent(runs: dict) -> None:
    assert verdict_on(runs, "none", *LOSSES).verdict is Verdict.IDENTICAL
    # pairs that share nothing: the spread of training itself, a few percent at 16 steps
    wide = replace(CURVE, margin=0.1)
    assert verdict_on(runs, "other-seeds", wide).verdict is Verdict.EQUIVALENT
