"""The gate's kernels and its exponential function against float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.kernels import gates
from mezzotint.kernels.constants import BFLOAT16, FLOAT16, FLOAT32

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
UNIT = 2.0**-24  # half an ulp of 1 in float32


def decays(numbers: np.ndarray) -> np.ndarray:
    numbers = np.ascontiguousarray(numbers, np.float32)
    out = np.empty_like(numbers)
    gates.decays(numbers.ctypes.data, out.ctypes.data, numbers.size)
    return out


def assert_exponential(numbers: np.ndarray) -> None:
    """Assert an error below a unit in the last place, which the bound of 1.6 allows for but is not known to reach."""
    exact = np.exp(-np.abs(numbers.astype(np.float64)))
    error = np.abs(decays(numbers) - exact)
    unit = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (error < unit).all(), (error / unit).max()


def test_the_exponential_of_every_bfloat16_number_and_of_a_fine_grid() -> None:
    words = np.arange(1 << 16, dtype=np.uint32)
    every = (words << 16).view(np.float32)
    assert_exponential(every[~np.isnan(every)])
    assert_exponential(np.linspace(-105, 105, (1 << 21) + 5).astype(np.float32))
    # all float32 numbers around the half-way points of the reduction, where |r| is largest, and around whole ones
    for n in (-149.5, -126.5, -3.5, -1.0, -0.5):
        start = np.float32(n * math.log(2)).view(np.uint32)
        assert_exponential((start + np.arange(-3000, 3000)).astype(np.uint32).view(np.float32))


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_the_exponential_of_any_numbers(numbers: list[float]) -> None:
    assert_exponential(np.array(numbers, np.float32))


def test_the_ends_of_the_exponential() -> None:
    """exp(-100) is subnormal; exp(-103.97) is where rounding to 2^-149 ends; NaN of any bits stays."""
    ends = decays(np.array([np.inf, -np.inf, 0.0, -0.0, 100.0, -100.0, 103.9, 104.1, 3e38], np.float32))
    exact = np.exp(np.float64(-100.0)).astype(np.float32)
    assert ends.tolist() == [0, 0, 1, 1, exact, exact, 2.0**-149, 0, 0]
    nans = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFF812345, 0x7FC001FF] * 20, np.uint32)
    assert np.isnan(decays(nans.view(np.float32))).all()


def compute(gate: Tensor, up: Tensor, grad: Tensor, width: int, num_threads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Run both kernels on 2-D tensors with gaps between rows, or on dense ones in rows of any width."""
    out, grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(3))
    is_dense = gate.is_contiguous() and up.is_contiguous() and grad.is_contiguous()

    def row_bytes(tensor: Tensor) -> int:
        return (width if is_dense else tensor.stride(0)) * tensor.element_size()

    shape = {"kind": KINDS[gate.dtype], "width": width, "count": gate.numel(), "num_threads": num_threads}
    factors = {
        "gate": gate.data_ptr(),
        "gate_bytes": row_bytes(gate),
        "up": up.data_ptr(),
        "up_bytes": row_bytes(up),
    }
    gates.swiglu_forward(**factors, **shape, out=out.data_ptr())
    gates.swiglu_backward(
        **factors,
        **shape,
        grad=grad.data_ptr(),
        grad_bytes=row_bytes(grad),
        grad_gate=grad_gate.data_ptr(),
        grad_up=grad_up.data_ptr(),
    )
    return out, grad_gate, grad_up


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


def assert_gate(gate: Tensor, up: Tensor, grad: Tensor, got: tuple[Tensor, Tensor, Tensor]) -> None:
    """Assert bounds of first order in u = 2^-24, with 1 % for the rest.

    The exponential e is off by an ulp, 2 u or 2^-149; 1 + e by 2 u, as e is at most half of it; so silu, g (e or 1) /
    (1 + e), by 2 + 1 + 2 + 1 = 6 and y by 7. Of s and 1 - s, one is 1 / (1 + e), off by 3, the other e times that, off
    by 6. du takes two products, 8. In dg, 1 + g (1 - s) is off by 6 |g (1 - s)| and a rounding of the sum, to which s,
    the product with it, dy u and the last product add 6 + 1 + 1 + 1 of the sum.

    What a subnormal e loses, 2^-149, is multiplied by all that follows.
    """
    g, v, d = gate.double(), up.double(), grad.double()
    s, rest = torch.sigmoid(g), torch.sigmoid(-g)
    u = 1.01 * UNIT
    lost = 8 * 2.0**-149 * (1 + g.abs())
    y = g * s * v
    assert_rounded(got[0], y, 7 * u * y.abs() + lost * (1 + v.abs()))
    inner = 1 + g * rest
    slack = (d * v).abs() * s * u * (6 * (g * rest).abs() + 10 * inner.abs())
    assert_rounded(got[1], d * v * s * inner, slack + lost * (1 + (d * v).abs()))
    assert_rounded(got[2], d * g * s, 8 * u * (d * g * s).abs() + lost * (1 + d.abs()))


@settings(deadline=None, max_examples=100)
@given(
    dtype=st.sampled_from(list(KINDS)),
    num_rows=st.integers(1, 40),
    width=st.integers(1, 200),
    gaps=st.tuples(*[st.integers(0, 3)] * 3),
    scale=st.sampled_from([0.01, 1.0, 10.0, 60.0]),
    seed=st.integers(0, 2**32),
)
@example(dtype=torch.bfloat16, num_rows=3, width=8200, gaps=(1, 0, 0), scale=1.0, seed=0)
def test_results_are_rounded_once(
    dtype: torch.dtype, num_rows: int, width: int, gaps: tuple[int, int, int], scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(gap: int, size: float) -> Tensor:
        return (size * torch.randn(num_rows, width + gap, generator=generator)).to(dtype)[:, :width]

    gate, up, grad = draw(gaps[0], scale), draw(gaps[1], 1.0), draw(gaps[2], 1.0)
    assert_gate(gate, up, grad, compute(gate, up, grad, width))


@pytest.mark.parametrize("dtype", KINDS)
def test_every_number_of_sixteen_bits_through_the_gate(dtype: torch.dtype) -> None:
    if dtype is torch.float32:
        gate = torch.linspace(-110, 110, (1 << 16) + 3)
    else:
        gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    gate = gate[gate.isfinite() & (gate.abs() < 1e30)]  # so that products stay in range
    up, grad = torch.full_like(gate, 1.5), torch.full_like(gate, -0.75)
    assert_gate(gate, up, grad, compute(gate, up, grad, 8192))


@pytest.mark.parametrize("dtype", KINDS)
def test_numbers_that_are_none(dtype: torch.dtype) -> None:
    """silu(-inf) is NaN, as torch has it; +inf times what is beside it is infinite."""
    gate = torch.tensor([math.nan, -math.inf, math.inf, math.inf, 1.0, 0.0], dtype=dtype).repeat(9)
    up = torch.tensor([1.0, 1.0, 2.0, -2.0, math.nan, math.inf], dtype=dtype).repeat(9)
    out, _, _ = compute(gate, up, torch.ones_like(gate), 7)
    expected = torch.nn.functional.silu(gate.double()) * up.double()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", KINDS)
def test_neither_threads_nor_the_width_of_rows_change_a_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(70001, generator=generator).to(dtype) for _ in range(3))
    alone = compute(gate, up, grad, 8192)
    for width, num_threads in ((8192, 2), (8192, 8), (1000, 3), (70001, 1), (1 << 20, 4)):
        for one, other in zip(alone, compute(gate, up, grad, width, num_threads), strict=True):
            assert torch.equal(one, other)
