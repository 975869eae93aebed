"""The formats against ml_dtypes, numpy and torch: limits, every code, every tie, both ends of every range."""

import math
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.errors import FormatError
from mezzotint.formats.catalog import (
    BLOCK_FORMATS,
    FLOAT4_E2M1FN,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E8M0FNU,
    FLOAT16,
    FLOAT32,
    FORMATS,
    find_format,
)
from mezzotint.formats.codec import decode, encode
from mezzotint.formats.rounding import Overflow, Rounding, default_overflow, round_scalar, ulp_at
from mezzotint.formats.spec import FloatFormat, Specials

# names in ml_dtypes; float64, float32 and float16 are numpy's own
THEIRS = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "float6_e3m2fn": ml_dtypes.float6_e3m2fn,
    "float6_e2m3fn": ml_dtypes.float6_e2m3fn,
    "float4_e2m1fn": ml_dtypes.float4_e2m1fn,
}
SMALL = [find_format(name) for name in THEIRS]
IDS = [fmt.name for fmt in SMALL]
TINY = [fmt for fmt in SMALL if fmt.bits <= 8]


def same(left: float, right: float) -> bool:
    if math.isnan(left) or math.isnan(right):
        return math.isnan(left) and math.isnan(right)
    return left == right and math.copysign(1, left) == math.copysign(1, right)


def theirs(fmt: FloatFormat) -> list[float]:
    """Return what each code stands for, by ml_dtypes or numpy."""
    dtype = THEIRS[fmt.name]
    width = np.uint16 if fmt.bits == 16 else np.uint8
    with np.errstate(invalid="ignore"):  # numpy warns when it widens a signalling NaN
        return np.arange(fmt.num_codes, dtype=width).view(dtype).astype(np.float64).tolist()


@pytest.mark.parametrize("fmt", SMALL, ids=IDS)
def test_every_code_decodes_as_ml_dtypes_does_and_encodes_back(fmt: FloatFormat) -> None:
    num_nans = 0
    for code, expected in enumerate(theirs(fmt)):
        got = decode(code, fmt)
        assert same(got, expected), (code, got, expected)
        if math.isnan(got):
            num_nans += 1
        else:
            assert encode(got, fmt) == code
    assert num_nans == fmt.num_nans


@pytest.mark.parametrize("fmt", SMALL, ids=IDS)
def test_limits_are_those_of_the_codes(fmt: FloatFormat) -> None:
    finite = sorted(value for value in theirs(fmt) if math.isfinite(value) and value > 0)
    assert fmt.max == finite[-1]
    assert fmt.smallest_subnormal == finite[0]
    assert fmt.epsilon == min(value for value in finite if value > 1) - 1
    assert fmt.smallest_normal in finite
    assert fmt.has_infinity == (math.inf in theirs(fmt))


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2",
                                  "float8_e4m3fnuz", "float8_e5m2fnuz"])  # fmt: skip
def test_limits_are_torchs(name: str) -> None:
    fmt, info = find_format(name), torch.finfo(getattr(torch, name))
    assert fmt.max == info.max
    assert fmt.smallest_normal == info.smallest_normal
    if name == "float8_e5m2fnuz":
        assert info.eps == 0.125  # a fault of torch's: the format's neighbour of 1 is 1.25, as ml_dtypes' codes say
    else:
        assert fmt.epsilon == info.eps
    assert fmt.bits == info.bits


@pytest.mark.parametrize("fmt", TINY, ids=[fmt.name for fmt in TINY])
def test_rounding_at_every_neighbour_tie_and_beside(fmt: FloatFormat) -> None:
    """Every pair of neighbours: themselves, their tie, the float32 numbers on both sides of it, with both signs."""
    dtype = THEIRS[fmt.name]
    numbers = sorted({abs(value) for value in theirs(fmt) if math.isfinite(value)})
    points = [x for a, b in pairwise(numbers) for x in _around((a + b) / 2)]
    points += [*numbers, *(_around(fmt.max + float(ulp_at(Fraction(fmt.max), fmt)) / 2)), fmt.max * 3, math.inf]
    if fmt.has_zero:
        points += _around(fmt.smallest_subnormal / 2)
    signed = [*points, *(-p for p in points)] if fmt.is_signed else [p for p in points if p > 0]
    with np.errstate(all="ignore"):
        expected = np.array(signed).astype(dtype).astype(np.float64)
    for point, want in zip(signed, expected.tolist(), strict=True):
        got = round_scalar(point, fmt)
        if fmt is FLOAT8_E8M0FNU and got != want:
            continue  # ml_dtypes rounds to this format by another rule; its codes are compared above
        assert same(got, want), (point, got, want)


def _around(point: float) -> list[float]:
    """Return a float32 number and its float32 neighbours; ml_dtypes takes float64 by way of float32, rounding twice."""
    number = np.float32(point)
    return [float(np.nextafter(number, np.float32(-np.inf))), point, float(np.nextafter(number, np.float32(np.inf)))]


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
@settings(max_examples=1500, deadline=None)
@given(bits=st.integers(0, 2**32 - 1))
def test_float32_rounds_as_torch_casts(name: str, dtype: torch.dtype, bits: int) -> None:
    value = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    assert same(round_scalar(value.item(), find_format(name)), value.to(dtype).item())


