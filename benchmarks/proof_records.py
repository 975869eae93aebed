"""What the benchmarks of `mezzotint prove` share: experiments carried out by the product, verdicts as tables.

An experiment is carried out in a folder of its own, so that a benchmark that was stopped goes on where it was.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import markdown_table
from mezzotint.parity.design import Experiment
from mezzotint.parity.result import ArmResult, MetricResult, Proof, Run, Verdict
from mezzotint.parity.spelling import spell_difference
from mezzotint.proving.runner import run_proof, start_proof
from mezzotint.proving.store import ProofFolder


class Lines:
    """A line on the terminal for each seed."""

    def seed_begins(self, seed: int, place: int, num_seeds: int) -> None:
        print(f"seed {seed}, {place} of at most {num_seeds}", flush=True)

    def stepped(self, arm: str, step: int, loss: float) -> None:
        pass

    def seed_ended(self, runs: Sequence[Run], results: Sequence[ArmResult]) -> None:
        print("   ", ", ".join(f"{result.arm} {result.verdict}" for result in results), flush=True)

    def note(self, text: str) -> None:
        print(text)


def carry_out(experiment: Experiment, path: Path) -> Proof:
    """Run what is missing of the experiment in `path`, and return its proof."""
    folder = ProofFolder.open(path) if path.exists() else start_proof(path, experiment, "benchmarks")
    if folder.experiment != experiment:
        raise SystemExit(f"{path} holds another design; remove it")
    return run_proof(folder, Lines())


def verdict_table(proof: Proof) -> str:
    """One row for each treatment: its verdict, and each metric's difference with the interval that was read."""
    metrics = proof.experiment.metrics
    header = ["arm", "verdict", *(f"{one.name}{'' if one.is_primary else ' (shown only)'}" for one in metrics)]
    rows, others = [], []
    for result in proof.results:
        found = {one.name: one for one in result.metrics}
        cells = [_cell(found[one.name]) if one.name in found else "" for one in metrics]
        rows.append([result.arm, f"**{result.verdict}**", *cells])
        of_metrics = {one.reason for one in result.metrics}
        others += [f"- {reason}" for reason in result.reasons if reason not in of_metrics]
    return markdown_table(header, rows) + "".join(f"\n{line}" for line in dict.fromkeys(others)) + "\n" * bool(others)


def _cell(metric: MetricResult) -> str:
    shown = metric.interval if metric.verdict is Verdict.EQUIVALENT else metric.wide
    if shown is None:
        return str(metric.verdict)
    mean, low, high = (
        spell_difference(value, metric.margin, is_relative=metric.is_relative)
        for value in (shown.mean, shown.low, shown.high)
    )
    return f"{metric.verdict}: {mean} [{low}, {high}]"


def as_record(proof: Proof) -> dict[str, Any]:
    """The proof without the curves, of which the first and the last loss are kept."""
    data = proof.to_json()
    for run in data["runs"]:
        losses = run.pop("losses")
        run.update(num_steps=len(losses), first_loss=losses[0] if losses else None, last_loss=losses[-1:])
        for name in ("seconds", "baseline_seconds"):
            run.pop(name)
    return data
