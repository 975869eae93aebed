"""Support by rule, for devices of every kind, and the last word of a measurement."""

import pytest
from machines import OLD_X86, cpu, cuda, rocm, timings

from mezzotint.errors import FormatError
from mezzotint.hardware.devices import device_specs
from mezzotint.hardware.support import (
    REPORTED_FORMATS,
    DeviceFacts,
    Support,
    facts_from_spec,
    format_support,
    support_table,
)

NATIVE, EMULATED, ABSENT, UNKNOWN = Support
MPS = DeviceFacts(kind="mps", name="Apple M2", architecture="arm64", os_version=(14, 5))
XMX = "has_subgroup_matrix_multiply_accumulate"

CASES = [
    # facts, bfloat16, float16, tfloat32, float8_e4m3fn, float64
    (cuda("Tesla K80", (3, 7)), EMULATED, EMULATED, ABSENT, ABSENT, NATIVE),
    (cuda("GTX 1080", (6, 1)), EMULATED, EMULATED, ABSENT, ABSENT, NATIVE),
    (cuda("Tesla P100", (6, 0)), EMULATED, NATIVE, ABSENT, ABSENT, NATIVE),
    (cuda("Tesla V100-SXM2-16GB", (7, 0)), EMULATED, NATIVE, ABSENT, ABSENT, NATIVE),
    (cuda("Tesla T4", (7, 5), claims_bfloat16=True), EMULATED, NATIVE, ABSENT, ABSENT, NATIVE),
    (cuda("NVIDIA A100-SXM4-80GB", (8, 0)), NATIVE, NATIVE, NATIVE, ABSENT, NATIVE),
    (cuda("NVIDIA GeForce RTX 3090", (8, 6)), NATIVE, NATIVE, NATIVE, ABSENT, NATIVE),
    (cuda("NVIDIA L4", (8, 9)), NATIVE, NATIVE, NATIVE, NATIVE, NATIVE),
    (cuda("NVIDIA H100 PCIe", (9, 0)), NATIVE, NATIVE, NATIVE, NATIVE, NATIVE),
    (cuda("NVIDIA B200", (10, 0)), NATIVE, NATIVE, NATIVE, NATIVE, NATIVE),
    (cuda("no capability", None), UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN),
    (rocm("gfx906"), EMULATED, NATIVE, ABSENT, ABSENT, NATIVE),
    (rocm("gfx908"), NATIVE, NATIVE, ABSENT, ABSENT, NATIVE),
    (rocm("gfx90a:sramecc+:xnack-"), NATIVE, NATIVE, ABSENT, ABSENT, NATIVE),
    (rocm("gfx942"), NATIVE, NATIVE, NATIVE, ABSENT, NATIVE),
    (rocm("gfx950"), NATIVE, NATIVE, ABSENT, NATIVE, NATIVE),
    (rocm("gfx1030"), EMULATED, NATIVE, ABSENT, ABSENT, NATIVE),
    (rocm("gfx1100"), NATIVE, NATIVE, ABSENT, ABSENT, NATIVE),
    (rocm("gfx1201"), NATIVE, NATIVE, ABSENT, NATIVE, NATIVE),
    (rocm(None), UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, NATIVE),
    (cpu(*OLD_X86), EMULATED, EMULATED, ABSENT, EMULATED, NATIVE),
    (cpu("avx512_f", "avx512_bf16"), NATIVE, EMULATED, ABSENT, EMULATED, NATIVE),
    (cpu("amx_bf16", "avx512_fp16"), NATIVE, NATIVE, ABSENT, EMULATED, NATIVE),
    (cpu("amx_fp16"), EMULATED, NATIVE, ABSENT, EMULATED, NATIVE),
    (cpu("neon", "fp16_arith"), EMULATED, NATIVE, ABSENT, EMULATED, NATIVE),
    (cpu("asimd", "asimdhp", "bf16"), NATIVE, NATIVE, ABSENT, EMULATED, NATIVE),
    (DeviceFacts(kind="cpu"), UNKNOWN, UNKNOWN, ABSENT, EMULATED, NATIVE),
    (MPS, NATIVE, NATIVE, ABSENT, ABSENT, ABSENT),
    (DeviceFacts(kind="mps", os_version=(13, 6)), ABSENT, NATIVE, ABSENT, ABSENT, ABSENT),
    (DeviceFacts(kind="mps"), UNKNOWN, NATIVE, ABSENT, ABSENT, ABSENT),
    (DeviceFacts(kind="mps", os_version=(15, 1), architecture="x86_64"), ABSENT, NATIVE, ABSENT, ABSENT, ABSENT),
    (DeviceFacts(kind="xpu", flags=(XMX, "has_fp16", "has_fp64")), NATIVE, NATIVE, ABSENT, ABSENT, NATIVE),
    (DeviceFacts(kind="xpu", flags=("has_fp16",)), EMULATED, NATIVE, ABSENT, ABSENT, ABSENT),
    (DeviceFacts(kind="xpu"), UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN),
    (DeviceFacts(kind="hpu"), UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case[0].name}-{case[0].architecture or case[0].compute_capability}"
)
def test_support_follows_the_rules(case):
    facts, *expected = case
    formats = ("bfloat16", "float16", "tfloat32", "float8_e4m3fn", "float64")
    found = [format_support(facts, name).support for name in formats]
    assert dict(zip(formats, found, strict=True)) == dict(zip(formats, expected, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].device + "-" + case[0].name)
