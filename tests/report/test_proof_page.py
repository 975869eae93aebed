"""The proof's report in a reader's browser, and as text, on proofs of every kind: made by hand, runs apart."""

import json
import math
import random
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from rich.console import Console
from scipy.stats import t as student

from mezzotint.parity.design import CURVE, DISTANCE, VALIDATION_LOSS, Arm, Better, Experiment, Metric, Source
from mezzotint.parity.result import ArmResult, Cost, Interval, MetricResult, Proof, Run, RunStatus, Verdict
from mezzotint.report.page import write_page
from mezzotint.report.proof import PEAK_MEMORY, STEP_TIME, proof_page
from mezzotint.report.proof_text import markdown, print_proof, verdict_lines

HOSTILE = "<img src=x onerror=\"document.title='taken'\"></script><script>document.title='taken'</script>"
USERS = Metric(name="accuracy", margin=0.01, is_relative=False, better=Better.HIGHER)
# the effect on the loss, as a share, that makes a verdict with the margins of half a percent
EFFECTS = {
    Verdict.EQUIVALENT: 0.0005,
    Verdict.WORSE: 0.03,
    Verdict.BETTER: -0.03,
    Verdict.UNDECIDED: 0.004,
    Verdict.IDENTICAL: 0.0,
}


def run_of(arm: str, seed: int, effect: float, steps: int, *, noise: float = 0.001, is_diverged: bool = False) -> Run:
    """A run whose losses follow the seed, and the arm's effect by a little of its own noise."""
    data, own = random.Random(seed), random.Random(f"{arm}{seed}")
    losses = [
        (2.0 + 3.0 * math.exp(-4 * step / steps) + 0.1 * data.gauss(0, 1)) * (1 + effect + noise * own.gauss(0, 1) * bool(effect))
        for step in range(steps)
    ]
    final = mean(losses[-steps // 10 :])
    values = {"validation_loss": final * 1.02, "curve": mean(losses), "distance": 3.1, "accuracy": 0.7 - effect}
    status, message, skipped = RunStatus.FINISHED, "", 0
    if is_diverged:
        losses, values, status = [*losses[: steps // 3], math.nan], {}, RunStatus.DIVERGED
        message, skipped = f"the loss became NaN {HOSTILE}", 3
    return Run(
        arm=arm, seed=seed, status=status, losses=tuple(losses), values=values, message=message, skipped_steps=skipped,
        seconds=tuple(0.3 * (1 - 0.4 * bool(effect)) * (1 + 0.02 * own.random()) for _ in range(min(steps, 20))),
        memory_bytes={
            "weights": 12_329_984, "states": 24_660_088, "gradients": 12_329_984,
            "activations": 199_499_788 if not effect else 124_000_000, "cast_cache": 0 if not effect else 6_100_000,
            "temporaries": 30_000_000, "peak": 255_000_000 if not effect else 181_000_000,
        },
        num_parameters=3_082_496, weights_digest=f"{own.getrandbits(64):016x}",
    )  # fmt: skip


def interval(values: Sequence[float], level: float) -> Interval:
    half = student.ppf((1 + level) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(low=mean(values) - half, mean=mean(values), high=mean(values) + half, level=level)


def metric_of(metric: Metric, pairs: Sequence[tuple[Run, Run]], verdict: Verdict) -> MetricResult:
    have = [(one.values[metric.name], two.values[metric.name]) for one, two in pairs if metric.name in two.values]
    differences = tuple(two / one - 1 if metric.is_relative else two - one for one, two in have)
    return MetricResult(
        name=metric.name,
        num_pairs=len(have),
        control=mean(one for one, _ in have) if have else math.nan,
        treatment=mean(two for _, two in have) if have else math.nan,
        differences=differences,
        interval=interval(differences, 0.9) if len(differences) > 1 else None,
        wide=interval(differences, 0.95) if len(differences) > 1 else None,
        margin=metric.margin,
        is_relative=metric.is_relative,
        is_primary=metric.is_primary,
        verdict=verdict,
        reason=f"because {HOSTILE}",
        seeds_needed=12 if verdict is Verdict.UNDECIDED else None,
    )


def proof_of(
    verdicts: Sequence[Verdict],
    *,
    seeds: int = 4,
    steps: int = 120,
    has_costs: bool = True,
    metrics: tuple[Metric, ...] = (VALIDATION_LOSS, CURVE, USERS, DISTANCE),
    num_diverged: int = 0,
    name: str = "bf16-mixed",
) -> Proof:
    names = [name if not index else f"{name}-{index}" for index in range(len(verdicts))]
    experiment = Experiment(
        source=Source.SCRIPT,
        target=f"train.py:make_run {HOSTILE}",
        arms=(Arm(name="float32", policy="float32"), *(Arm(name=one, policy="bf16-mixed", settings=(HOSTILE,)) for one in names)),
        seeds=tuple(range(seeds)),
        steps=steps,
        metrics=metrics,
        max_seeds=2 * seeds,
        recipe_toml=f"[train]\nsteps = 3 # {HOSTILE}",
    )
    runs = [run_of("float32", seed, 0.0, steps) for seed in range(seeds)]
    results = []
    for one, verdict in zip(names, verdicts, strict=True):
        own = [
            run_of(
                one, seed, EFFECTS.get(verdict, 0.0), steps,
                noise=0.01 if verdict is Verdict.UNDECIDED else 0.001, is_diverged=seed < num_diverged,
            )
            for seed in range(seeds)
        ]  # fmt: skip
        pairs = list(zip(runs[:seeds], own, strict=True))
        costs = (
            Cost(name=STEP_TIME, unit="s", control=0.31, treatment=0.19, ratio=Interval(low=0.6, mean=0.61, high=0.63, level=0.95)),
            Cost(name=PEAK_MEMORY, unit="bytes", control=255e6, treatment=181e6, ratio=Interval(low=0.71, mean=0.71, high=0.71, level=0.95)),
        )  # fmt: skip
        results.append(
            ArmResult(
                arm=one,
                verdict=verdict,
                reasons=(f"the reason {HOSTILE}.",),
                metrics=tuple(metric_of(metric, pairs, verdict) for metric in metrics if verdict is not Verdict.INVALID),
                costs=costs if has_costs else (),
                seeds_needed=12 if verdict is Verdict.UNDECIDED else None,
            )
        )
        runs += own
    return Proof(
        experiment=experiment,
        runs=tuple(runs),
        results=tuple(results),
        machine={"cpu": "AMD EPYC", "threads": "2", "torch": f"2.13.0 {HOSTILE}"},
        command=f"mezzotint prove train.py:make_run --out '{HOSTILE}'",
        date="2026-11-28",
        num_looks=2,
        notes=(f"Products take 41% of the step {HOSTILE}.",),
    )
