"""Verdicts on made runs: every verdict, every way for runs to end, values that have no difference, and laws."""

import json
import math
import random
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import ABSOLUTE, ACCURACY, CONTROL, LOSS, TREATMENT, changed, curve, design, paired, run

from mezzotint.parity.design import DISTANCE, Better, Metric
from mezzotint.parity.result import ArmResult, Proof, Run, RunStatus, Verdict
from mezzotint.parity.verdict import is_decided, judge
from mezzotint.report.proof_words import phrase

CONTROLS = [2.50, 2.61, 2.43, 2.55, 2.47]


def with_shares(shares: list[float], metric: Metric = LOSS, **fields) -> ArmResult:
    """The verdict where the treatment's metric differs by these shares of the control's."""
    treatments = [control * (1 + share) for control, share in zip(CONTROLS, shares, strict=False)]
    runs = paired(CONTROLS[: len(shares)], treatments, metric.name)
    return judge(design(metric, seeds=range(len(shares)), **fields), runs)[0]


def everywhere(status: RunStatus, arm: str, seeds: set[int], message: str = ""):
    """A change that ends the runs of `arm` with these seeds otherwise."""

    def change(old: Run) -> Run:
        if old.arm != arm or old.seed not in seeds:
            return old
        losses = (*old.losses[:6], math.nan) if status is RunStatus.DIVERGED else old.losses[:6]
        return replace(old, status=status, losses=losses, values={}, message=message)

    return change


class TestMetrics:
    def test_equivalent(self) -> None:
        found = with_shares([0.001, -0.001, 0.0005, 0.0, -0.0008])
        assert found.verdict is Verdict.EQUIVALENT
        assert found.metrics[0].num_pairs == 5
        assert "within the margin of 0.5%" in found.reasons[0]

    def test_a_small_difference_that_is_certain_is_still_equivalent(self) -> None:
        found = with_shares([0.002, 0.0021, 0.0019, 0.002, 0.0021])
        assert found.metrics[0].wide.low > 0
        assert found.verdict is Verdict.EQUIVALENT

    def test_worse_beyond_the_margin_and_not_shown_to_be_within(self) -> None:
        beyond = with_shares([0.02, 0.021, 0.019, 0.02, 0.022])
        assert beyond.verdict is Verdict.WORSE
        assert "beyond the margin" in beyond.reasons[0]
        between = with_shares([0.003, 0.006, 0.0055, 0.004, 0.005])
        assert between.verdict is Verdict.WORSE
        assert "not shown to be within the margin of 0.5% or beyond it" in between.reasons[0]
        assert not between.metrics[0].is_beyond
        assert beyond.metrics[0].is_beyond

    def test_an_interval_that_begins_beside_0_shows_that_it_does_not_hold_it(self) -> None:
        found = with_shares([0.004702, 0.00785, 0.010998])
        assert 0 < found.metrics[0].wide.low < 0.005 < found.metrics[0].wide.high
        assert found.verdict is Verdict.WORSE
        assert " 0.00%" not in found.reasons[0]
        assert phrase(found, "float32").endswith("is worse than float32, perhaps by less than the margin")
        far = with_shares([0.02, 0.021, 0.019, 0.02, 0.022])
        assert phrase(far, "float32").endswith("is worse than float32")

    def test_better_for_either_direction(self) -> None:
        assert with_shares([-0.02, -0.021, -0.019]).verdict is Verdict.BETTER
        higher = Metric(name="accuracy", margin=0.005, better=Better.HIGHER)
        assert with_shares([0.02, 0.021, 0.019], higher).verdict is Verdict.BETTER
        assert with_shares([-0.02, -0.021, -0.019], higher).verdict is Verdict.WORSE

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_any_departure_of_a_metric_without_direction_is_worse(self, sign: int) -> None:
        neither = Metric(name="distance", margin=0.005, better=Better.NEITHER)
        assert with_shares([sign * share for share in (0.02, 0.021, 0.019)], neither).verdict is Verdict.WORSE

    def test_undecided_with_the_number_of_pairs_that_would_decide(self) -> None:
        found = with_shares([0.01, -0.01, 0.004])
        assert found.verdict is Verdict.UNDECIDED
        assert found.seeds_needed == found.metrics[0].seeds_needed
        assert f"about {found.seeds_needed} pairs would decide" in found.reasons[0]
        assert found.seeds_needed > 3

    def test_identical_is_the_same_bits_and_not_only_the_same_metric(self) -> None:
        same = paired(CONTROLS, CONTROLS, losses=curve(2.7), weights_digest="abc")
        assert judge(design(), same)[0].verdict is Verdict.IDENTICAL
        assert "losses, values and weights" in judge(design(), same)[0].reasons[0]
        without = changed(same, lambda old: replace(old, weights_digest=""))
        assert "losses and values of all 5 pairs" in judge(design(), without)[0].reasons[0]
        for other in ({"weights_digest": "abd"}, {"losses": curve(2.7000001)}):
            almost = changed(same, lambda old, other=other: replace(old, **other) if old.arm != CONTROL else old)
            assert judge(design(), almost)[0].verdict is Verdict.EQUIVALENT

    def test_metrics_together(self) -> None:
        bad, good, fine, unclear = [0.1] * 5, [-0.1] * 5, [0.001, -0.001, 0.0, 0.0, 0.0005], [0.02, -0.02, 0.0, 0.01, 0]
        expected = {
            (Verdict.WORSE): [(bad, good), (bad, unclear), (bad, fine)],
            (Verdict.UNDECIDED): [(unclear, good), (unclear, fine)],
            (Verdict.BETTER): [(good, fine), (good, good)],
            (Verdict.EQUIVALENT): [(fine, fine)],
        }
        first, second = Metric(name="one", margin=0.005), Metric(name="two", margin=0.005)
        for verdict, cases in expected.items():
            for shares in cases:
                runs = []
                for seed, control in enumerate(CONTROLS):
                    ours = {
                        name: control * (1 + share[seed]) for name, share in zip(("one", "two"), shares, strict=True)
                    }
                    runs += [run(CONTROL, seed, {"one": control, "two": control}), run(TREATMENT, seed, ours)]
                assert judge(design(first, second), runs)[0].verdict is verdict
                assert judge(design(second, first), runs)[0].verdict is verdict

    def test_metrics_that_are_not_primary_are_shown_and_do_not_decide(self) -> None:
        runs = [
            run(arm, seed, {LOSS.name: control, "distance": control * (1 + 0.5 * (arm == TREATMENT))})
            for seed, control in enumerate(CONTROLS)
            for arm in (CONTROL, TREATMENT)
        ]
        found = judge(design(LOSS, DISTANCE), runs)[0]
        assert [one.verdict for one in found.metrics] == [Verdict.EQUIVALENT, Verdict.WORSE]
        assert found.verdict is Verdict.EQUIVALENT

    def test_each_of_several_primary_metrics_gets_its_part_of_alpha(self) -> None:
        second = Metric(name="two", margin=0.005)
        runs = [
            run(arm, seed, {LOSS.name: control, "two": control + seed / 1000 * (arm != CONTROL)})
            for seed, control in enumerate(CONTROLS)
            for arm in (CONTROL, TREATMENT)
        ]
        one, two = judge(design(LOSS, second), runs)[0].metrics
        assert one.wide.level == two.wide.level == pytest.approx(0.975)
        assert one.interval.level == pytest.approx(0.9)


