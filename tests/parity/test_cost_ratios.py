"""Costs: ratios of times, tokens and memory, with intervals."""

import math
import random

import pytest
from made_runs import CONTROL, LOSS, TREATMENT, design, run

from mezzotint.parity.costs import WARMUP_STEPS
from mezzotint.parity.result import Cost, Run
from mezzotint.parity.stats import critical_t
from mezzotint.parity.verdict import judge

STEPS = 20


def costs(runs: list[Run], seeds: int) -> dict[str, Cost]:
    return {cost.name: cost for cost in judge(design(seeds=range(max(seeds, 2))), runs)[0].costs}


def turns(factor: float, seed: int, **fields) -> list[Run]:
    """A pair whose steps took turns on a machine that slows down by a factor of 3 on the way."""
    drift = [1 + 2 * step / (STEPS - 1) for step in range(STEPS)]
    warmup = [50.0] * WARMUP_STEPS
    baseline = (*warmup, *drift[WARMUP_STEPS:])
    ours = (*(9 * x for x in warmup), *(factor * x for x in drift[WARMUP_STEPS:]))
    return [
        run(CONTROL, seed, {LOSS.name: 2.5}, seconds=baseline, **fields),
        run(TREATMENT, seed, {LOSS.name: 2.5}, seconds=ours, baseline_seconds=baseline, **fields),
    ]


def test_time_is_compared_step_by_step_after_the_warmup() -> None:
    found = costs([one for seed in range(3) for one in turns(0.5, seed)], 3)["step_time"]
    assert (found.ratio.low, found.ratio.mean, found.ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    assert found.treatment == pytest.approx(found.control / 2)


def test_the_interval_is_of_the_logarithms_over_seeds() -> None:
    factors = [0.5, 0.6, 0.55]
    found = costs([one for seed, factor in enumerate(factors) for one in turns(factor, seed)], 3)["step_time"]
    logs = [math.log(factor) for factor in factors]
    mean = sum(logs) / 3
    half = critical_t(0.95, 2) * math.sqrt(sum((x - mean) ** 2 for x in logs) / 2 / 3)
    assert (found.ratio.low, found.ratio.high) == pytest.approx((math.exp(mean - half), math.exp(mean + half)))
    assert found.ratio.level == 0.95


def test_one_seed_has_the_interval_of_the_median_of_its_steps() -> None:
    chance = random.Random(0)
    hits = 0
    for _ in range(400):
        seconds = tuple(chance.lognormvariate(0, 0.3) for _ in range(30 + WARMUP_STEPS))
        pair = [
            run(CONTROL, 0, {LOSS.name: 2.5}, seconds=(1.0,) * len(seconds)),
            run(TREATMENT, 0, {LOSS.name: 2.5}, seconds=seconds, baseline_seconds=(1.0,) * len(seconds)),
        ]
        ratio = costs(pair, 1)["step_time"].ratio
        hits += ratio.low <= 1.0 <= ratio.high  # the true median
    # at least 0.95 of them (order statistics are conservative), less four binomial deviations
    assert hits / 400 >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 400)
    assert hits < 400


def test_tokens_per_second_turn_the_time_ratio_round() -> None:
    found = costs([one for seed in range(3) for one in turns([0.5, 0.6, 0.55][seed], seed, tokens_per_step=64)], 3)
    time, tokens = found["step_time"], found["tokens_per_second"]
    assert (tokens.ratio.low, tokens.ratio.mean, tokens.ratio.high) == pytest.approx(
        (1 / time.ratio.high, 1 / time.ratio.mean, 1 / time.ratio.low)
    )
    assert tokens.control == pytest.approx(64 / time.control)


def test_runs_that_computed_beside_others_are_not_timed() -> None:
    runs = [*turns(0.5, 0), *turns(0.5, 1), *turns(7.0, 2, is_traded_off=True)]
    assert costs(runs, 3)["step_time"].ratio.high == pytest.approx(0.5)
    assert "step_time" not in costs(turns(0.5, 0, is_traded_off=True), 1)


def test_without_turns_medians_are_compared() -> None:
    pair = [
        run(CONTROL, 0, {LOSS.name: 2.5}, seconds=(9.0, 9.0, 9.0, 2.0, 2.0, 4.0)),
        run(TREATMENT, 0, {LOSS.name: 2.5}, seconds=(9.0, 9.0, 9.0, 1.0, 1.0, 9.0)),
    ]
    assert costs(pair, 1)["step_time"].ratio.mean == 0.5
    assert costs([run(arm, 0, {}, seconds=(2.0,)) for arm in (CONTROL, TREATMENT)], 1)["step_time"].ratio.mean == 1


def test_memory_by_class_and_per_parameter() -> None:
    classes = {
        CONTROL: {"weights": 400, "masters": 0, "states": 800, "gradients": 400, "peak": 3000},
        TREATMENT: {"weights": 200, "masters": 400, "states": 800, "gradients": 200, "peak": 2400},
    }
    runs = [
        run(arm, seed, {LOSS.name: 2.5}, memory_bytes=classes[arm], num_parameters=100)
        for seed in range(3)
        for arm in classes
    ]
    found = costs(runs, 3)
    assert found["weights_memory"].ratio.mean == pytest.approx(0.5)
    assert found["peak_memory"].ratio.low == found["peak_memory"].ratio.high == pytest.approx(0.8)
    assert "masters_memory" not in found  # the control has none, and a ratio to nothing is none
    per_parameter = found["state_per_parameter"]
    assert (per_parameter.control, per_parameter.treatment) == (12.0, 14.0)


def test_nothing_measured_has_no_costs() -> None:
    assert costs([run(arm, seed, {LOSS.name: 2.5}) for seed in range(3) for arm in (CONTROL, TREATMENT)], 3) == {}
