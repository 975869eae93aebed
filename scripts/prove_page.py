"""Parts of docs/prove.md: error rates of the verdicts, by simulation with the product's own tests, and findings."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.parity.design import Better, Metric
from mezzotint.parity.levels import nominal_level
from mezzotint.parity.metric_verdict import Levels, decide
from mezzotint.parity.result import Verdict
from mezzotint.parity.spelling import spell_difference

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
FINDINGS = {
    "lost_updates": "bfloat16 weights lose small updates; stochastic rounding and Kahan repair it (arXiv 2010.06192)",
    "small_gradients": "float16 loses small gradients; loss scaling repairs it (arXiv 1710.03740)",
}

TRIALS = 10_000
ALPHA = 0.05
PAIRS = (3, 5, 10)
METRIC = Metric(name="difference", margin=1.0, is_relative=False, better=Better.LOWER)
LEVELS = Levels(equivalence=ALPHA, difference=ALPHA)
LOOKS = (3, 12)


def share(samples: np.ndarray, *wanted: Verdict) -> float:
    return sum(decide(sample, METRIC, LEVELS).verdict in wanted for sample in samples.tolist()) / len(samples)


def error_rates() -> str:
    """Return the table: differences are drawn anew for each experiment, the margin is 1."""
    rows = [
        '| pairs | false "equivalent": the truth is at the margin | the same, skewed differences | false "worse" or '
        '"better": there is no difference | "equivalent" where there is no difference |',
        "|---|---|---|---|---|",
    ]
    for pairs in PAIRS:
        generator = np.random.default_rng(pairs)
        size = (TRIALS, pairs)
        rates = (
            share(1 + generator.normal(0, 0.02, size), Verdict.EQUIVALENT),
            share(1 + 0.02 * (generator.exponential(1, size) - 1), Verdict.EQUIVALENT),
            share(generator.normal(0, 100, size), Verdict.WORSE, Verdict.BETTER),
            share(generator.normal(0, 0.4, size), Verdict.EQUIVALENT),
        )
        rows.append(f"| {pairs} | {' | '.join(f'{rate:.1%}' for rate in rates)} |")
    looks = tuple(range(LOOKS[0], LOOKS[1] + 1))
    level = nominal_level(looks, ALPHA, is_two_sided=False)
    return "\n".join(
        [
            f"Of {TRIALS:,} simulated experiments each, alpha {ALPHA:g}:",
            "",
            *rows,
            "",
            'Where the spread of pairs is far below the margin, the chance of a false "equivalent" is alpha itself, as in the',
            "second column; with more spread it is smaller. The third column has differences that are mostly small and now and",
            "then large (exponential): few pairs miss the large ones, and the rate rises. In the last, pairs spread by 0.4 margins.",
            f"With {LOOKS[0]} to {LOOKS[1]} seeds added one by one, each look uses {level:.2%} instead of {ALPHA:.0%}, and all together err in "
            f"{ALPHA:.0%};",
            "`tests/parity/test_error_rates.py` asserts all of this, coverage of the intervals included.",
        ]
    )


def findings() -> str:
    """Return the verdicts on two published findings, reproduced at small scale, from the newest record."""
    path = max(RECORDS.glob("prove_findings-*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        "| finding | arm against float32 | verdict | validation loss, difference |",
        "|---|---|---|---|",
    ]
    for key, title in FINDINGS.items():
        lines += [
            f"| {title if not index else ''} | {result['arm']} | {result['verdict']} | {difference(result)} |"
            for index, result in enumerate(record["results"][key]["results"])
        ]
    machine = record["machine"]
    return "\n".join(
        [
            *lines,
            "",
            f"({machine['cpu']}, torch {machine['torch']}, {record['date']}; "
            f"`{path.relative_to(ROOT).with_suffix('.md')}` has the mechanism beside it)",
        ]
    )


def sacrifices() -> str:
    """Return what became of mistakes that were planted on purpose, by losses alone and by probes."""
    path = max(RECORDS.glob("prove_sacrifices-*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    by_losses = {result["arm"]: result["verdict"] for result in record["results"]["by_losses"]}
    lines = [
        "| arm against float32 | by losses alone | distance moved | gradient error, beyond | log-probabilities, beyond |",
        "|---|---|---|---|---|",
    ]
    for result in record["results"]["sacrifices"]["results"]:
        found = {metric["name"]: metric for metric in result["metrics"]}
        probes = [
            f"{found[name]['wide']['mean']:{spelling}}" if name in found else "-"
            for name, spelling in (("distance", "+z.1%"), ("gradient_error", "+z.4f"), ("log_prob_error", "+z.4f"))
        ]
        lines.append(f"| {result['arm']} | {by_losses[result['arm']]} | {' | '.join(probes)} |")
    return "\n".join([*lines, "", f"({record['date']}; `{path.relative_to(ROOT).with_suffix('.md')}`)"])


def difference(result: dict[str, Any]) -> str:
    """Return the difference of the validation loss with the interval that its verdict was read from."""
    metric = next((one for one in result["metrics"] if one["name"] == "validation_loss"), None)
    if metric is None:
        return ". ".join(result["reasons"][:1])
    shown = metric["interval" if metric["verdict"] == "equivalent" else "wide"]
    mean, low, high = (
        spell_difference(shown[key], metric["margin"], is_relative=metric["is_relative"])
        for key in ("mean", "low", "high")
    )
    return f"{mean} [{low}, {high}]"
