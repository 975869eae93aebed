"""Rounding of tensors against the scalar oracle, ml_dtypes and torch, in both implementations."""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import NARROW, TARGETS, all_sorts, critical, moderate, same
from torch import Tensor

from mezzotint.errors import FormatError
from mezzotint.formats.catalog import BFLOAT16, FLOAT8_E4M3FN, FLOAT16, FLOAT32, TFLOAT32, find_format
from mezzotint.formats.rounding import Overflow, Rounding, round_scalar
from mezzotint.formats.spec import FloatFormat
from mezzotint.kernels import generic, tensors
from mezzotint.kernels.target import target
from mezzotint.kernels.tensors import decode_codes, dtype_of, encode, round_to

DETERMINISTIC = [Rounding.NEAREST_EVEN, Rounding.TOWARD_ZERO]


def overflows_of(fmt: FloatFormat) -> list[Overflow]:
    modes = [Overflow.SATURATE]
    return modes + [Overflow.INFINITY] * fmt.has_infinity + [Overflow.NAN] * fmt.has_nan


CASES = [
    pytest.param(fmt, rounding, overflow, id=f"{fmt.name}-{rounding}-{overflow}")
    for fmt in TARGETS
    for rounding in DETERMINISTIC
    for overflow in overflows_of(fmt)
]


@pytest.mark.parametrize(("fmt", "rounding", "overflow"), CASES)
def test_agrees_with_the_scalar_oracle_at_critical_numbers(
    fmt: FloatFormat, rounding: Rounding, overflow: Overflow
) -> None:
    source = critical(fmt)
    expected = torch.tensor([round_scalar(float(x), fmt, rounding, overflow) for x in source], dtype=torch.float32)
    assert same(round_to(source, fmt, rounding=rounding, overflow=overflow), expected)


@pytest.mark.parametrize(("fmt", "rounding", "overflow"), CASES)
@pytest.mark.parametrize("numbers", [all_sorts, moderate])
def test_torch_operations_give_the_same_bits(
    fmt: FloatFormat, rounding: Rounding, overflow: Overflow, numbers: Callable[[], Tensor]
) -> None:
    source = numbers()
    compiled = round_to(source, fmt, rounding=rounding, overflow=overflow)
    assert same(generic.round_values(source, target(fmt, overflow), rounding, 0, 0), compiled)


@pytest.mark.parametrize("fmt", [fmt for fmt in TARGETS if dtype_of(fmt) or fmt.bits < 8], ids=str)
@pytest.mark.parametrize("numbers", [all_sorts, moderate])
def test_agrees_with_ml_dtypes(fmt: FloatFormat, numbers: Callable[[], Tensor]) -> None:
    """ml_dtypes overflows as we do when nothing is said; it has no NaN where the format has none, nor have we codes."""
    source = torch.cat([numbers(), critical(fmt)])
    if not fmt.has_nan:
        source = source[source.isfinite()]
    dtype = getattr(ml_dtypes, fmt.name, None) or np.dtype(fmt.name)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = source.numpy().astype(dtype)
    assert same(round_to(source, fmt), torch.from_numpy(cast.astype(np.float32)))
    codes = encode(source, fmt)
    words = codes.view({1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[codes.element_size()]).numpy()
    is_number = ~np.isnan(cast.astype(np.float32))
    assert np.array_equal(words[is_number], cast.view(words.dtype)[is_number])


@pytest.mark.parametrize("fmt", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_input_rounds_as_its_float32_value(fmt: FloatFormat, dtype: torch.dtype) -> None:
    source = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)
    for rounding in DETERMINISTIC:
        expected = round_to(source.float(), fmt, rounding=rounding)
        assert same(round_to(source, fmt, out=torch.empty(1 << 16), rounding=rounding), expected)
    if source.dtype is torch.float16 and fmt.bits == 32:
        assert same(expected, source.float())


@pytest.mark.parametrize("fmt", [BFLOAT16, FLOAT16], ids=str)
def test_agrees_with_torch_casts_on_every_16_bit_input_and_tie(fmt: FloatFormat) -> None:
    dtype = dtype_of(fmt)
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    finite = values[values.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()) / 2
    exact = ties[ties.float().double() == ties].float()
    for source in (values, exact, torch.nextafter(exact, torch.tensor(torch.inf))):
        assert same(round_to(source, fmt), source.to(dtype).float())
        assert same(round_to(source, fmt, out=torch.empty_like(source, dtype=dtype)).float(), source.to(dtype).float())


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=50), st.sampled_from(TARGETS), st.sampled_from(DETERMINISTIC))
def test_agrees_with_the_scalar_oracle_on_chosen_numbers(
    values: list[float], fmt: FloatFormat, rounding: Rounding
) -> None:
    source = torch.tensor(values, dtype=torch.float32)
    rounded = round_to(source, fmt, rounding=rounding)
    for x, y in zip(source.tolist(), rounded.tolist(), strict=True):
        if math.isnan(x):
            assert math.isnan(y)
            continue
        expected = round_scalar(x, fmt, rounding)
        assert (math.isnan(expected) and math.isnan(y)) or (
            expected == y and math.copysign(1, expected) == math.copysign(1, y)
        )


