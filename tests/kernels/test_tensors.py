"""Stochastic rounding: exact values stay, the mean is right, NaN stays NaN, and the draw repeats."""

import pytest
import torch

from mezzotint.errors import FormatError
from mezzotint.kernels.tensors import stochastic_round


def rounded(source: torch.Tensor, seed: int = 1, offset: int = 0) -> torch.Tensor:
    out = torch.empty_like(source, dtype=torch.bfloat16)
    stochastic_round(source, out, seed=seed, offset=offset)
    return out


def test_every_bfloat16_stays_what_it_is() -> None:
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    got = rounded(codes.float())
    is_nan = codes.isnan()
    assert torch.equal(got[~is_nan].view(torch.int16), codes[~is_nan].view(torch.int16))
    assert got[is_nan].isnan().all()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FFFFFFF, 0x7F80FFFF, -1])
def test_a_nan_with_any_payload_stays_nan(bits: int) -> None:
    source = torch.full((4096,), bits, dtype=torch.int32).view(torch.float32)
    assert rounded(source).isnan().all()


@pytest.mark.parametrize("fraction", [1 / 65536, 0.125, 0.5, 0.9])
@pytest.mark.parametrize("start", [1.0, -3.0, 1e-30, 2.0**-133])
def test_goes_up_as_often_as_the_fraction_says(fraction: float, start: float) -> None:
    """Of n draws, n p go to the farther neighbour, within 5 standard deviations of the binomial, sqrt(n p (1 - p))."""
    n = 1 << 20
    low = torch.tensor(start).bfloat16().float()
    low_bits = int(low.view(torch.int32))
    high = torch.tensor(low_bits + (1 << 16), dtype=torch.int32).view(torch.float32)
    steps = round(fraction * 65536)
    source = torch.full((n,), low_bits + steps, dtype=torch.int32).view(torch.float32)
    got = rounded(source).float()
    assert set(got.unique().tolist()) <= {low.item(), high.item()}
    p = steps / 65536
    hits = int((got == high).sum())
    assert abs(hits - n * p) <= 5 * (n * p * (1 - p)) ** 0.5


def test_the_draw_follows_from_seed_and_offset() -> None:
    source = torch.linspace(0.5, 2, 10_001)
    again = rounded(source, 1, 5)
    assert torch.equal(again, rounded(source, 1, 5))
    for other in ((2, 5), (1, 6)):
        differing = (again != rounded(source, *other)).float().mean()
        assert 0.2 < float(differing) < 0.5  # a fraction uniform on [0, 1] differs with probability 1/3


def test_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    rounded(torch.ones(10))
    assert torch.equal(before, torch.get_rng_state())


def test_non_contiguous_tensors() -> None:
    source = torch.linspace(0, 1, 64).view(8, 8).t()
    out = torch.empty(8, 8, dtype=torch.bfloat16).t()
    stochastic_round(source, out, seed=1, offset=0)
    assert (out.float() - source).abs().max() <= 2.0**-8


@pytest.mark.parametrize(
    ("source", "out"),
    [
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3).double(), torch.zeros(3).bfloat16()),
        (torch.zeros(3), torch.zeros(4).bfloat16()),
    ],
)
def test_refuses_other_dtypes_and_shapes(source: torch.Tensor, out: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="float32 into bfloat16"):
        stochastic_round(source, out, seed=0, offset=0)
