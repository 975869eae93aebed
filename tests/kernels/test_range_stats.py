"""Range statistics against numpy, in both implementations."""

import math

import numpy as np
import pytest
import torch
from inputs import all_sorts, moderate
from torch import Tensor

from mezzotint.errors import FormatError
from mezzotint.kernels import generic
from mezzotint.kernels.tensors import format_of, range_stats

KINDS = {
    "all sorts": all_sorts(),
    "moderate": moderate(),
    "normal": torch.randn(100_003, generator=torch.Generator().manual_seed(0)),
    "half zeros": torch.randn(20_000, generator=torch.Generator().manual_seed(1)).relu(),
    "zeros": torch.zeros(9000),
    "one exponent": torch.full((9000,), 1.5),
    "one infinity": torch.cat([torch.ones(8191), torch.tensor([-math.inf]), torch.ones(5)]),
    "subnormals": torch.tensor([2.0**-149, -(2.0**-130), 0.0, -0.0, 2.0**-126, 1.0]),
    "the largest": torch.tensor([torch.finfo(torch.float32).max, -1.0]),
    "NaN alone": torch.full((3,), math.nan),
    "nothing": torch.zeros(0),
    "a number": torch.tensor(-3.0),
}


def expected_exponents(source: Tensor) -> list[int]:
    bits = source.float().flatten().numpy().view(np.uint32)
    return np.bincount((bits >> 23) & 255, minlength=256).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2, torch.float64])
def test_counts_what_numpy_counts(kind: str, dtype: torch.dtype) -> None:
    source = KINDS[kind].to(dtype)
    got = range_stats(source)
    numbers = source.double().flatten()
    finite = numbers[numbers.isfinite()].abs()
    apart = finite[finite > 0]
    assert got.count == source.numel()
    assert got.nans == int(numbers.isnan().sum())
    assert got.infinities == int(numbers.isinf().sum())
    assert got.zeros == int((numbers == 0).sum())
    assert got.subnormals == int((apart < format_of(dtype).smallest_normal).sum())
    assert got.amax == (float(finite.max()) if finite.numel() else 0.0)
    assert got.smallest == (float(apart.min()) if apart.numel() else math.inf)
    assert got.is_finite == bool(numbers.isfinite().all())
    assert list(got.exponents) == expected_exponents(source)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_operations_count_the_same(kind: str, dtype: torch.dtype) -> None:
    source = KINDS[kind].to(dtype)
    fmt = format_of(dtype)
    assert generic.range_stats(source.float().flatten(), fmt.min_exponent) == range_stats(source)


@pytest.mark.parametrize("size", [1, 31, 127, 128, 129, 4095, 4096, 4097, 12_289])
def test_any_length_and_layout(size: int) -> None:
    source = moderate(count=size)
    assert list(range_stats(source).exponents) == expected_exponents(source)
    strided = moderate(count=2 * size)[::2]
    assert list(range_stats(strided).exponents) == expected_exponents(strided.contiguous())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 4095, 4097, 8192 + 70])
def test_words_of_16_bits_count_as_float32_does(dtype: torch.dtype, size: int) -> None:
    words = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    normal = words[(words.isfinite()) & ((words.abs() >= torch.finfo(dtype).smallest_normal) | (words == 0))]
    order = torch.randperm(normal.numel(), generator=torch.Generator().manual_seed(size))
    for source in (normal[order][:size], normal[:size], normal.flip(0)[:size], words[:size], words.flip(0)[:size]):
        got = range_stats(source.contiguous())
        assert list(got.exponents) == expected_exponents(source)
        wide = range_stats(source.float())
        assert (got.amax, got.smallest, got.zeros, got.nans) == (wide.amax, wide.smallest, wide.zeros, wide.nans)
    assert list(range_stats(words).exponents) == expected_exponents(words)


def test_layouts_and_parameters() -> None:
    source = moderate(count=3 * 4 * 5 * 6).view(3, 4, 5, 6)
    assert range_stats(source.permute(3, 0, 2, 1)) == range_stats(source)
    assert range_stats(torch.nn.Parameter(source)) == range_stats(source)


def test_spread_over_every_exponent() -> None:
    source = torch.ldexp(torch.ones(253 * 64), torch.arange(253).repeat(64) - 126)
    got = range_stats(source)
    assert list(got.exponents[1:254]) == [64] * 253
    assert sum(got.exponents) == got.count


def test_float64_beyond_float32_lies_at_the_ends() -> None:
    got = range_stats(torch.tensor([1e300, 1e-300, 0.0, 1.0], dtype=torch.float64))
    assert (got.amax, got.smallest, got.zeros, got.subnormals) == (1e300, 1e-300, 1, 0)
    assert (got.exponents[254], got.exponents[0], got.exponents[127]) == (1, 2, 1)


def test_refuses_integers() -> None:
    with pytest.raises(FormatError, match="int64 stores no number format"):
        range_stats(torch.arange(3))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_counts_the_same(kind: str) -> None:
    assert range_stats(KINDS[kind].cuda()) == range_stats(KINDS[kind])
