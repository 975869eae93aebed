"""Claims: each verdict is what its figures give, other figures give another, the command works from the package."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mezzotint.claims import evaluate
from mezzotint.claims.catalog import CLAIMS
from mezzotint.claims.claim import Basis, Claim, Verdict
from mezzotint.claims.evaluate import find_claims, outcome_of
from mezzotint.claims.quality import proof_figures
from mezzotint.claims.recorded import Recorded, records
from mezzotint.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {claim.name: claim for claim in CLAIMS}
QUICK = [claim for claim in CLAIMS if claim.basis.is_quick]


def arm(verdict: str) -> dict[str, Any]:
    return {
        "verdict": verdict, "metric": "validation loss", "margin": 0.005, "pairs": 5, "low": 0.01, "mean": 0.02,
        "high": 0.03, "level": 0.95,
    }  # fmt: skip


# Figures that would make each claim come out otherwise. A verdict that no figure can change is no verdict.
CONTRARY: dict[str, dict[str, Any]] = {
    "two-formats": {"share_of_flops": 0.4, "float32": ["native_layer_norm"]},
    "three-parts": {
        "forward": ["bfloat16"], "backward": ["bfloat16"], "loss": "bfloat16", "gradients": ["float32"],
        "update": ["float32"],
    },
    "safe-operations": {
        "cuda": 65, "not_on_cpu": 0, "softmax_on_cpu": "_softmax float32", "mean_on_cuda": "mean bfloat16 to float32",
        "sum_on_cuda": "sum bfloat16 to float32",
    },
    "hardware-check": {"V100": [False, False], "T4": [False, False], "A100": [True, True]},
    "fallback": {"has_gpu": False, "is_enabled": True, "dtype": "float16", "num_warnings": 0},
    "default-dtype": {"cuda": "bfloat16", "cpu": "bfloat16"},
    "cross-entropy": {"cuda": "_to_copy bfloat16 to float32, _log_softmax float32", "cpu": ""},
    "half-is-autocast": {
        f"{way}_{what}": "float16" for way in ("half", "autocast") for what in ("weight", "gradient", "product", "norm")
    } | {"scaler": ""},
    "batch-norm": {
        "cuda": "_to_copy bfloat16 to float32, native_batch_norm float32", "error_float32_statistics": 0.0,
        "error_bfloat16_statistics": 0.0,
    },
    "tf32-default": {"products": False, "convolutions": False, "precision": "highest"},
    "twice-as-fast": {"machine": "m", "bfloat16": [0.9, 1.0], "step": 1.0, "model": "a model"},
    "twice-as-fast-on-gpus": {
        "over_float32": [1.1, 1.2], "over_tf32": [1.0, 1.1], "float32_cards": {"V100": 2}, "tf32_cards": {"A100": 2},
    },
    "always-faster": {"slower": [], "num_pairs": 9},
    "multiples-of-8": {"V100": 1.0, "A100": 1.0, "H100": 1.0},
    "float16-on-cpus": {"machine": "m", "torch": [0.5], "mezzotint": [0.5]},
    "float16-everywhere": {"machine": "m", "torch": [0.5], "mezzotint": [0.5]},
    "cpus-have-no-bfloat16": {"machine": "m", "bfloat16": [4.0, 5.0]},
    "float16-is-faster": {"float16": {"a card": 2.0}, "float8": {}},
    "float8-is-faster": {"machine": "m", "float8_e4m3fn": [1.7], "float8": {"a card": 1.0}},
    "half-the-memory": {"activations": 0.5, "peak": 0.5, "state": 0.5, "model": "a model"},
    "half-the-memory-on-gpus": {"train_steps": [0.5], "without_update": [0.5]},
    "never-more-memory": {
        "forward_only": [0.6], "largest": {"mixed": 1.0, "plain": 2.0, "model": "a model", "gpu": "a card"},
    },
    "no-quality-loss": {"bf16-mixed": arm("worse"), "fp16-mixed": arm("worse")},
    "bfloat16-trains-worse": {"bf16-mixed": arm("worse"), "bf16-pure": arm("worse"), "bf16-stochastic": arm("worse")},
    "loss-scaling": {"plain": 0.15, "scaled": 0.15},
    "bfloat16-scaling": {"bfloat16": 0.1, "float16": 0.15},
    "master-weights": {
        "float32": 0.98, "bf16-pure": 0.98, "bf16-stochastic": 0.98, "bf16-kahan": 0.98, "bf16-master": 0.98,
    },
    "scaler-prevents-nan": {"num_overflows": 1000, "scale": 1.0, "num_nan": 0},
    "clip-after-backward": {"before": 1.0, "after": 1.0},
    "float16-range": {"largest": 448.0, "below_tie": 448.0, "at_tie": 448.0},
    "float16-gradients": {"at": 2.0**-25, "above": 2.0**-25},
    "bfloat16-overflow": {"largest": 3.4e38, "cast": 3.4e38},
    "bfloat16-range": {"normal": 6e-5, "float32_normal": 1e-38, "subnormal": 6e-8, "float32_subnormal": 1e-45},
    "bfloat16-digits": {"kept_of_90": 80, "lost_of_900": 512},
    "float16-precision": {"ratio": 0.5},
    "bfloat16-updates": {"added_0.001": 1.001, "added_half_ulp": 1.0},
    "cast-truncates": {"is_nearest": False, "differs_from_cut": 0.0},
    "tf32-bits": {"bits": 32},
    "e4m3-end": {"fn": 240.0, "fnuz": 240.0},
    "e4m3-overflow": {"torch": math.nan, "is_nan_by_the_standard": True, "version": "0"},
    "compiled-cast": {"compiled": 0.333984375, "eager": 0.333984375, "version": "0"},
}  # fmt: skip


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.name for claim in CLAIMS])
def test_the_verdict_is_what_the_figures_give(claim: Claim) -> None:
    outcome = outcome_of(claim)
    assert outcome.is_as_published, outcome.answer
    answer = outcome.answer
    assert bool(answer.condition) is (answer.verdict is Verdict.CONDITIONAL)
    assert len(answer.figure) > 20
    assert "\n" not in answer.figure
    json.dumps(dict(outcome.figures))


@pytest.mark.parametrize("claim", CLAIMS, ids=[claim.name for claim in CLAIMS])
def test_other_figures_give_another_verdict(claim: Claim) -> None:
    answer = claim.judge(CONTRARY[claim.name])
    assert answer.verdict is not claim.verdict, answer
    assert bool(answer.condition) is (answer.verdict is Verdict.CONDITIONAL)


def test_each_claim_is_said_once_by_someone_and_has_its_figures() -> None:
    assert len(BY_NAME) == len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    assert all(claim.where for claim in CLAIMS)
    assert set(records()) == {claim.name for claim in CLAIMS if not claim.basis.is_quick}
    for claim in CLAIMS:
        assert (claim.measure is None) is (claim.basis is Basis.PUBLISHED)
        assert (claim.seconds > 0) is (claim.basis is Basis.MEASURED)


def test_commands_exist() -> None:
    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for claim in CLAIMS:
        program, command, *_ = claim.command.split()
        assert program == "mezzotint"
        assert command in known, claim.command


def test_words_find_claims() -> None:
    assert {claim.name for claim in find_claims(["E4M3"])} == {"e4m3-end", "e4m3-overflow"}
    assert find_claims([]) == CLAIMS
    assert all("gpu" in f"{one.name} {one.text}".lower() for one in find_claims(["gpu", "mixed"]))


def test_the_command_lists_and_explains() -> None:
    done = CliRunner().invoke(app, ["claims", "scaler-prevents-nan"])
    assert done.exit_code == 0
    assert "GradScaler prevents NaN" in done.stdout
    assert "false: torch's scaler reaches 0 after 166 overflows" in " ".join(done.stdout.split())
    assert "computed here" in done.stdout


def test_records_are_quoted_with_date_and_how_to_measure() -> None:
    text = " ".join(CliRunner().invoke(app, ["claims", "half-the-memory"]).stdout.split())
    assert "measured on 20" in text
    assert "--run does it here" in text
    assert "measured by others, as published" in text


def test_json_has_verdict_figures_and_source() -> None:
    done = CliRunner().invoke(app, ["claims", "tf32", "--json"])
    body = json.loads(done.stdout)
    assert body["schema"] == "mezzotint.claims/1"
    by_name = {one["name"]: one for one in body["claims"]}
    assert by_name["tf32-default"]["verdict"] == "true if"
    assert by_name["tf32-default"]["figures"]["convolutions"] is True
    assert by_name["tf32-bits"]["figures"] == {"bits": 19}


def test_run_measures_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure measured here may give another verdict than the published one; that is said, and is no failure."""
    claim = replace(BY_NAME["cpus-have-no-bfloat16"], measure=lambda: CONTRARY["cpus-have-no-bfloat16"])
    monkeypatch.setattr(evaluate, "CLAIMS", (claim,))
    assert "published" not in CliRunner().invoke(app, ["claims"]).stdout
    done = CliRunner().invoke(app, ["claims", "--run"])
    assert done.exit_code == 0
    assert "true (published: true if)" in done.stdout
    assert "measured here in" in done.stdout


