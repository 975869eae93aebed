"""The choice over a table of devices and measurements, and the granting or refusal of what is asked by name."""

import subprocess
import sys

import pytest

from mezzotint.errors import PolicyError
from mezzotint.hardware.devices import find_device
from mezzotint.hardware.support import DeviceFacts, facts_from_spec
from mezzotint.hardware.timings import LAYOUTS, MatmulTime, MatmulTimings
from mezzotint.policy.choose import check_policy, choose
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.presets import PRESETS


def card(name):
    return facts_from_spec(find_device(name))


def times(refused=(), is_disturbed=False, **ratios):
    """Return timings in which each format takes `ratios` of float32's time: one number, or one per layout."""
    taken = []
    for name, ratio in {"float32": 1.0, **ratios}.items():
        for layout, value in zip(LAYOUTS, ratio if isinstance(ratio, tuple) else (ratio,) * 3, strict=True):
            taken.append(MatmulTime(format=name, layout=layout, best_seconds=value, median_seconds=value, samples=9))
    return MatmulTimings(
        device="any",
        threads=2,
        m=1,
        n=1,
        k=1,
        times=tuple(taken),
        refused=tuple(refused),
        is_disturbed=is_disturbed,
    )


ZEN4 = DeviceFacts(kind="cpu", name="Zen 4", flags=("avx2", "avx512_bf16"))
OLD_CPU = DeviceFacts(kind="cpu", name="Old CPU", flags=("avx2", "f16c"))
ARM = DeviceFacts(kind="cpu", name="Arm", flags=("neon", "fp16_arith"))
NO_FLAGS = DeviceFacts(kind="cpu", name="Silent CPU")
MAC = DeviceFacts(kind="mps", name="Apple M2", os_version=(14, 5), architecture="arm64")
OLD_MAC = DeviceFacts(kind="mps", name="Apple M1", os_version=(13, 6), architecture="arm64")
PASCAL = DeviceFacts(kind="cuda", index=0, name="GTX 1080", compute_capability=(6, 1))
MYSTERY = DeviceFacts(kind="hpu", name="Mystery")

TABLE = [
    (card("NVIDIA H100 PCIe"), times(bfloat16=0.1, float16=0.1), "bf16-mixed"),
    (card("NVIDIA A100-SXM4-80GB"), None, "bf16-mixed"),
    (card("NVIDIA A100-SXM4-80GB"), times(bfloat16=0.95, float16=0.95), "float32"),
    (card("Tesla T4"), times(bfloat16=1.8, float16=0.15), "fp16-mixed"),
    (card("Tesla T4"), None, "fp16-mixed"),
    (card("Tesla T4"), times(bfloat16=0.5, float16=0.15), "fp16-mixed"),  # emulated, however fast
    (card("Tesla T4"), times(bfloat16=1.8, float16=1.0), "float32"),
    (card("Tesla V100-SXM2-32GB"), times(bfloat16=1.4, float16=0.15), "fp16-mixed"),
    (card("AMD Instinct MI300X"), times(bfloat16=0.2, float16=0.2), "bf16-mixed"),
    (PASCAL, times(bfloat16=1.1, float16=1.1), "float32"),
    (PASCAL, None, "float32"),
    (ZEN4, times(bfloat16=0.46), "bf16-mixed"),
    (ZEN4, times(bfloat16=(0.4, 0.95, 0.4)), "float32"),
    (ZEN4, times(bfloat16=(5.0, 65.0, 6.0)), "float32"),
    (ZEN4, times(bfloat16=0.9), "bf16-mixed"),
    (ZEN4, None, "float32"),  # the flags of a CPU alone mislead
    (ZEN4, times(refused=[("float32", "broken")]), "float32"),
    (OLD_CPU, times(bfloat16=30.0, float16=40.0), "float32"),
    (OLD_CPU, None, "float32"),
    (ARM, times(bfloat16=3.0, float16=0.6), "fp16-mixed"),
    (ARM, times(bfloat16=3.0, float16=1.0), "float32"),
    (NO_FLAGS, times(bfloat16=0.5), "bf16-mixed"),
    (NO_FLAGS, times(bfloat16=5.0, float16=5.0), "float32"),
    (MAC, times(bfloat16=0.7), "bf16-mixed"),
    (MAC, times(bfloat16=1.2, float16=0.7), "float32"),
    (OLD_MAC, times(float16=0.7, refused=[("bfloat16", "not supported")]), "fp16-mixed"),
    (OLD_MAC, times(float16=1.0), "float32"),
    (MYSTERY, None, "float32"),
    (MYSTERY, times(bfloat16=0.4), "bf16-mixed"),
]


@pytest.mark.parametrize(("facts", "timings", "preset"), TABLE)
def test_the_choice(facts, timings, preset):
    decision = choose(facts, timings)
    assert decision.value == parse_policy(preset)
    assert decision.reasons
    for reason in decision.reasons:
        assert reason.endswith(".")
        assert reason[0].isupper() or reason.startswith(("bf", "float"))
        assert ".." not in reason