def test_every_verdict_has_a_reason_and_every_device_has_float32(case):
    table = support_table(case[0])
    assert [support.format for support in table] == list(REPORTED_FORMATS)
    assert all(support.reason and support.measured_ratio is None for support in table)
    known = case[0].kind in ("cpu", "cuda", "mps", "xpu")
    assert table[1].support is (NATIVE if known else UNKNOWN)


def test_aliases_are_formats_and_nonsense_is_refused():
    assert format_support(cuda(), "bf16") == format_support(cuda(), "bfloat16")
    with pytest.raises(FormatError, match="unknown number format 'bf17'"):
        format_support(cuda(), "bf17")


def test_a_t4_is_told_apart_from_what_torch_says():
    reason = format_support(cuda("Tesla T4", (7, 5), claims_bfloat16=True), "bfloat16").reason
    assert "8.0" in reason
    assert "7.5" in reason
    assert "is_bf16_supported" in reason


def test_the_gtx_16_series_has_no_tensor_cores():
    reason = format_support(cuda("NVIDIA GeForce GTX 1660 Ti", (7, 5)), "float16").reason
    assert "without tensor cores" in reason


def test_units_without_a_kernel_count_as_emulated():
    zen4 = cpu("avx512_bf16")
    slow = format_support(zen4, "bfloat16", timings(bfloat16=(5.6, 70.0, 7.0)))
    assert slow.support is EMULATED
    assert slow.measured_ratio == pytest.approx(70)
    assert "avx512_bf16" in slow.reason
    assert "70 in NN" in slow.reason
    assert format_support(zen4, "bfloat16", timings(bfloat16=0.5)).support is NATIVE


def test_a_measurement_settles_what_the_facts_leave_open():
    nothing_known = DeviceFacts(kind="cpu")
    assert format_support(nothing_known, "bfloat16", timings(bfloat16=0.5)).support is NATIVE
    assert format_support(nothing_known, "bfloat16", timings(bfloat16=1.1)).support is UNKNOWN
    assert format_support(nothing_known, "bfloat16", timings(bfloat16=4.0)).support is EMULATED


def test_a_refused_product_is_absent_unless_everything_is_refused():
    refused = timings(refused=[("float16", '"addmm" not implemented')])
    assert format_support(cpu("avx512_fp16"), "float16", refused).support is ABSENT
    broken = timings(refused=[("float32", "no driver"), ("float16", "no driver")])
    assert format_support(cpu("avx512_fp16"), "float16", broken).support is NATIVE


def test_a_disturbed_measurement_overrules_nothing():
    busy = timings(bfloat16=3.0, is_disturbed=True)
    assert format_support(cpu("avx512_bf16"), "bfloat16", busy).support is NATIVE


def test_wide_formats_may_be_native_and_slow():
    assert format_support(cpu(), "float64", timings(float64=2.0)).support is NATIVE


@pytest.mark.parametrize("spec", device_specs(), ids=lambda spec: spec.name)
def test_the_table_and_the_rules_agree(spec):
    """A device with a published bfloat16 or float8 peak has it natively, by the rules."""
    facts = facts_from_spec(spec)
    for name in ("bfloat16", "float16", "tfloat32", "float8_e4m3fn"):
        if spec.peak_flops_per_second(name) is not None and not (name.startswith("float8") and facts.is_rocm):
            assert format_support(facts, name).support is NATIVE