class TestEdges:
    def test_equal_differences_without_any_spread(self) -> None:
        for shift, verdict in ((0.0, Verdict.EQUIVALENT), (0.01, Verdict.EQUIVALENT), (0.03, Verdict.WORSE)):
            runs = paired([2.0, 3.0, 4.0], [2.0 + shift, 3.0 + shift, 4.0 + shift])
            assert judge(design(ABSOLUTE, seeds=range(3)), runs)[0].verdict is verdict

    def test_two_pairs(self) -> None:
        # one degree of freedom: the 90 % interval reaches 6.3 standard errors
        assert with_shares([0.0001, -0.0001]).verdict is Verdict.EQUIVALENT
        assert with_shares([0.002, -0.002]).verdict is Verdict.UNDECIDED
        assert with_shares([0.02, 0.0201]).verdict is Verdict.WORSE

    @pytest.mark.parametrize(
        ("controls", "said"),
        [
            ([2.0, 0.0, 2.0], "is 0 in seed 1"),
            ([2.0, 1e-9, 2.0], "1e-09 in seed 1, too near 0 beside 2"),
            ([2.0, -1.5, 2.0], "-1.5 in seed 1 and 2 in seed 0"),
            ([1e-320, 1e-320, 2e-320], "1e-320"),
        ],
    )
    def test_no_share_of_a_control_at_zero(self, controls: list[float], said: str) -> None:
        found = judge(design(seeds=range(3)), paired(controls, [2.1, 2.0, 2.0]))[0]
        assert found.verdict is Verdict.UNDECIDED
        assert said in found.reasons[0]
        assert "absolute margin" in found.reasons[0]
        assert len(found.reasons) == 1
        assert found.metrics[0].differences == ()

    def test_a_metric_that_is_zero_in_both_arms_does_not_differ(self) -> None:
        assert judge(design(seeds=range(3)), paired([0.0] * 3, [0.0] * 3))[0].verdict is Verdict.EQUIVALENT

    def test_shares_of_negative_values_keep_their_direction(self) -> None:
        # log-likelihoods: -2.1 is lower than -2.0, so it is better where lower is better
        lower = judge(design(seeds=range(3)), paired([-2.0, -2.0, -2.1], [-2.2, -2.21, -2.3]))[0]
        assert lower.verdict is Verdict.BETTER

    def test_huge_values(self) -> None:
        found = judge(design(seeds=range(3)), paired([1e300, 2e300, 1.5e300], [1.2e300, 2.41e300, 1.81e300]))[0]
        assert found.verdict is Verdict.WORSE
        absolute = judge(design(ABSOLUTE, seeds=range(3)), paired([0.1, 0.2, 0.15], [1e300, 2e300, 1.5e300]))[0]
        assert absolute.verdict in (Verdict.WORSE, Verdict.UNDECIDED)
        json.dumps([one.differences for one in absolute.metrics], allow_nan=False)

    def test_a_metric_that_the_control_lacks_in_some_runs(self) -> None:
        runs = changed(paired(CONTROLS, CONTROLS), lambda old: replace(old, values={}) if old.seed == 2 else old)
        found = judge(design(), runs)[0]
        assert found.verdict is Verdict.EQUIVALENT
        assert found.metrics[0].num_pairs == 4
        assert "the control has no finite final_loss in seed 2" in found.reasons[0]

    @pytest.mark.parametrize("value", [None, math.nan, math.inf])
    def test_a_metric_that_only_the_treatment_lacks_is_worse(self, value: float | None) -> None:
        values = {} if value is None else {LOSS.name: value}
        runs = changed(
            paired(CONTROLS, CONTROLS),
            lambda old: replace(old, values=values) if old.seed == 2 and old.arm == TREATMENT else old,
        )
        found = judge(design(), runs)[0]
        assert found.verdict is Verdict.WORSE
        assert "no finite value in seed 2, where the control has one" in found.reasons[0]

    def test_a_primary_metric_that_no_run_reports(self) -> None:
        found = judge(design(LOSS, ACCURACY), paired(CONTROLS, CONTROLS))[0]
        assert found.verdict is Verdict.UNDECIDED
        assert "no run reports accuracy" in found.reasons[0]

    def test_one_pair_with_a_metric(self) -> None:
        runs = changed(paired(CONTROLS, CONTROLS), lambda old: replace(old, values={}) if old.seed else old)
        assert judge(design(), runs)[0].verdict is Verdict.UNDECIDED
        assert judge(design(), runs)[0].metrics[0].interval is None

    def test_results_go_to_json_and_back(self) -> None:
        experiment, runs = design(LOSS, ACCURACY), paired(CONTROLS, CONTROLS, memory_bytes={"weights": 4, "masters": 0})
        proof = Proof(
            experiment=experiment, runs=runs, results=judge(experiment, runs), machine={}, command="", date="2026-11-28"
        )
        assert Proof.from_json(json.loads(json.dumps(proof.to_json(), allow_nan=False))) == proof


