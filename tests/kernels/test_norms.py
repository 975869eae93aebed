"""RMSNorm's kernels against float64: each result is one rounding away from what float32 sums may be off by."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.kernels import norms
from mezzotint.kernels.constants import BFLOAT16, FLOAT16, FLOAT32

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
UNIT = 2.0**-24  # half an ulp of 1 in float32
TINY = 2.0**-140  # what subnormal intermediate results lose, with room


@dataclass
class Result:
    out: Tensor
    rstd: Tensor
    grad_x: Tensor
    grad_weight: Tensor


def compute(x: Tensor, weight: Tensor, grad: Tensor, eps: float, num_threads: int = 1) -> Result:
    """Run both kernels on rows (N, D), which may have gaps between them."""
    num_rows, width = x.shape
    found = Result(
        torch.empty(num_rows, width, dtype=x.dtype),
        torch.empty(num_rows),
        torch.empty(num_rows, width, dtype=x.dtype),
        torch.zeros(width),
    )
    rows = {
        "x": x.data_ptr(),
        "x_bytes": x.stride(0) * x.element_size(),
        "kind": KINDS[x.dtype],
        "num_rows": num_rows,
        "width": width,
        "weight": weight.data_ptr(),
        "rstd": found.rstd.data_ptr(),
        "num_threads": num_threads,
    }
    norms.rms_forward(**rows, eps=eps, out=found.out.data_ptr())
    parts = torch.zeros(norms.num_parts(num_rows), width)
    norms.rms_backward(
        **rows,
        grad=grad.data_ptr(),
        grad_bytes=grad.stride(0) * grad.element_size(),
        grad_x=found.grad_x.data_ptr(),
        parts=parts.data_ptr(),
        grad_weight=found.grad_weight.data_ptr(),
    )
    return found


def numbers(shape: tuple[int, int], gap: int, scale: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return rows with `gap` numbers of something else between them."""
    rows, width = shape
    return (scale * torch.randn(rows, width + gap, generator=generator)).to(dtype)[:, :width]


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps), exponent)


def assert_rounded(got: Tensor, exact: Tensor, slack: Tensor) -> None:
    """Assert that `got` is the rounding of a number at most `slack` from the exact one."""
    allowed = slack + ulp(exact.abs() + slack, got.dtype) / 2
    is_inside = exact.abs() + allowed < torch.finfo(got.dtype).max
    error = (got.double() - exact).abs()
    assert bool((error <= allowed)[is_inside].all()), float((error / allowed)[is_inside].max())


