"""Stochastic rounding: exact values stay, the mean is right, NaN stays NaN, and the draw repeats."""

import numpy as np
import pytest
import torch
from inputs import TARGETS, all_sorts, critical, moderate, same

from mezzotint.formats.catalog import BFLOAT16, FLOAT8_E4M3FN
from mezzotint.formats.rounding import Rounding, round_scalar
from mezzotint.formats.spec import FloatFormat
from mezzotint.kernels import generic
from mezzotint.kernels.constants import BLOCK_WORDS, COUNTERS
from mezzotint.kernels.philox import fill_block, fill_words
from mezzotint.kernels.target import target
from mezzotint.kernels.tensors import round_to


def rounded(source: torch.Tensor, seed: int = 1, offset: int = 0) -> torch.Tensor:
    out = torch.empty_like(source, dtype=torch.bfloat16)
    return round_to(source, BFLOAT16, out=out, rounding=Rounding.STOCHASTIC, seed=seed, offset=offset)


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
    round_to(source, BFLOAT16, out=out, rounding=Rounding.STOCHASTIC, seed=1)
    assert (out.float() - source).abs().max() <= 2.0**-8


# The first and last published test vectors of philox4x32 with 7 rounds: counter, key, result (Random123, kat_vectors).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0, 0, 0, 0], [0, 0], [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_gives_its_published_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    whole = counter[0] | counter[1] << 32
    block, lane = divmod(whole, COUNTERS)
    words = np.zeros(BLOCK_WORDS, np.uint32)
    seed, offset = key[0] | key[1] << 32, counter[2] | counter[3] << 32
    fill_block(words, np.uint64(0), *(np.uint64(number) for number in (block, seed, offset)))
    assert words[lane::COUNTERS].tolist() == expected


@pytest.mark.parametrize("count", [1, 63, 64, 1024, 5000])
def test_torch_operations_make_the_same_words(count: int) -> None:
    compiled = np.zeros(-(-count // BLOCK_WORDS) * BLOCK_WORDS, np.uint32)
    seed, offset = 0xFEDCBA9876543210, 0x123456789ABCDEF0
    fill_words(compiled, np.uint64(0), np.uint64(seed), np.uint64(offset))
    assert generic.words(count, seed, offset, torch.device("cpu")).tolist() == compiled[:count].tolist()


@pytest.mark.parametrize("fmt", TARGETS, ids=str)
def test_each_choice_is_the_scalar_oracles_with_the_same_draw(fmt: FloatFormat) -> None:
    """A draw is the element's random number over its range."""
    source = torch.cat([critical(fmt), moderate(count=1000)])
    seed, offset = 3, 4
    device = torch.device("cpu")
    if fmt.exponent_bits == 8:
        draws = [
            number % (1 << 23 - fmt.mantissa_bits)
            for number in generic.halves(source.numel(), seed, offset, device).tolist()
        ]
        # the sum of fraction and noise carries where noise >= 1 - fraction: the draw is its complement
        scale = 1 << (23 - fmt.mantissa_bits)
        draws = [(scale - 1 - number) / scale for number in draws]
    else:
        draws = [(number >> 1) / (1 << 31) for number in generic.words(source.numel(), seed, offset, device).tolist()]
    got = round_to(source, fmt, rounding=Rounding.STOCHASTIC, seed=seed, offset=offset)
    expected = [
        round_scalar(x, fmt, Rounding.STOCHASTIC, draw=draw) for x, draw in zip(source.tolist(), draws, strict=True)
    ]
    assert same(got, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("fmt", TARGETS, ids=str)
def test_torch_operations_choose_alike(fmt: FloatFormat) -> None:
    for source in (all_sorts(), moderate()):
        compiled = round_to(source, fmt, rounding=Rounding.STOCHASTIC, seed=7, offset=1 << 40)
        assert same(generic.round_values(source, target(fmt, None), Rounding.STOCHASTIC, 7, 1 << 40), compiled)


@pytest.mark.parametrize("fmt", [fmt for fmt in TARGETS if fmt.exponent_bits < 8], ids=str)
def test_the_mean_and_variance_are_the_binomials(fmt: FloatFormat) -> None:
    """Over n draws at the fraction p the mean is within 5 sqrt(p (1 - p) / n), the variance within 5 deviations."""
    n, p = 1 << 18, 0.3
    low, place = fmt.smallest_normal, fmt.smallest_subnormal
    source = torch.full((n,), low + p * place)
    p = float((source[0].double() - low) / place)
    ups = (round_to(source, fmt, rounding=Rounding.STOCHASTIC, seed=11).double() - low) / place
    assert set(ups.unique().tolist()) <= {0.0, 1.0}
    assert abs(float(ups.mean()) - p) <= 5 * (p * (1 - p) / n) ** 0.5
    # the variance of a Bernoulli sample variance is p q (1 - 4 p q) / n to first order
    assert abs(float(ups.var()) - p * (1 - p)) <= 5 * (p * (1 - p) * (1 - 4 * p * (1 - p)) / n) ** 0.5


def test_parts_of_a_tensor_do_not_depend_on_its_length() -> None:
    source = moderate(count=10_000)
    for fmt in (BFLOAT16, FLOAT8_E4M3FN):
        whole = round_to(source, fmt, rounding=Rounding.STOCHASTIC, seed=1)
        assert same(round_to(source[:5001].clone(), fmt, rounding=Rounding.STOCHASTIC, seed=1), whole[:5001])
