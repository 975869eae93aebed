"""Why nothing became faster: sentences that follow from the machine and from where a step's time went."""

from pathlib import Path

import pytest
import torch
from proofs import prove
from proving_programs import script

from mezzotint.hardware.support import DeviceFacts, Support, format_support
from mezzotint.parity.design import Arm
from mezzotint.parity.result import ArmResult, Cost, Interval, Verdict
from mezzotint.proving import slowness
from mezzotint.proving.slowness import why_no_speedup, write_profile
from mezzotint.proving.store import ProofFolder
from mezzotint.proving.targets import experiment_for
from mezzotint.training.memory import measure_call
from mezzotint.training.step_profile import StepProfile

CARDS = {
    "P100": DeviceFacts(kind="cuda", index=0, name="Tesla P100", compute_capability=(6, 0)),
    "A100": DeviceFacts(kind="cuda", index=0, name="A100", compute_capability=(8, 0)),
}


def result(arm: str, ratio: float) -> ArmResult:
    interval = Interval(low=ratio, mean=ratio, high=ratio, level=0.95)
    cost = Cost(name="step_time", unit="s", control=1.0, treatment=ratio, ratio=interval)
    return ArmResult(arm=arm, verdict=Verdict.EQUIVALENT, reasons=(), metrics=(), costs=(cost,))


@pytest.fixture
def folder(tmp_path: Path) -> ProofFolder:
    experiment = experiment_for(script(tmp_path), arms=["float32", "bf16-mixed", "k=float32,lr=0.1"], seeds=2)
    prove(tmp_path / "out", experiment)
    return ProofFolder.open(tmp_path / "out")


def notes(monkeypatch: pytest.MonkeyPatch, folder: ProofFolder, card: str, ratio: float, **profile) -> list[str]:
    monkeypatch.setattr(slowness, "probe", lambda _: CARDS[card])
    if profile:
        write_profile(folder.run_path("bf16-mixed", 0), StepProfile(**profile))
    return list(why_no_speedup(folder, [result("bf16-mixed", ratio), result("k", ratio)]))


def test_reasons(monkeypatch: pytest.MonkeyPatch, folder: ProofFolder) -> None:
    # a large step, nearly all of it products on the tile: nothing to say on a card with the units
    good = {"num_operations": 1000, "seconds": 1.0, "product_seconds": 0.9, "cast_seconds": 0.01}
    assert notes(monkeypatch, folder, "A100", 0.95, **good) == []
    assert format_support(CARDS["P100"], "bfloat16").support is Support.EMULATED
    (said,) = notes(monkeypatch, folder, "P100", 0.95, **good)
    assert said.startswith("bf16-mixed takes 0.95 of float32's time: bfloat16 is emulated on Tesla P100 (")
    cases = {
        "products are 30% of a step, and only they become faster": {"product_seconds": 0.3},
        "casts and copies are 25% of a step": {"cast_seconds": 0.25},
        "a step is 100,000 operations of 10 µs on average": {"num_operations": 100_000},
        "products have dimensions off the tensor cores' tile of 8: 50257": {"off_tile": (50257,)},
    }
    for words, change in cases.items():
        (said,) = notes(monkeypatch, folder, "A100", 0.95, **{**good, **change})
        assert said.startswith(f"bf16-mixed takes 0.95 of float32's time: {words}")
        assert notes(monkeypatch, folder, "A100", 0.5, **{**good, **change}) == []


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("fp8-mixed", "float8_e4m3fn is absent on A100, so that rounding to it only adds time"),
        ("nvfp4", "no training kernel multiplies nvfp4, so that rounding to it only adds time"),
    ],
)
def test_products_that_only_round(monkeypatch: pytest.MonkeyPatch, folder: ProofFolder, policy: str, said: str) -> None:
    monkeypatch.setattr(slowness, "probe", lambda _: CARDS["A100"])
    arms = (folder.experiment.arms[1], Arm(name="x", policy=policy))
    folder.experiment = folder.experiment.replace(arms=arms)
    (note,) = why_no_speedup(folder, [result("x", 1.4)])
    assert note == f"x takes 1.40 of bf16-mixed's time: {said}"


def test_the_measured_step_of_a_script_is_kept(folder: ProofFolder) -> None:
    for arm, has_casts in (("float32", False), ("bf16-mixed", True)):
        profile = slowness._profile(folder, folder.experiment.arms[arm == "bf16-mixed"])
        assert profile is not None
        assert profile.num_operations > 30
        assert 0 < profile.product_seconds < profile.seconds
        assert (profile.cast_seconds > 0) >= has_casts


def test_a_profile_tells_products_from_casts() -> None:
    left, right = torch.randn(300, 250), torch.randn(250, 80)
    with measure_call() as measured:
        torch.mm(left, right)
        torch.mm(left, right).to(torch.bfloat16)
    profile = measured.profile
    assert profile is not None
    assert profile.off_tile == (250, 300)
    assert profile.product_seconds > 0 < profile.cast_seconds
    assert profile.product_seconds + profile.cast_seconds <= profile.seconds * (1 + 1e-9)
    # the first product's result went before the second one came
    assert measured.peak_bytes == 300 * 80 * (4 + 2)
    assert StepProfile.from_json(profile.to_json()) == profile
