"""What the tests of CPU kernels share: kernels forced on, memory layouts, and the error that an operation may make."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mezzotint.lowprec import gate, switch

DTYPES = (torch.bfloat16, torch.float16)
UNIT = 2.0**-24  # half an ulp of 1 in float32


@contextmanager
def forced(path: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute both formats by one path, whatever this processor does natively."""
    monkeypatch.setenv(switch.VARIABLE, path)
    saved, packs = dict(switch._choices), dict(gate._packs)
    switch._choices.clear()
    yield
    switch._choices.clear()
    switch._choices.update(saved)
    gate._packs.update(packs)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Return the same numbers stored by rows (N), by columns (T), with gaps (S), or as the last rows of more (R)."""
    if layout == "T":
        return values.mT.contiguous().mT
    if layout == "S":
        wide = values.new_zeros(*values.shape[:-2], values.shape[-2] * 2, values.shape[-1] * 2)
        wide[..., ::2, ::2] = values
        return wide[..., ::2, ::2]
    if layout == "R":
        return torch.cat((values.new_ones(*values.shape[:-2], 3, values.shape[-1]), values), dim=-2)[..., 3:, :]
    return values


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighbours of `dtype` around float64 values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def assert_rounded_once(got: Tensor, exact: Tensor, magnitude: Tensor, num_terms: int) -> None:
    """Assert that `got` is the rounding of a float32 sum whose exact value is `exact`.

    A float32 sum of n products in any order errs by at most n u / (1 - n u) times the sum of their magnitudes (Higham
    2002, Accuracy and Stability of Numerical Algorithms, section 3.1), u = 2^-24; rounding adds half an ulp of the
    result, taken at what the sum may have been. Sums that leave float32 or the format are not compared.
    """
    assert got.shape == exact.shape
    n = num_terms + 2
    summed = magnitude * (n * UNIT / (1 - n * UNIT)) + n * 2.0**-149
    allowed = summed + ulp(exact.abs() + summed, got.dtype) / 2
    is_inside = exact.abs() + allowed < torch.finfo(got.dtype).max
    error = (got.double() - exact).abs()
    assert bool((error <= allowed)[is_inside].all()), float((error / allowed)[is_inside].max())


def assert_linear(operation: Callable[..., Tensor], low: Sequence[Tensor], num_terms: int, got: Tensor) -> None:
    """Assert the bound for an operation that sums products: the magnitudes are its result for magnitudes."""
    exact = operation(*(t.double() for t in low))
    magnitude = operation(*(t.double().abs() for t in low))
    assert_rounded_once(got, exact, magnitude, num_terms)