@pytest.mark.parametrize("fmt", TINY, ids=[fmt.name for fmt in TINY])
@pytest.mark.parametrize("overflow", Overflow)
@pytest.mark.parametrize("rounding", [Rounding.NEAREST_EVEN, Rounding.TOWARD_ZERO])
def test_overflow_modes(fmt: FloatFormat, overflow: Overflow, rounding: Rounding) -> None:
    lacks = {Overflow.INFINITY: not fmt.has_infinity, Overflow.NAN: not fmt.has_nan, Overflow.SATURATE: False}
    if lacks[overflow]:
        with pytest.raises(FormatError, match=f"overflow={overflow} is refused"):
            round_scalar(1.0, fmt, rounding, overflow)
        return
    beyond = {Overflow.INFINITY: math.inf, Overflow.NAN: math.nan, Overflow.SATURATE: fmt.max}[overflow]
    far = fmt.max * 4
    assert same(round_scalar(far, fmt, rounding, overflow), fmt.max if rounding is Rounding.TOWARD_ZERO else beyond)
    assert same(round_scalar(math.inf, fmt, rounding, overflow), beyond)
    assert round_scalar(fmt.max, fmt, rounding, overflow) == fmt.max


@settings(max_examples=300, deadline=None)
@given(
    fmt=st.sampled_from(SMALL),
    pair=st.tuples(st.floats(allow_nan=False, width=32), st.floats(allow_nan=False, width=32)),
    rounding=st.sampled_from([Rounding.NEAREST_EVEN, Rounding.TOWARD_ZERO]),
)
def test_rounding_is_monotone_and_idempotent(fmt: FloatFormat, pair: tuple[float, float], rounding: Rounding) -> None:
    low, high = sorted(pair) if fmt.is_signed else sorted((abs(pair[0]), abs(pair[1])))
    ours = [round_scalar(x, fmt, rounding, Overflow.SATURATE) for x in (low, high)]
    assert ours[0] <= ours[1]
    assert all(same(round_scalar(x, fmt, rounding, Overflow.SATURATE), x) for x in ours)


@settings(max_examples=200, deadline=None)
@given(fmt=st.sampled_from([f for f in SMALL if f.has_zero]), share=st.floats(0.001, 0.99), draw=st.floats(0, 0.999))
def test_stochastic_rounding_goes_up_below_the_fraction(fmt: FloatFormat, share: float, draw: float) -> None:
    value = share * min(fmt.max, 1e30)
    down = round_scalar(value, fmt, Rounding.TOWARD_ZERO)
    fraction = (Fraction(value) - Fraction(down)) / ulp_at(Fraction(value), fmt)
    got = round_scalar(value, fmt, Rounding.STOCHASTIC, draw=draw)
    assert (got > down) == (Fraction(draw) < fraction)
    assert round_scalar(down, fmt, Rounding.STOCHASTIC, draw=draw) == down


def test_what_a_format_lacks_is_refused() -> None:
    with pytest.raises(FormatError, match="has no NaN"):
        round_scalar(math.nan, FLOAT4_E2M1FN)
    with pytest.raises(FormatError, match="no sign"):
        round_scalar(-1.0, FLOAT8_E8M0FNU)
    with pytest.raises(FormatError, match="no infinity"):
        encode(math.inf, FLOAT8_E4M3FN)
    with pytest.raises(FormatError, match="round it first"):
        encode(0.3, FLOAT16)
    with pytest.raises(FormatError, match="outside"):
        decode(1 << 16, FLOAT16)
    assert default_overflow(FLOAT8_E5M2) is Overflow.INFINITY
    assert default_overflow(FLOAT8_E4M3FN) is Overflow.NAN
    assert default_overflow(FLOAT4_E2M1FN) is Overflow.SATURATE


def test_names_and_aliases_are_unique_and_found() -> None:
    words = [word for fmt in FORMATS for word in (fmt.name, *fmt.aliases)]
    assert len(words) == len(set(words))
    for fmt in FORMATS:
        assert fmt.specification
        for word in (fmt.name, *fmt.aliases, fmt.name.upper()):
            assert find_format(word) is fmt
    with pytest.raises(FormatError, match="did you mean float16"):
        find_format("float17")


def test_a_format_is_a_value() -> None:
    with pytest.raises(AttributeError):
        FLOAT32.bias = 3  # type: ignore[misc]
    with pytest.raises(FormatError, match="do not fit"):
        FloatFormat(
            name="x", bits=8, exponent_bits=5, mantissa_bits=3, bias=1, specials=Specials.IEEE, specification=""
        )


def test_block_formats_store_what_their_specification_says() -> None:
    bits = {fmt.name: fmt.bits for fmt in BLOCK_FORMATS}
    assert bits["mxfp8_e4m3"] == 8.25
    assert bits["mxfp4"] == 4.25
    assert bits["nvfp4"] == 4.5


@pytest.mark.parametrize(("name", "digits"), [("float64", 15), ("float32", 6), ("bfloat16", 2), ("float16", 3)])
def test_decimal_digits_are_those_of_c(name: str, digits: int) -> None:
    assert find_format(name).decimal_digits == digits