@pytest.mark.parametrize("fmt", TARGETS, ids=str)
@pytest.mark.parametrize("rounding", Rounding)
def test_rounding_is_idempotent_and_monotone(fmt: FloatFormat, rounding: Rounding) -> None:
    source = torch.cat([all_sorts(), moderate()])
    once = round_to(source, fmt, rounding=rounding, overflow=Overflow.SATURATE)
    assert same(round_to(once, fmt, rounding=rounding, seed=9, overflow=Overflow.SATURATE), once)
    if rounding is not Rounding.STOCHASTIC:
        ordered = round_to(source[~source.isnan()].sort().values, fmt, rounding=rounding, overflow=Overflow.SATURATE)
        assert bool((ordered.diff() >= 0).all())


@pytest.mark.parametrize("fmt", NARROW, ids=str)
@pytest.mark.parametrize("rounding", Rounding)
def test_codes_stand_for_the_rounded_numbers(fmt: FloatFormat, rounding: Rounding) -> None:
    source = moderate()
    choice = {"rounding": rounding, "overflow": Overflow.SATURATE, "seed": 3}
    codes = round_to(source, fmt, out=torch.empty_like(source, dtype=torch.uint8), **choice)
    assert same(decode_codes(codes, fmt), round_to(source, fmt, **choice))
    narrow = source.bfloat16()
    again = round_to(narrow, fmt, out=torch.empty_like(codes), **choice)
    assert same(decode_codes(again, fmt), round_to(narrow.float(), fmt, **choice))


@pytest.mark.parametrize("fmt", TARGETS, ids=str)
@pytest.mark.parametrize("size", [0, 1, 15, 1023, 1024, 1025, 2047, 2049, 5000])
def test_any_length_in_place_and_into_every_container(fmt: FloatFormat, size: int) -> None:
    source = moderate(count=size)
    for rounding in Rounding:
        expected = round_to(source, fmt, rounding=rounding)
        assert same(generic.round_values(source, target(fmt, None), rounding, 0, 0), expected)
        place = source.clone()
        assert round_to(place, fmt, out=place, rounding=rounding) is place
        assert same(place, expected)
        for dtype in (torch.bfloat16, torch.float16):
            container = torch.empty(size, dtype=dtype)
            if tensors._holds(tensors.format_of(dtype), fmt):
                assert same(round_to(source, fmt, out=container, rounding=rounding).float(), expected)


def test_layouts_do_not_matter() -> None:
    source = moderate(count=3 * 4 * 5 * 6).view(3, 4, 5, 6)
    expected = round_to(source, "e4m3")
    permuted = source.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not permuted.is_contiguous()
    assert same(round_to(permuted, "e4m3"), expected)
    assert same(round_to(permuted, "e4m3", out=torch.empty(3, 4, 5, 6)), expected)
    sliced = moderate(count=2000)[::3]
    assert same(round_to(sliced, "fp16"), round_to(sliced.contiguous(), "fp16"))
    wide = torch.zeros(10, 20)
    round_to(source.flatten()[:100].view(10, 10), "e4m3", out=wide[:, ::2])
    assert same(wide[:, ::2].flatten(), expected.flatten()[:100])
    assert not wide[:, 1::2].any()
    expanded = torch.tensor([0.3]).expand(4)
    assert round_to(expanded, "e4m3").tolist() == [0.3125] * 4
    assert round_to(torch.tensor(0.3), "e4m3").item() == 0.3125


def test_overlapping_tensors_are_read_before_they_are_written() -> None:
    buffer = moderate(count=5000)
    expected = round_to(buffer[:4999].clone(), "e4m3")
    round_to(buffer[:4999], "e4m3", out=buffer[1:])
    assert same(buffer[1:], expected)
    words = moderate(count=1000)
    halves = round_to(words.clone(), "bf16", out=torch.empty(1000, dtype=torch.bfloat16))
    place = words.view(torch.bfloat16)[:1000]
    round_to(words, "bf16", out=place)
    assert same(place.float(), halves.float())