class TestEnds:
    def test_a_treatment_that_diverges_alone_is_worse(self) -> None:
        runs = changed(paired(CONTROLS, CONTROLS), everywhere(RunStatus.DIVERGED, TREATMENT, {1, 4}))
        found = judge(design(), runs)[0]
        assert found.verdict is Verdict.WORSE
        assert found.reasons == (
            "bf16-mixed diverged in 2 of 5 runs where float32 finished: seed 1 at step 7, seed 4 at step 7",
        )

    def test_a_control_that_diverges_loses_the_pair(self) -> None:
        runs = changed(paired(CONTROLS, CONTROLS), everywhere(RunStatus.DIVERGED, CONTROL, {1}))
        found = judge(design(), runs)[0]
        assert found.verdict is Verdict.EQUIVALENT
        assert found.metrics[0].num_pairs == 4
        assert "float32: diverged in seed 1, so the pair cannot be used" in found.reasons
        both = changed(runs, everywhere(RunStatus.DIVERGED, TREATMENT, {1}))
        assert judge(design(), both)[0].verdict is Verdict.EQUIVALENT

    def test_out_of_memory_is_reported_and_the_rest_counts(self) -> None:
        some = changed(paired(CONTROLS, CONTROLS), everywhere(RunStatus.OUT_OF_MEMORY, TREATMENT, {0}, "16 GiB"))
        found = judge(design(), some)[0]
        assert found.verdict is Verdict.EQUIVALENT
        assert "bf16-mixed: out of memory (16 GiB) in seed 0, so the pair cannot be used" in found.reasons
        everything = changed(some, everywhere(RunStatus.OUT_OF_MEMORY, TREATMENT, set(range(5))))
        assert judge(design(), everything)[0].verdict is Verdict.INVALID
        assert is_decided(design(), everything)

    def test_a_treatment_that_fails_where_the_control_finishes_is_not_called_equivalent(self) -> None:
        runs = changed(paired(CONTROLS, CONTROLS), everywhere(RunStatus.FAILED, TREATMENT, {3}, "ValueError: no"))
        found = judge(design(), runs)[0]
        assert found.verdict is Verdict.UNDECIDED
        assert "bf16-mixed: failed (ValueError: no) in seed 3, so the pair cannot be used" in found.reasons

    def test_a_control_that_does_not_learn_tests_nothing(self) -> None:
        flat = changed(paired(CONTROLS, CONTROLS), lambda old: replace(old, losses=curve(9.9)))
        found = judge(design(), flat)[0]
        assert found.verdict is Verdict.INVALID
        assert "did not fall by 10% in 5 of 5 runs" in found.reasons[0]
        assert judge(design(min_learning=0.03), flat)[0].verdict is not Verdict.INVALID

    def test_one_of_five_controls_may_fail_to_learn(self) -> None:
        for count, is_invalid in ((1, False), (2, True)):
            runs = changed(
                paired(CONTROLS, CONTROLS),
                lambda old, count=count: replace(old, losses=curve(9.9)) if old.seed < count else old,
            )
            assert (judge(design(), runs)[0].verdict is Verdict.INVALID) == is_invalid

    def test_a_treatment_that_does_not_learn_is_worse_even_within_the_margin(self) -> None:
        runs = changed(
            paired(CONTROLS, CONTROLS), lambda old: replace(old, losses=curve(10.2)) if old.arm == TREATMENT else old
        )
        found = judge(design(), runs)[0]
        assert found.metrics[0].verdict is Verdict.EQUIVALENT
        assert found.verdict is Verdict.WORSE
        assert "did not learn in 5 of 5 runs" in found.reasons[0]

    def test_next_to_the_threshold_of_learning_the_tests_decide(self) -> None:
        # both fall by about a tenth, the one a little more than is asked, the other a little less
        runs = changed(
            paired(CONTROLS, CONTROLS),
            lambda old: replace(old, losses=curve(9.0 if old.arm == CONTROL else 9.4)),
        )
        assert judge(design(), runs)[0].verdict is Verdict.EQUIVALENT

    def test_one_step_tests_nothing(self) -> None:
        runs = changed(paired(CONTROLS, CONTROLS), lambda old: replace(old, losses=(10.1,)))
        assert judge(design(), runs)[0].verdict is Verdict.INVALID

    def test_runs_still_to_come(self) -> None:
        runs = paired(CONTROLS, CONTROLS)
        for count in range(len(runs)):
            found = judge(design(), runs[:count])[0]
            assert found.verdict is (Verdict.UNDECIDED if count < 4 else Verdict.EQUIVALENT)
            assert not is_decided(design(), runs[:count])
        assert "1 pair finished, and a spread needs 2: runs are still to come" in judge(design(), runs[:2])[0].reasons
        assert is_decided(design(), runs)

    def test_arms_are_judged_apart(self) -> None:
        experiment = design(arms=["good", "bad"])
        runs = [
            *paired(CONTROLS, CONTROLS, arm="good"),
            *(one for one in paired(CONTROLS, [1.1 * c for c in CONTROLS], arm="bad") if one.arm == "bad"),
        ]
        assert [(one.arm, one.verdict) for one in judge(experiment, runs)] == [
            ("good", Verdict.EQUIVALENT),
            ("bad", Verdict.WORSE),
        ]


