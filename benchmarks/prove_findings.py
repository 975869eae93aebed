"""Two published findings, reproduced at small scale by `mezzotint prove`, with the mechanism beside the verdict.

    python benchmarks/prove_findings.py --record benchmarks/records

1. Weights in bfloat16 under plain AdamW end worse than float32, because small updates round away; stochastic rounding
   and Kahan summation repair it (Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv 2010.06192).
2. float16 without loss scaling loses small gradients; scaling repairs it (Micikevicius et al. 2018, "Mixed Precision
   Training", arXiv 1710.03740).

These are reproductions of the effect and of its cause, not of the papers' figures: a language model of 0.12M
parameters learns bytes for 200 to 300 steps. Settings were chosen with seeds above 100; the designs below, their seeds
and margins were fixed before they ran.
"""

import argparse
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
from mezzotint.trace.watch import StepWatch
from mezzotint.training.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig, to_toml
from mezzotint.training.trainer import Trainer
from proof_records import as_record, carry_out, verdict_table

SEEDS = (0, 1, 2, 3, 4)

LOST_UPDATES = """\
Setting: AdamW at 1e-3, a cosine to a tenth of it. Weights are drawn with a deviation of 0.02, where bfloat16 numbers
are 2**-13 apart: an update below half of that, 6e-5, rounds away. Early updates are of the size of the learning rate
and mostly arrive; as the learning rate falls, most are lost, which is the cause that the paper names. Its experiments
keep the optimizer's states in 16 bits in every arm; here that is so for bf16-pure only.
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


def watched_updates(experiment: Experiment, arm: Arm, at: tuple[int, ...]) -> list[dict[str, Any]]:
    """Train one run of the arm and return, at some steps, which share of its updates rounding threw away."""
    from mezzotint.proving.recipe_run import arm_config

    config = arm_config(experiment, arm, SEEDS[0])
    trainer = Trainer(config, open_corpus(config.data, block_size=config.model.block_size))
    watch, found = StepWatch(), []
    while not trainer.is_finished:
        step = trainer.num_updates + 1
        if step not in at:
            trainer.update()
            continue
        watch.begin(trainer.optimizer)
        record = trainer.update()
        row = watch.end(step)
        assert row is not None
        found.append({"step": step, "learning_rate": record.learning_rate, **row["updates"]})
    return found


def lost_table(rows: list[dict[str, Any]]) -> str:
    cells = [[str(row["step"]), f"{row['learning_rate']:.2g}", f"{row['share_lost']:.1%}"] for row in rows]
    return harness.markdown_table(["step", "learning rate", "updates lost in bf16-pure"], cells)


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
    torch.set_num_threads(1)
    facts = harness.machine()
    first, second = (carry_out(design, work / name) for name, design in (
        ("lost-updates", lost_updates()), ("small-gradients", small_gradients()),
    ))  # fmt: skip
    pure = next(arm for arm in first.experiment.arms if arm.name == "bf16-pure")
    lost = watched_updates(first.experiment, pure, at=(10, 75, 150, 225, 300))
    tables = {
        "Zamirai et al. 2020, at small scale: lost updates": LOST_UPDATES,
        "Verdicts, five seeds, margin 0.5%": verdict_table(first),
        "Mechanism, seed 0": lost_table(lost),
        "Micikevicius et al. 2018, at small scale: small gradients": SMALL_GRADIENTS,
        "Verdicts, five seeds, margin 0.5% ": verdict_table(second),
        "Mechanism, at the end of each run, mean over seeds": underflow_table(second),
    }
    for title, table in tables.items():
        print(f"\n{title.strip()}\n\n{table}")
    if args.record:
        results = {"lost_updates": as_record(first), "mechanism": lost, "small_gradients": as_record(second)}
        print(harness.write_record(args.record, "prove_findings", tables, results, facts))


if __name__ == "__main__":
    main()
