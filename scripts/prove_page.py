"""Parts of docs/prove.md: error rates of the verdicts, by simulation with the product's own tests."""

import numpy as np

from mezzotint.parity.design import Better, Metric
from mezzotint.parity.levels import nominal_level
from mezzotint.parity.metric_verdict import Levels, decide
from mezzotint.parity.result import Verdict

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