class TestRoundedLosses:
    @staticmethod
    def rounded(arm: str):
        def change(old: Run) -> Run:
            losses = np.asarray(old.losses, ml_dtypes.bfloat16).astype(float).tolist()
            return replace(old, losses=tuple(losses)) if old.arm == arm else old

        return change

    @pytest.mark.parametrize("arm", [CONTROL, TREATMENT])
    def test_agreement_that_rounding_could_hide_is_no_agreement(self, arm: str) -> None:
        runs = changed(paired(CONTROLS, CONTROLS), self.rounded(arm))
        found = judge(design(), runs)[0]  # bfloat16 near 2.6: 2**-6 apart, 0.6 %
        assert found.verdict is Verdict.UNDECIDED
        assert f"the losses of {arm} are bfloat16 numbers, 0.016 apart near 2.61, which hides" in found.reasons[0]
        assert is_decided(design(max_seeds=9), runs)  # further seeds would not help

    def test_a_margin_wider_than_the_spacing_can_still_be_shown(self) -> None:
        runs = changed(paired(CONTROLS, CONTROLS), self.rounded(TREATMENT))
        found = judge(design(Metric(name="final_loss", margin=0.01)), runs)[0]
        assert found.verdict is Verdict.EQUIVALENT
        assert "are bfloat16 numbers" in found.reasons[0]

    def test_a_difference_that_is_seen_stands(self) -> None:
        runs = changed(paired(CONTROLS, [1.1 * c for c in CONTROLS]), self.rounded(TREATMENT))
        assert judge(design(), runs)[0].verdict is Verdict.WORSE

    def test_other_metrics_are_not_concerned(self) -> None:
        runs = changed(paired(CONTROLS, CONTROLS, "accuracy"), self.rounded(TREATMENT))
        assert judge(design(ACCURACY), runs)[0].verdict is Verdict.EQUIVALENT