@pytest.mark.parametrize(("facts", "timings", "preset"), TABLE)
def test_what_is_chosen_is_granted(facts, timings, preset):
    check_policy(choose(facts, timings).value, facts)


def test_the_decisive_reason_comes_first_and_has_the_figures():
    first, *_ = choose(ZEN4, times(bfloat16=(0.46, 0.47, 0.5))).reasons
    assert "avx512_bf16" in first
    assert "0.46 times float32's in NT, 0.47 in NN, 0.50 in TN" in first
    first, *rest = choose(card("Tesla T4"), times(bfloat16=1.8, float16=0.15)).reasons
    assert "float16 is native on Tesla T4" in first
    assert "0.15" in first
    assert "bfloat16 is emulated on Tesla T4" in rest[0]
    assert "1.80 times" in rest[0]


def test_what_was_not_measured_is_said():
    assert "not measured" in choose(card("NVIDIA A100-SXM4-80GB")).reasons[0]
    assert "flags alone mislead" in " ".join(choose(ZEN4).reasons)


def test_published_peaks_are_named_where_they_are_known():
    reasons = " ".join(choose(card("NVIDIA A100-SXM4-80GB"), times(bfloat16=0.1)).reasons)
    assert "312 TFLOP/s in bfloat16, 19.5 in float32" in reasons


def test_a_cpu_without_units_is_told_what_bf16_mixed_would_still_give():
    last = choose(OLD_CPU, times(bfloat16=30.0, float16=40.0)).reasons[-1]
    assert "bf16-mixed can be asked for by name" in last
    assert "memory" in last


def test_a_measurement_on_a_busy_machine_is_doubted_aloud():
    reasons = choose(ZEN4, times(bfloat16=0.5, is_disturbed=True)).reasons
    assert "busy" in reasons[-1]


def test_this_machine_is_probed_and_measured(monkeypatch):
    from mezzotint.hardware import measure, probe

    asked = []

    def measured(device, formats):
        asked.append((device, formats))
        return times(bfloat16=5.0, **({"float16": 0.5} if "float16" in formats else {}))

    monkeypatch.setattr(measure, "measure_matmul", measured)
    here = DeviceFacts(kind="cpu", name="Arm", flags=("neon", "fp16_arith"), is_here=True)
    monkeypatch.setattr(probe, "probe", lambda device: here)
    assert choose(device="cpu").value == choose(here).value == parse_policy("fp16-mixed")
    assert asked[:2] == [("cpu", ("bfloat16",)), ("cpu", ("bfloat16", "float16"))]
    asked.clear()
    choose(here, times(bfloat16=0.5))
    choose(ARM)
    assert asked == []


def test_a_true_choice_on_this_machine():
    decision = choose(device="cpu")
    assert decision.value in {parse_policy(name) for name in ("float32", "bf16-mixed", "fp16-mixed")}


@pytest.mark.parametrize("facts", [card("NVIDIA H100 PCIe"), card("Tesla T4"), ZEN4, OLD_CPU, MAC, PASCAL, MYSTERY])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_granted_also_where_they_are_emulated(facts, name):
    check_policy(parse_policy(name), facts)


@pytest.mark.parametrize(
    ("text", "facts", "named"),
    [
        ("compute=e4m3", card("NVIDIA H100 PCIe"), ["compute=float8_e4m3fn", "below 16 bits", "compute=bfloat16"]),
        ("params=e5m2, state=e5m2", OLD_CPU, ["params=float8_e5m2", "below 16 bits", "params=bfloat16"]),
        ("bf16-mixed", OLD_MAC, ["compute=bfloat16", "mps (Apple M1)", "macOS 14", "13.6", "pass compute=float16"]),
        ("compute=float64", MAC, ["compute=float64", "Metal has no float64", "pass compute=float32"]),
        ("loss=float64", MAC, ["loss=float64", "pass loss=float32"]),
        ("compute=tf32", OLD_CPU, ["compute=tfloat32", "tensor cores", "pass compute=float32"]),
        ("compute=tf32", card("Tesla T4"), ["compute=tfloat32", "8.0", "7.5", "pass compute=float32"]),
        ("loss=tf32", card("NVIDIA H100 PCIe"), ["loss=tfloat32", "nothing is stored", "pass loss=float32"]),
    ],
)
def test_a_refusal_names_value_limit_and_fix(text, facts, named):
    with pytest.raises(PolicyError) as caught:
        check_policy(parse_policy(text), facts)
    assert [words for words in named if words not in str(caught.value)] == []


def test_float64_and_float16_are_granted_on_a_cpu():
    check_policy(parse_policy("params=float64, compute=float64, state=float64"), OLD_CPU)
    check_policy(parse_policy("fp16-mixed"), OLD_CPU)


def test_the_module_starts_without_torch():
    code = "import sys, mezzotint.policy.choose, mezzotint.cli.doctor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
