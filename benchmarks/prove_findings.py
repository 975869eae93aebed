"""Two published findings, reproduced at small scale by `mezzotint prove`, with the mechanism beside the verdict.

    python benchmarks/prove_findings.py --record benchmarks/records

1. Weights in bfloat16 under plain AdamW end worse than float32, because small updates round away; stochastic rounding
   and Kahan summation repair it (Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv 2010.06192).
2. float16 without loss scaling loses small gradients; scaling repairs it (Micikevicius et al. 2018, "Mixed Precision
   Training", arXiv 1710.03740).

These are reproductions of the effect and of its cause, not of the papers' figures: a language model of 0.11M
parameters learns bytes for 200 to 300 steps. Settings were chosen with seeds above 100; the designs below, their seeds
and margins were fixed before they ran.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

import harness
import prove_programs
from mezzotint.data.tokens import open_corpus
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.parity.design import CURVE, DISTANCE, VALIDATION_LOSS, Arm, Experiment, Metric, Source
from mezzotint.parity.result import Proof
from mezzotint.proving.recipe_run import arm_config
from mezzotint.training.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig, to_toml
from mezzotint.training.trainer import Trainer
from proof_records import as_record, carry_out, verdict_table

SEEDS = (0, 1, 2, 3, 4)

LOST_UPDATES = """\
Setting: AdamW at 1e-3, a cosine to a tenth of it. Weights are drawn with a deviation of 0.02, where bfloat16 numbers
are 2**-13 apart: an update below half of that, 6e-5, rounds away. Early updates are of the size of the learning rate
and mostly arrive; as the learning rate falls, most are lost, which is the cause that the paper names. Its experiments
keep the optimizer's states in 16 bits in every arm; here that is so for bf16-pure only. That rounding of the weights
alone does it is shown by the arm lost-masters of `prove_sacrifices`: states in float32, and 4% worse all the same.
"""
SMALL_GRADIENTS = """\
Setting: each step is a mean over 2**19 tokens, the batch of a large language model, of which the run computes 512, as
one rank or micro-batch does before gradients are summed. Its part of the loss is multiplied by 512 / 2**19, and so are
its gradients; float32 does not mind (the same factor is in AdamW's eps). float16 holds nothing below 2**-24 = 6e-8.
The arm fp16-unscaled-small-mean has no such factor: at this size float16 needs no scaling then.
"""


def lost_updates() -> Experiment:
    config = RunConfig(
        recipe="lost-updates",
        model=GPTConfig(**prove_programs.SHAPE),
        data=prove_programs.DATA,
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=20, final_share=0.1),
        train=TrainConfig(steps=300, batch_size=8, evaluate_batches=16),
    )
    policies = ("float32", "bf16-pure", "bf16-stochastic", "bf16-kahan", "bf16-master")
    return Experiment(
        source=Source.RECIPE,
        target=config.recipe,
        arms=tuple(Arm(name=policy, policy=policy) for policy in policies),
        seeds=SEEDS,
        steps=config.train.steps,
        metrics=(VALIDATION_LOSS, CURVE, DISTANCE),
        recipe_toml=to_toml(config),
    )


def small_gradients() -> Experiment:
    unscaled = "compute=float16, scaling=none"
    return Experiment(
        source=Source.SCRIPT,
        target=f"{Path(prove_programs.__file__).name}:small_gradients",
        arms=(
            Arm(name="float32", policy="float32"),
            Arm(name="fp16-unscaled", policy=unscaled),
            Arm(name="fp16-mixed", policy="fp16-mixed"),
            Arm(name="fp16-unscaled-small-mean", policy=unscaled, settings=(f"mean_over={prove_programs.TOKENS}",)),
        ),
        seeds=SEEDS,
        steps=None,  # the program's own number
        # a share of the gradient's elements, shown beside the verdict
        metrics=(
            VALIDATION_LOSS,
            CURVE,
            Metric(name="underflow", margin=0.01, is_relative=False, is_primary=False),
        ),
    )


def still_weights(experiment: Experiment, arm: Arm, at: tuple[int, ...]) -> list[dict[str, Any]]:
    """Train one run of the arm and return, at some steps, which share of its weights the update did not move.

    Weights that AdamW has no reason to move, because their first moment is 0, do not count.
    """
    config = arm_config(experiment, arm, SEEDS[0])
    trainer = Trainer(config, open_corpus(config.data, block_size=config.model.block_size))
    found = []
    while not trainer.is_finished:
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        record = trainer.update()
        if record.update not in at:
            continue
        still = total = 0
        for parameter, old in zip(trainer.model.parameters(), before, strict=True):
            is_meant = trainer.optimizer.state[parameter]["exp_avg"] != 0
            still += int(((parameter == old) & is_meant).sum())
            total += int(is_meant.sum())
        found.append({"step": record.update, "learning_rate": record.learning_rate, "share": still / total})
    return found


def still_table(pure: list[dict[str, Any]], control: list[dict[str, Any]]) -> str:
    cells = [
        [str(ours["step"]), f"{ours['learning_rate']:.2g}", f"{ours['share']:.1%}", f"{theirs['share']:.1%}"]
        for ours, theirs in zip(pure, control, strict=True)
    ]
    return harness.markdown_table(["step", "learning rate", "bf16-pure", "float32"], cells)


def underflow_table(proof: Proof) -> str:
    rows = []
    for arm in proof.experiment.arms:
        shares = [run.values["underflow"] for run in proof.runs if run.arm == arm.name]
        rows.append([arm.name, f"{sum(shares) / len(shares):.2%}"])
    return harness.markdown_table(["arm", "gradients that are 0 and would not be in float32"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="folder to write a dated record into")
    parser.add_argument("--work", type=Path, help="folder of the runs; the same one goes on where it was stopped")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="prove-findings-"))
    record = args.record and args.record.resolve()
    work = work.resolve()
    os.chdir(Path(__file__).resolve().parent)  # the designs name their program from here
    torch.set_num_threads(1)
    facts = harness.machine()
    first, second = (carry_out(design, work / name) for name, design in (
        ("lost-updates", lost_updates()), ("small-gradients", small_gradients()),
    ))  # fmt: skip
    steps = (10, 75, 150, 225, 300)
    still = {arm.name: still_weights(first.experiment, arm, steps) for arm in first.experiment.arms[:2]}
    tables = {
        "Zamirai et al. 2020, at small scale: lost updates": LOST_UPDATES,
        "Lost updates: verdicts, five seeds, margin 0.5%": verdict_table(first),
        "Lost updates: weights that an update did not move, seed 0": still_table(still["bf16-pure"], still["float32"]),
        "Micikevicius et al. 2018, at small scale: small gradients": SMALL_GRADIENTS,
        "Small gradients: verdicts, five seeds, margin 0.5%": verdict_table(second),
        "Small gradients: at the end of each run, mean over seeds": underflow_table(second),
    }
    for title, table in tables.items():
        print(f"\n{title}\n\n{table}")
    if record:
        results = {"lost_updates": as_record(first), "weights_not_moved": still, "small_gradients": as_record(second)}
        print(harness.write_record(record, "prove_findings", tables, results, facts))


if __name__ == "__main__":
    main()