def test_what_cannot_be_measured_here_is_quoted_with_the_reason() -> None:
    def lacking() -> dict[str, Any]:
        raise RuntimeError("no working C++ compiler\nwas found")

    outcome = outcome_of(replace(BY_NAME["compiled-cast"], measure=lacking), is_run=True)
    assert outcome.is_as_published
    assert outcome.source.startswith("measured on 20")
    assert outcome.source.endswith("; not measured here: RuntimeError: no working C++ compiler")
    with pytest.raises(RuntimeError):
        outcome_of(replace(BY_NAME["tf32-bits"], measure=lacking))


def test_what_is_exact_and_comes_out_otherwise_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = replace(BY_NAME["tf32-bits"], measure=lambda: CONTRARY["tf32-bits"])
    monkeypatch.setattr(evaluate, "CLAIMS", (claim,))
    assert CliRunner().invoke(app, ["claims"]).exit_code == 1


def test_no_such_claim_is_one_sentence() -> None:
    done = CliRunner().invoke(app, ["claims", "perpetual", "motion"])
    assert done.exit_code != 0
    assert "no claim has 'perpetual motion' in it" in str(done.exception)


def test_a_record_that_says_otherwise_stops_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "claims_page", raising=False)
    import claims_page

    claim = BY_NAME["half-the-memory"]
    told = {claim.name: Recorded(figures=CONTRARY[claim.name], source="", path="")}
    with pytest.raises(SystemExit, match="half-the-memory: the figures say true, the claim says false"):
        claims_page.checked(outcome_of(claim, recorded=told))