def test_gradients_and_parameters() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.3, 1e-9]))
    rounded = round_to(weight, "e4m3")
    assert not rounded.requires_grad
    round_to(weight, "e4m3", out=weight)
    assert weight.tolist() == [0.3125, 0.0]
    assert weight.requires_grad


def test_under_fake_tensors_and_compile() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert round_to(torch.empty(5, 7), "e4m3").shape == (5, 7)
    assert round_to(torch.empty(5, 7, device="meta"), "e4m3").device.type == "meta"
    captured = torch.compile(lambda x: round_to(x, "e4m3"), backend="eager", fullgraph=True)
    assert same(captured(moderate()), round_to(moderate(), "e4m3"))


def test_flushing_subnormals_changes_nothing_within_range() -> None:
    source = torch.cat(
        [moderate(), torch.arange(1 << 10, dtype=torch.int32).to(torch.uint16).view(torch.float16).float()]
    )
    expected = [round_to(source, fmt) for fmt in (FLOAT16, FLOAT8_E4M3FN)]
    half = source.half()
    from_half = round_to(half, TFLOAT32, out=torch.empty_like(source))
    try:
        assert torch.set_flush_denormal(True)
        assert [
            same(round_to(source, fmt), want) for fmt, want in zip((FLOAT16, FLOAT8_E4M3FN), expected, strict=True)
        ] == [True] * 2
        assert same(round_to(half, TFLOAT32, out=torch.empty_like(source)), from_half)
    finally:
        torch.set_flush_denormal(False)


def test_float32_is_kept() -> None:
    assert same(round_to(all_sorts(), FLOAT32), all_sorts())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: round_to(torch.zeros(2, dtype=torch.float64), "e4m3"), "tensors of torch.float64 are not rounded"),
        (lambda: round_to(torch.zeros(2, dtype=torch.int32), "e4m3"), "tensors of torch.int32 are not rounded"),
        (lambda: round_to(torch.zeros(2), "float64"), "does not hold every number of float64"),
        (lambda: round_to(torch.zeros(2), "e8m0"), "tensors are not rounded to float8_e8m0fnu"),
        (lambda: round_to(torch.zeros(2, dtype=torch.bfloat16), "fp16"), "torch.bfloat16 does not hold every number"),
        (lambda: round_to(torch.zeros(2), "fp16", out=torch.zeros(2, dtype=torch.bfloat16)), "pass out= of float32"),
        (lambda: round_to(torch.zeros(2), "fp16", out=torch.zeros(2, dtype=torch.uint8)), "pass out= of float32"),
        (lambda: round_to(torch.zeros(2), "e4m3", out=torch.zeros(3)), "pass out= of the same shape and device"),
        (lambda: round_to(torch.zeros(2), "e4m3", overflow=Overflow.INFINITY), "has no infinity"),
        (lambda: round_to(torch.zeros(2), "e4m3x"), "unknown number format"),
        (lambda: encode(torch.tensor([1.0, math.nan]), "fp4"), "has no NaN and the tensor has some"),
        (lambda: decode_codes(torch.tensor([16], dtype=torch.uint8), "fp4"), "code 16 is outside"),
        (lambda: decode_codes(torch.tensor([1.0]), "fp4"), "codes must be uint8 and of a format of up to 8 bits"),
        (lambda: round_to(torch.zeros(2), "e4m3", rounding="up"), "unknown rounding 'up'"),
        (lambda: tensors.format_of(torch.int8), "torch.int8 stores no number format"),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call()


def test_a_nan_asked_of_a_format_without_one_stays_a_nan_among_numbers() -> None:
    assert round_to(torch.tensor([math.nan, 7.0]), "fp4").tolist()[1] == 6.0
    assert math.isnan(round_to(torch.tensor([math.nan, 7.0]), "fp4").tolist()[0])


@pytest.mark.cuda
@pytest.mark.parametrize("fmt", TARGETS, ids=str)
@pytest.mark.parametrize("rounding", Rounding)
def test_cuda_gives_the_same_bits(fmt: FloatFormat, rounding: Rounding) -> None:
    source = torch.cat([all_sorts(), moderate(), critical(fmt)])
    on_gpu = round_to(source.cuda(), fmt, rounding=rounding, seed=5, offset=6)
    assert same(on_gpu.cpu(), round_to(source, fmt, rounding=rounding, seed=5, offset=6))


def test_formats_and_dtypes_are_twins() -> None:
    for dtype in (torch.float64, torch.bfloat16, torch.float8_e5m2fnuz):
        assert dtype_of(tensors.format_of(dtype)) is dtype
    assert dtype_of(find_format("fp4")) is None