VALUES = st.lists(st.floats(0.5, 8), min_size=2, max_size=6)
SHARES = st.lists(st.floats(-0.02, 0.02), min_size=6, max_size=6)


class TestLaws:
    @settings(deadline=None)
    @given(VALUES, SHARES, st.randoms())
    def test_the_order_of_runs_does_not_matter(
        self, controls: list[float], shares: list[float], chance: random.Random
    ) -> None:
        runs = list(paired(controls, [c * (1 + s) for c, s in zip(controls, shares, strict=False)]))
        experiment = design(seeds=range(len(controls)))
        expected = judge(experiment, runs)
        chance.shuffle(runs)
        assert judge(experiment, runs) == expected

    @settings(deadline=None)
    @given(VALUES, SHARES, st.randoms())
    def test_the_order_of_seeds_does_not_matter(
        self, controls: list[float], shares: list[float], chance: random.Random
    ) -> None:
        runs = paired(controls, [c * (1 + s) for c, s in zip(controls, shares, strict=False)])
        seeds = list(range(len(controls)))
        (expected,) = judge(design(seeds=seeds), runs)
        chance.shuffle(seeds)
        (found,) = judge(design(seeds=seeds), runs)
        assert found.verdict is expected.verdict
        assert found.metrics[0].interval == expected.metrics[0].interval

    @settings(deadline=None)
    @given(VALUES, SHARES)
    def test_swapping_the_arms_turns_better_into_worse(self, controls: list[float], shares: list[float]) -> None:
        treatments = [c * (1 + s) for c, s in zip(controls, shares, strict=False)]
        experiment = design(ABSOLUTE, seeds=range(len(controls)))
        (ours,), (swapped,) = (
            judge(experiment, paired(*arms)) for arms in ((controls, treatments), (treatments, controls))
        )
        mirror = {Verdict.BETTER: Verdict.WORSE, Verdict.WORSE: Verdict.BETTER}
        assert swapped.verdict is mirror.get(ours.verdict, ours.verdict)
        assert swapped.metrics[0].interval.low == -ours.metrics[0].interval.high
        assert swapped.metrics[0].wide.high == -ours.metrics[0].wide.low

    @settings(deadline=None)
    @given(VALUES, SHARES, st.integers(-20, 20))
    def test_the_unit_of_a_relative_metric_does_not_matter(
        self, controls: list[float], shares: list[float], power: int
    ) -> None:
        treatments = [c * (1 + s) for c, s in zip(controls, shares, strict=False)]
        unit = 2.0**power  # exact, so that nothing at all changes
        experiment = design(seeds=range(len(controls)))
        (ours,) = judge(experiment, paired(controls, treatments))
        (scaled,) = judge(experiment, paired([unit * c for c in controls], [unit * t for t in treatments]))
        assert scaled.verdict is ours.verdict
        assert scaled.metrics[0].differences == ours.metrics[0].differences

    @settings(deadline=None)
    @given(VALUES, SHARES, st.floats(1.01, 3))
    def test_a_wider_margin_never_takes_equivalence_away(
        self, controls: list[float], shares: list[float], factor: float
    ) -> None:
        runs = paired(controls, [c * (1 + s) for c, s in zip(controls, shares, strict=False)])
        seeds = range(len(controls))
        if judge(design(LOSS, seeds=seeds), runs)[0].verdict is Verdict.EQUIVALENT:
            wider = Metric(name=LOSS.name, margin=factor * LOSS.margin)
            assert judge(design(wider, seeds=seeds), runs)[0].verdict is Verdict.EQUIVALENT
