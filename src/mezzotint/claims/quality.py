"""Claims on what training reaches: from a proof, paired runs with an equivalence test, of a small language model."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.claims.claim import Answer, Basis, Claim, Family, Figures, Verdict
from mezzotint.parity.spelling import spell_difference

if TYPE_CHECKING:
    from mezzotint.parity.result import ArmResult, Proof, Run

ARMS = ("float32", "bf16-mixed", "fp16-mixed", "bf16-pure", "bf16-stochastic")
SEEDS, STEPS = 5, 300
# the learning rate falls to a tenth, so that late updates are small enough to be lost in bfloat16 weights
SETTINGS = (
    "model.num_layers=2", "model.num_heads=2", "model.dim=64", "model.ffn_dim=160", "model.block_size=64",
    "train.batch_size=8", "train.evaluate_batches=16", "optimizer.learning_rate=1e-3", "data.max_bytes=4000000",
    "schedule.warmup_steps=20", "schedule.final_share=0.1",
)  # fmt: skip
COMMAND = " ".join(
    [
        "mezzotint prove tiny-1m",
        *(f"--arm {arm}" for arm in ARMS),
        f"--seeds {SEEDS} --steps {STEPS}",
        *(f"--set {setting}" for setting in SETTINGS),
    ]
)


class _Silent:
    """Watches a proof and says nothing."""

    def seed_begins(self, seed: int, place: int, num_seeds: int) -> None:
        """Say nothing."""

    def stepped(self, arm: str, step: int, loss: float) -> None:
        """Say nothing."""

    def seed_ended(self, runs: "Sequence[Run]", results: "Sequence[ArmResult]") -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


def small_proof() -> "Proof":
    """Train a model of 0.1M parameters in pairs and return the proof."""
    from mezzotint.proving.runner import run_proof, start_proof
    from mezzotint.proving.targets import experiment_for

    experiment = experiment_for("tiny-1m", arms=ARMS, seeds=SEEDS, steps=STEPS, settings=SETTINGS)
    with tempfile.TemporaryDirectory() as folder:
        return run_proof(start_proof(Path(folder) / "proof", experiment, COMMAND), _Silent())


def proof_figures(proof: Mapping[str, Any]) -> Figures:
    """Return what claims need of a proof's JSON: each arm's verdict, and its first metric's difference."""
    found: dict[str, Any] = {}
    for result in proof["results"]:
        metric = next((one for one in result["metrics"] if one["is_primary"]), None)
        shown = metric and metric["interval" if metric["verdict"] == "equivalent" else "wide"]
        if metric and shown:
            found[result["arm"]] = {
                "verdict": str(result["verdict"]),
                "metric": metric["name"].replace("_", " "),
                "margin": metric["margin"],
                "pairs": metric["num_pairs"],
                **{key: round(shown[key], 6) for key in ("low", "mean", "high", "level")},
            }
    return found


def _said(arm: Mapping[str, Any]) -> str:
    low, high = (spell_difference(arm[key], arm["margin"], is_relative=True) for key in ("low", "high"))
    return f"{arm['verdict']} ({low} to {high})"


def _context(found: Figures) -> str:
    first = next(iter(found.values()))
    return f"a model of 0.1M parameters, {first['metric']} against float32's over {first['pairs']} pairs"


def _judge_no_loss(found: Figures) -> Answer:
    is_kept = found["bf16-mixed"]["verdict"] in ("equivalent", "identical", "better")
    return Answer(
        verdict=Verdict.CONDITIONAL if is_kept else Verdict.FALSE,
        condition=f"{found['bf16-mixed']['margin']:.1%} of the loss counts as none" if is_kept else "",
        figure=f"{_context(found)}: bf16-mixed {_said(found['bf16-mixed'])}, fp16-mixed {_said(found['fp16-mixed'])}",
    )


def _judge_worse(found: Figures) -> Answer:
    is_mixed_worse = found["bf16-mixed"]["verdict"] == "worse"
    is_pure_worse = found["bf16-pure"]["verdict"] == "worse"
    is_partly = is_pure_worse and not is_mixed_worse
    return Answer(
        verdict=Verdict.CONDITIONAL if is_partly else Verdict.TRUE if is_mixed_worse else Verdict.FALSE,
        condition="the weights are bfloat16 too and rounded to nearest" if is_partly else "",
        figure=f"{_context(found)}: bf16-mixed {_said(found['bf16-mixed'])}, bf16-pure {_said(found['bf16-pure'])}, "
        f"bf16-stochastic {_said(found['bf16-stochastic'])}",
    )


def _measure() -> Figures:
    return proof_figures(small_proof().to_json())


QUALITY = (
    Claim(
        name="no-quality-loss",
        family=Family.TUTORIAL,
        text="Mixed precision loses no quality that could be measured",
        where="tutorials; arXiv 1710.03740",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.MEASURED,
        command="mezzotint prove",
        measure=_measure,
        judge=_judge_no_loss,
        seconds=180,
    ),
    Claim(
        name="bfloat16-trains-worse",
        family=Family.INTERNET,
        text="bfloat16 is less accurate, so training gets worse",
        where="https://github.com/facebookresearch/dinov3/issues/181",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.MEASURED,
        command="mezzotint prove --arm float32 --arm bf16-mixed --arm bf16-pure",
        measure=_measure,
        judge=_judge_worse,
        seconds=180,
    ),
)