@settings(deadline=None, max_examples=150)
@given(
    dtype=st.sampled_from(list(KINDS)),
    num_rows=st.integers(1, 100),
    width=st.one_of(st.integers(1, 200), st.sampled_from([384, 1000, 1024])),
    gaps=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    exponent=st.integers(-10, 8),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    seed=st.integers(0, 2**32),
)
@example(dtype=torch.bfloat16, num_rows=2100, width=33, gaps=(0, 0), exponent=0, eps=1e-6, seed=0)
@example(dtype=torch.bfloat16, num_rows=2, width=8192, gaps=(1, 0), exponent=0, eps=1e-6, seed=0)
def test_results_are_rounded_once(
    dtype: torch.dtype, num_rows: int, width: int, gaps: tuple[int, int], exponent: int, eps: float, seed: int
) -> None:
    """Bounds of first order in u = 2^-24, with 1 % for the rest; Higham 2002, sections 3.1 and 4.2.

    A sum over a row rounds each term at most s = D / 64 + 16 times, and squares are positive, so their sum is off by
    s u of itself. Division by D, eps as float32 and its addition, a root that halves all that, and another division
    make r off by k = (s + 4) / 2 + 2, and y, two products later, by k + 2.

    In backward h = x r is off by k + 1, and a term of mean(dy w h) by k + 3; with s roundings in the sum and one in the
    division the mean m is off by (k + s + 4) A, where A is the mean of magnitudes, |m| <= A. So h m is off by
    |h| A (2 k + s + 6), dy w by 1, their difference by one more of each, and the product with r by k + 1 more of each.

    The gradient of the weight sums terms that are off by k + 2, rounding each at most once for each row of its block
    and once for each block.
    """
    generator = torch.Generator().manual_seed(seed)
    x = numbers((num_rows, width), gaps[0], 2.0**exponent, dtype, generator)
    grad = numbers((num_rows, width), gaps[1], 1.0, dtype, generator)
    weight = 0.5 + torch.rand(width, generator=generator)
    got = compute(x, weight, grad, eps)

    x64, grad64, w64 = x.double(), grad.double(), weight.double()
    r = (x64.square().mean(-1, keepdim=True) + eps).rsqrt()
    s = width / 64 + 16
    k = (s + 4) / 2 + 2
    u = 1.01 * UNIT
    torch.testing.assert_close(got.rstd.double(), r.squeeze(-1), rtol=k * u, atol=0)

    hat = x64 * r
    assert_rounded(got.out, hat * w64, (k + 2) * u * (hat * w64).abs() + TINY)

    weighted = grad64 * w64
    mean = (weighted * hat).mean(-1, keepdim=True)
    magnitude = (weighted * hat).abs().mean(-1, keepdim=True)
    slack = r * u * ((k + 3) * weighted.abs() + (3 * k + s + 8) * hat.abs() * magnitude) + r * TINY
    assert_rounded(got.grad_x, r * (weighted - hat * mean), slack)

    num_parts = norms.num_parts(num_rows)
    roundings = -(-num_rows // num_parts) + 1 + num_parts + k + 2
    terms = grad64 * hat
    error = (got.grad_weight.double() - terms.sum(0)).abs()
    assert bool((error <= roundings * u * terms.abs().sum(0) + TINY).all())


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(700, 384), (33, 1001), (1, 40000)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (numbers(shape, 0, 1.0, dtype, generator) for _ in range(2))
    weight = torch.rand(shape[1], generator=generator)
    alone = compute(x, weight, grad, 1e-6)
    for num_threads in (2, 3, 8):
        shared = compute(x, weight, grad, 1e-6, num_threads)
        for name in ("out", "rstd", "grad_x", "grad_weight"):
            assert torch.equal(getattr(alone, name), getattr(shared, name)), name


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("place", [0, 15, 16, 70, 383])
def test_a_nan_fills_its_row_and_an_infinity_empties_it(place: int, dtype: torch.dtype) -> None:
    """As x / rms has it: infinity / infinity is NaN, and everything else over infinity is 0."""
    x = torch.randn(3, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, place], x[2, place] = math.nan, -math.inf
    got = compute(x, torch.ones(384), torch.ones_like(x), 1e-6)
    assert bool(got.out[0].isnan().all())
    assert bool(got.out[1].isfinite().all())
    assert bool(got.out[2, place].isnan())
    others = torch.cat((got.out[2, :place], got.out[2, place + 1 :]))
    assert bool((others == 0).all())
    assert got.rstd[2] == 0
    assert bool(got.grad_weight.isnan().any())


def test_what_is_beyond_float16_becomes_infinite_and_a_nan_weight_shows() -> None:
    x = torch.ones(1, 20, dtype=torch.float16)
    weight = torch.full((20,), 1e6)
    weight[3], weight[17] = math.nan, -1e6
    out = compute(x, weight, x, 1e-6).out[0]
    assert bool(out[3].isnan())
    assert out[17] == -math.inf
    assert bool((out[[0, 1, 19]] == math.inf).all())
    bfloat16 = compute(x.bfloat16(), weight, x.bfloat16(), 1e-6).out[0]
    assert bool(bfloat16[3].isnan())
    assert bfloat16[17] == torch.tensor(-1e6).bfloat16()


@pytest.mark.parametrize("num_rows", [1, 31, 32, 33, 2048, 2049, 100_000])
def test_blocks_of_rows_cover_all_rows_and_stay_few(num_rows: int) -> None:
    assert 1 <= norms.num_parts(num_rows) <= 64
    assert norms.num_parts(num_rows) * norms._part_rows(num_rows) >= num_rows
