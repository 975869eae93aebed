"""The micro-benchmark: what it must not change, how it copes with slow formats and busy machines, and one true run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mezzotint.errors import ConfigError
from mezzotint.hardware import measure
from mezzotint.hardware.timings import LAYOUTS


def test_nothing_of_torch_is_changed_and_the_result_is_kept():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first = measure.measure_matmul("cpu", ("bfloat16",))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
    assert measure.measure_matmul("cpu", ("bf16",)) is first
    assert first.formats == ("float32", "bfloat16")
    assert set(first.ratios("bfloat16")) == set(LAYOUTS)
    assert all(time.best_seconds > 0 for time in first.times)


def test_a_format_without_a_dtype_is_refused():
    with pytest.raises(ConfigError, match="tfloat32 is a format of GPUs"):
        measure.measure_matmul("cpu", ("tf32",))


def test_a_format_that_torch_does_not_multiply_is_recorded(monkeypatch):
    real = measure.product

    def product(device, name, layout, size):
        if name == "float8_e5m2":
            raise NotImplementedError('"addmm" not implemented\nmore')
        return real(device, name, layout, size)

    monkeypatch.setattr(measure, "product", product)
    taken = measure.measure_matmul("cpu", ("float8_e5m2",))
    assert taken.refused == (("float8_e5m2", '"addmm" not implemented'),)
    assert taken.formats == ("float32",)


def test_a_device_that_fails_is_recorded_and_not_raised(monkeypatch):
    def broken(device, rows, columns):
        raise RuntimeError("CUDA error: no kernel image\nand more")

    monkeypatch.setattr(measure, "fractions", broken)
    taken = measure.measure_matmul("cpu", ("float16", "float64"))
    assert taken.times == ()
    assert taken.refused == (("float32", "CUDA error: no kernel image"),)


def test_memory_that_ran_out_says_nothing_about_a_format(monkeypatch):
    real = measure.product

    def product(device, name, layout, size):
        if name == "float64":
            raise torch.OutOfMemoryError("too much")
        return real(device, name, layout, size)

    monkeypatch.setattr(measure, "product", product)
    taken = measure.measure_matmul("cpu", ("float64",))
    assert taken.formats == ("float32",)
    assert taken.refused == ()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_products_are_stored_as_the_layout_says_and_multiply(layout):
    out = measure.product("cpu", "float64", layout, (3, 5, 4))()
    left = measure.fractions("cpu", 4, 3).t() if layout[0] == "T" else measure.fractions("cpu", 3, 4)
    right = measure.fractions("cpu", 5, 4).t() if layout[1] == "T" else measure.fractions("cpu", 4, 5)
    torch.testing.assert_close(out, left.double() @ right.double())
    assert measure.fractions("cpu", 100, 100).unique().numel() > 5000  # no shortcut for constant data


@pytest.fixture(autouse=True)
def _own_cache(request):
    """Forget measurements of patched machines."""
    yield
    if "monkeypatch" in request.fixturenames:
        measure._measured.cache_clear()


class FakeClock:
    """Calls cost what they are told to; `preemptions` counts every call of a busy machine."""

    def __init__(self, busy_calls):
        self.busy_calls = busy_calls
        self.calls = 0

    def timer(self, call):
        self.calls += 1
        is_busy = self.busy_calls(self.calls)
        self.preempted = getattr(self, "preempted", 0) + is_busy
        return call() * (40 if is_busy else 1)

    def preemptions(self):
        return getattr(self, "preempted", 0)


def pairs(**seconds):
    return {(name, layout): (lambda s=s: s) for name, s in seconds.items() for layout in LAYOUTS}


def test_formats_take_turns_and_a_slow_one_is_let_off():
    clock = FakeClock(lambda call: False)
    samples = measure.race(pairs(float32=1e-3, bfloat16=0.5e-3, float16=50e-3), clock.timer, clock.preemptions)
    assert len(samples["float32", "NN"].quiet) >= measure.SAMPLES
    assert len(samples["bfloat16", "NN"].quiet) >= measure.SAMPLES
    assert len(samples["float16", "NN"].quiet) == measure.SLOW_SAMPLES


def test_disturbed_calls_are_set_aside():
    clock = FakeClock(lambda call: call % 5 == 0)
    samples = measure.race(pairs(float32=1e-3, bfloat16=0.5e-3), clock.timer, clock.preemptions)
    assert samples["float32", "NT"].trusted == pytest.approx([1e-3] * len(samples["float32", "NT"].trusted))
    assert samples["bfloat16", "NT"].best == pytest.approx(0.5e-3)


def test_a_machine_that_is_never_quiet_ends_the_race():
    clock = FakeClock(lambda call: True)
    samples = measure.race(pairs(float32=1e-3, bfloat16=0.5e-3), clock.timer, clock.preemptions)
    assert samples["float32", "NT"].quiet == []
    assert samples["float32", "NT"].trusted
    total = sum(sum(s.disturbed) for s in samples.values())
    assert total < measure.TOTAL_SECONDS + 1


def test_a_busy_machine_is_said_to_be_busy(monkeypatch):
    counter = iter(range(10**9))
    monkeypatch.setattr(measure, "preemptions", lambda: next(counter))
    monkeypatch.setattr(measure, "TOTAL_SECONDS", 0.05)
    assert measure.measure_matmul("cpu", ("float64", "float32")).is_disturbed


def test_copy_bandwidth_is_plausible():
    assert 1e8 < measure.copy_bytes_per_second("cpu") < 1e13


def test_the_size_grows_until_a_product_takes_long_enough():
    fast, slow = (lambda call: 1e-6), (lambda call: 1.0)
    assert measure._size("cpu", slow) == measure.CPU_SIZES[0]
    assert measure._size("cpu", fast) == measure.CPU_SIZES[-1]


SCRIPT = """
import json
from mezzotint.hardware.measure import measure_matmul
from mezzotint.hardware.probe import probe
from mezzotint.hardware.support import format_support
from mezzotint.policy.choose import choose
facts, taken = probe("cpu"), measure_matmul("cpu", ("bfloat16",))
support = format_support(facts, "bfloat16", taken).support
print(json.dumps([support, taken.is_disturbed, str(choose(facts, taken).value)]))
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="oneDNN's instruction-set limit does not apply to Apple's library")
def test_without_the_units_in_use_bfloat16_is_found_to_be_emulated():
    """oneDNN held to AVX2 emulates bfloat16, while the flags of the CPU still promise it where it has them."""
    limited = {"DNNL_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **limited}, capture_output=True, text=True, check=True
    )
    support, is_disturbed, policy = json.loads(done.stdout)
    if is_disturbed:
        pytest.skip("the machine is too busy to measure")
    assert support == "emulated"
    assert "compute=float32" in policy


def test_float8_products_are_timed_where_torch_has_them():
    timings = measure.measure_matmul("cpu", ("float8_e4m3fn",))
    assert "float8_e4m3fn" in timings.formats or "float8_e4m3fn" in dict(timings.refused)


def test_tf32_is_set_for_the_product_alone():
    before = torch.get_float32_matmul_precision()
    seen = []
    call = measure._at_high_precision(lambda: seen.append(torch.get_float32_matmul_precision()))
    call()
    assert seen == ["high"]
    assert torch.get_float32_matmul_precision() == before


def test_float8_products_are_right():
    exact = measure.product("cpu", "float32", "NT", (16, 32, 48))()
    got = measure.product("cpu", "float8_e4m3fn", "NT", (16, 32, 48))()
    assert got.dtype is torch.bfloat16
    # each of 48 products of factors below 1/2 is off by at most 2^-3 of itself
    assert float((got.float() - exact).abs().max()) <= 48 * 0.25 * 2**-3
