"""What the verdicts of `mezzotint prove` catch: sacrifices planted one by one, and what is no sacrifice.

    python benchmarks/prove_sacrifices.py --record benchmarks/records

Each arm of `prove_programs.planted` has one thing wrong. The same runs are judged by two designs: by losses alone,
which is what training curves show, and by losses, distance travelled and two probes against float64 besides. The two
tables side by side say which sacrifice shows in a loss at this scale, and which only in the probes. Healthy arms are
in both: float32 with other seeds has to be equivalent, and so has bf16-mixed by its losses.

Plants were made and margins chosen with seeds above 100; the designs were fixed before they ran.
"""

import argparse
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import harness
import prove_programs
from mezzotint.parity.design import CURVE, DISTANCE, VALIDATION_LOSS, Arm, Experiment, Metric, Source
from mezzotint.parity.result import Proof
from mezzotint.parity.verdict import judge
from proof_records import as_record, carry_out, verdict_table

WORDS = """\
Each arm is float32 with one thing wrong, bf16-mixed, bf16-master and lost-masters apart, which are those policies. A
verdict by losses says whether training came out as well; one by the probes says whether the arithmetic is that of
float32, which bf16-mixed is not and does not claim to be.
"""

LOSSES = (VALIDATION_LOSS, CURVE)
# Against float64, float32 errs by 3e-7 in the gradient and 1e-7 in log-probabilities; the margins are a hundred times
# that, and a hundredth of what bf16-mixed takes.
PROBES = (
    replace(DISTANCE, is_primary=True),
    Metric(name="gradient_error", margin=3e-5, is_relative=False),
    Metric(name="log_prob_error", margin=1e-5, is_relative=False),
)


def _arm(name: str, policy: str = "float32", plant: str = "") -> Arm:
    return Arm(name=name, policy=policy, settings=(f"plant={plant}",) if plant else ())


def _planted(*arms: Arm, seeds: tuple[int, ...], metrics: tuple[Metric, ...], max_seeds: int = 0) -> Experiment:
    return Experiment(
        source=Source.SCRIPT,
        target=f"{Path(prove_programs.__file__).name}:planted",
        arms=arms,
        seeds=seeds,
        steps=None,  # the program's own number
        metrics=metrics,
        max_seeds=max_seeds,
    )


def sacrifices() -> Experiment:
    return _planted(
        _arm("float32"),
        _arm("bf16-mixed", "bf16-mixed"),
        _arm("bf16-master", "bf16-master"),
        _arm("log-softmax-bf16", plant="log-softmax-bf16"),
        _arm("rms-norm-fp16", plant="rms-norm-fp16"),
        _arm("rms-norm-fp16-written-out", plant="rms-norm-fp16-written-out"),
        _arm("rotary-bf16", plant="rotary-bf16"),
        _arm("lost-masters", "bf16-master", "lost-masters"),
        _arm("learning-rate-2-percent-off", plant="learning-rate"),
        _arm("no-training", plant="no-training"),
        seeds=(0, 1, 2, 3, 4),
        metrics=(*LOSSES, *PROBES),
    )


def other_seeds() -> Experiment:
    """Pairs that share nothing: the spread is that of training itself, some 2 % here, and so is the margin."""
    metrics = tuple(replace(metric, margin=0.02) for metric in LOSSES)
    control, treatment = _arm("float32"), _arm("float32-other-seeds", plant="other-seeds")
    return _planted(control, treatment, seeds=(0, 1, 2, 3, 4, 5), max_seeds=24, metrics=metrics)


def idle_control() -> Experiment:
    """A control that does not train: a treatment that does not train either agrees with it perfectly."""
    control, treatment = _arm("idle", plant="no-training"), _arm("idle-bf16", "bf16-mixed", "no-training")
    return _planted(control, treatment, seeds=(0, 1, 2), metrics=LOSSES)


def by_losses(proof: Proof) -> Proof:
    """The same runs, judged as if only losses had been asked for."""
    experiment = proof.experiment.replace(metrics=LOSSES)
    return replace(proof, experiment=experiment, results=judge(experiment, proof.runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, help="folder to write a dated record into")
    parser.add_argument("--work", type=Path, help="folder of the runs; the same one goes on where it was stopped")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="prove-sacrifices-"))
    record = args.record and args.record.resolve()
    work = work.resolve()
    os.chdir(Path(__file__).resolve().parent)  # the designs name their program from here
    torch.set_num_threads(1)
    facts = harness.machine()
    proofs = {
        design.__name__: carry_out(design(), work / design.__name__)
        for design in (sacrifices, idle_control, other_seeds)
    }
    planted, apart = proofs["sacrifices"], proofs["other_seeds"]
    looks = f"{apart.num_looks} look{'s' * (apart.num_looks != 1)} from 6 pairs on"
    tables = {
        "What is compared": WORDS,
        "By losses alone, five seeds, margin 0.5%": verdict_table(by_losses(planted)),
        "By losses, distance (1%) and probes against float64, the same runs": verdict_table(planted),
        "A control that does not train": verdict_table(proofs["idle_control"]),
        f"float32 against float32 with other seeds, margin 2%, sequential: {looks}": verdict_table(apart),
    }
    for title, table in tables.items():
        print(f"\n{title}\n\n{table}")
    if record:
        results = {"by_losses": by_losses(planted).to_json()["results"]}
        results |= {name: as_record(proof) for name, proof in proofs.items()}
        print(harness.write_record(record, "prove_sacrifices", tables, results, facts))


if __name__ == "__main__":
    main()