def test_what_a_proof_says_of_arms_is_read_from_its_json() -> None:
    metric = {
        "name": "validation_loss", "is_primary": True, "verdict": "worse", "margin": 0.005, "num_pairs": 3,
        "interval": {"low": 0.011, "mean": 0.02, "high": 0.029, "level": 0.9},
        "wide": {"low": 0.01, "mean": 0.02, "high": 0.03, "level": 0.95},
    }  # fmt: skip
    found = proof_figures({"results": [{"arm": "bf16-pure", "verdict": "worse", "metrics": [metric]}]})
    assert found == {"bf16-pure": {**arm("worse"), "pairs": 3}}
    equal = {**metric, "verdict": "equivalent"}
    found = proof_figures({"results": [{"arm": "bf16-pure", "verdict": "equivalent", "metrics": [equal]}]})
    assert found["bf16-pure"]["low"] == 0.011


@pytest.mark.slow
@pytest.mark.parametrize("name", ["half-the-memory", "cpus-have-no-bfloat16", "float8-is-faster"])
def test_measuring_here_gives_the_figures_that_the_record_has(name: str) -> None:
    outcome = outcome_of(BY_NAME[name], is_run=True)
    assert outcome.source == "measured here"
    assert set(outcome.figures) >= set(records()[name].figures) - {"step_avx2"}
    assert outcome.answer.figure
