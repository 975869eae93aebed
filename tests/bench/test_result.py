"""What samples allow one to say: on made-up times with known difference and noise."""

import json
import random
import statistics

import pytest

from mezzotint.bench.cases import Case, Op
from mezzotint.bench.compare import compare
from mezzotint.bench.result import (
    BenchResult,
    CaseResult,
    Measurement,
    Roof,
    Verdict,
    from_json,
    judge,
    quartiles,
    to_json,
)
from mezzotint.errors import DataError

CASE = Case(op=Op.MATMUL, shape=(100, 200, 300))


def made_up(true_ratio: float, noise: float, *, rounds: int = 15, seed: int = 0, drift: float = 0.0) -> CaseResult:
    """Return a case whose bfloat16 truly takes `true_ratio` of float32's time, every sample off by up to `noise`."""
    rng = random.Random(seed)

    def sample(mean: float, index: int) -> float:
        return mean * (1 + drift * index) * (1 + noise * rng.uniform(-1, 1))

    times: dict[str, list[float]] = {"float32": [], "bfloat16": [], "again": []}
    for index in range(rounds):
        for name, mean in (("float32", 1e-3), ("bfloat16", true_ratio * 1e-3), ("again", 1e-3)):
            times[name].append(sample(mean, index))
    measurements = tuple(
        Measurement(case=CASE, format=name, kernels="torch", seconds=tuple(times[name]))
        for name in ("float32", "bfloat16")
    )
    return CaseResult(case=CASE, measurements=measurements, again=tuple(times["again"]))


def verdict_of(found: CaseResult) -> Verdict:
    ratio = found.ratio(found.measurements[1])
    assert ratio is not None
    return ratio.verdict


def run_of(found: CaseResult, **facts: object) -> BenchResult:
    roofs = (Roof(format="", value=3e10, source="published"), Roof(format="float32", value=1e12, source="published"))
    return BenchResult(device="cpu", name="a processor", facts={"torch": "2", **facts}, roofs=roofs, cases=(found,))


def test_clear_differences_are_found_and_none_where_there_is_none() -> None:
    assert verdict_of(made_up(0.5, 0.02)) is Verdict.FASTER
    assert verdict_of(made_up(1.5, 0.02)) is Verdict.SLOWER
    assert verdict_of(made_up(1.0, 0.01)) is Verdict.EVEN


def test_a_noisy_machine_is_not_believed() -> None:
    assert verdict_of(made_up(0.8, 0.6)) is Verdict.UNCLEAR
    assert verdict_of(made_up(1.2, 0.6)) is Verdict.UNCLEAR
    assert run_of(made_up(1.0, 0.6)).noisy == (CASE,)
    assert run_of(made_up(1.0, 0.02)).noisy == ()


def test_a_factor_of_thirty_is_beyond_any_noise() -> None:
    assert verdict_of(made_up(30, 0.4)) is Verdict.SLOWER


def test_equal_calls_are_rarely_called_different() -> None:
    """200 simulated machines of every noise below 30 percent: at most 5 percent false verdicts."""
    rng = random.Random(1)
    verdicts = [verdict_of(made_up(1.0, rng.uniform(0, 0.3), seed=seed)) for seed in range(200)]
    assert sum(v in (Verdict.FASTER, Verdict.SLOWER) for v in verdicts) <= 10


def test_a_drifting_clock_does_not_move_the_ratio() -> None:
    found = made_up(0.5, 0.01, drift=0.2)
    ratio = found.ratio(found.measurements[1])
    assert ratio is not None
    assert ratio.median == pytest.approx(0.5, rel=0.03)


def test_too_few_rounds_say_nothing() -> None:
    assert made_up(0.5, 0.01, rounds=3).noise is None
    assert verdict_of(made_up(0.5, 0.01, rounds=3)) is Verdict.UNCLEAR
    assert judge(0.4, 0.4, 0.01, 1) is Verdict.UNCLEAR


def test_speeds_follow_from_the_median() -> None:
    m = Measurement(case=CASE, format="float32", kernels="torch", seconds=(1.0, 2.0, 4.0))
    assert m.flops_per_second == CASE.flops / 2.0
    assert m.bytes_per_second == CASE.bytes_moved("float32") / 2.0
    values = [0.3, 0.1, 0.7, 0.2, 0.5]
    assert quartiles(values) == (statistics.quantiles(values, n=4, method="inclusive")[0], 0.5)
    assert quartiles([2.0]) == (2.0, 2.0)
    assert Measurement(case=CASE, format="float16", kernels="mezzotint", seconds=(1.0,)).label == "float16 (mezzotint)"


def test_json_holds_everything() -> None:
    result = run_of(made_up(0.5, 0.02))
    text = json.dumps({"schema": "mezzotint.bench/1", **to_json(result)})
    again = from_json(json.loads(text), "x")
    assert again == result
    row = json.loads(text)["cases"][0]["measurements"][0]
    assert row["share_of_peak"] == pytest.approx(row["flops_per_second"] / 1e12)


@pytest.mark.parametrize("payload", [[], {}, {"schema": "mezzotint.bench/2"}, "text", None])
def test_other_json_is_refused(payload: object) -> None:
    with pytest.raises(DataError, match=r"run\.json is no result of `mezzotint bench --json`"):
        from_json(payload, "run.json")


@pytest.mark.parametrize("key", ["device", "roofs", "cases", "facts"])
def test_damaged_json_is_named(key: str) -> None:
    payload = {"schema": "mezzotint.bench/1", **to_json(run_of(made_up(1, 0.1)))}
    del payload[key]
    with pytest.raises(DataError, match=r"run\.json is damaged: KeyError"):
        from_json(payload, "run.json")


def test_comparison_finds_what_changed() -> None:
    before, after = made_up(1.0, 0.01), made_up(0.5, 0.01, seed=5)
    found = compare(run_of(before, threads=2), run_of(after, threads=4))
    assert [(c.label, c.verdict) for c in found.changes] == [("float32", Verdict.EVEN), ("bfloat16", Verdict.FASTER)]
    assert found.changes[1].ratio == pytest.approx(0.5, rel=0.05)
    assert found.differing_facts == (("threads", "2", "4"),)
    noisy = compare(run_of(made_up(1.0, 0.5)), run_of(made_up(0.8, 0.5, seed=3)))
    assert {c.verdict for c in noisy.changes} == {Verdict.UNCLEAR}


def test_comparison_names_what_only_one_has() -> None:
    one = made_up(1.0, 0.01)
    other = CaseResult(case=CASE, measurements=one.measurements[:1], again=one.again)
    found = compare(run_of(one), run_of(other))
    assert found.only_before == ("matmul 100x200x300 bfloat16",)
    assert found.only_after == ()
