"""Block formats against their definitions, computed with the scalar oracle block by block."""

import math

import pytest
import torch
from inputs import all_sorts, moderate, same
from torch import Tensor

from mezzotint.errors import FormatError
from mezzotint.formats.catalog import BLOCK_FORMATS, FLOAT8_E4M3FN, find_block_format
from mezzotint.formats.rounding import Overflow, Rounding, round_scalar
from mezzotint.formats.spec import BlockFormat
from mezzotint.kernels import tensors
from mezzotint.kernels.tensors import quantize_blocks, round_to_blocks

MX = [fmt for fmt in BLOCK_FORMATS if not fmt.has_tensor_scale]
NVFP4 = find_block_format("nvfp4")


def mx_by_definition(block: list[float], fmt: BlockFormat) -> list[float]:
    """OCP MX 1.0, 6.3, in Python's float64, in which every step is exact."""
    if not all(map(math.isfinite, block)):
        return [math.nan] * len(block)
    amax = max(map(abs, block))
    exponent = math.frexp(amax)[1] - 1 - fmt.element.max_exponent if amax else -127
    scale = 2.0 ** min(max(exponent, -127), 127)
    return [round_scalar(x / scale, fmt.element, overflow=Overflow.SATURATE) * scale for x in block]


def nvfp4_by_definition(block: list[float], tensor_scale: float) -> list[float]:
    """arXiv 2509.25149, appendix C, each operation rounded to float32 as on the device."""

    def f32(value: float) -> float:
        return float(torch.tensor(value, dtype=torch.float64).float())

    amax = max(map(abs, block))
    wanted = f32(f32(amax / 6) / tensor_scale)
    scale = f32(round_scalar(wanted, FLOAT8_E4M3FN, overflow=Overflow.SATURATE) * tensor_scale)
    inverse = f32(1 / scale) if scale else 0.0
    return [f32(round_scalar(f32(x * inverse), NVFP4.element, overflow=Overflow.SATURATE) * scale) for x in block]


@pytest.mark.parametrize("fmt", MX, ids=str)
@pytest.mark.parametrize("source", [all_sorts(count=3200), moderate(count=3200)], ids=["all sorts", "moderate"])
def test_mx_is_its_definition(fmt: BlockFormat, source: Tensor) -> None:
    blocks = source.clone().view(-1, fmt.block_size)
    blocks[0] = 0.0
    blocks[1] = 2.0**-140
    blocks[2, 0] = math.inf
    blocks[3] = torch.finfo(torch.float32).max
    blocks[4] = torch.linspace(-448, 448, 32)
    expected = torch.tensor([mx_by_definition(block, fmt) for block in blocks.tolist()], dtype=torch.float64).float()
    assert same(round_to_blocks(blocks, fmt), expected)


def test_nvfp4_is_its_definition() -> None:
    source = moderate(count=1600).view(-1, 16)
    source[0] = 0.0
    source[1] = 1e-30
    tensor_scale = float(source.abs().max() / (448 * 6))
    expected = torch.tensor([nvfp4_by_definition(block, tensor_scale) for block in source.tolist()])
    assert same(round_to_blocks(source, NVFP4), expected)
    assert not round_to_blocks(source, NVFP4)[1].any()


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_stand_for_the_rounded_numbers(
    fmt: BlockFormat, rounding: Rounding, dtype: torch.dtype
) -> None:
    source = (moderate(count=7 * 96) / 64).view(7, 96).to(dtype)
    source[0, 0] = math.inf
    rounded = round_to_blocks(source, fmt, rounding=rounding, seed=5)
    blocks = quantize_blocks(source, fmt, rounding=rounding, seed=5)
    assert blocks.codes.dtype is torch.uint8
    assert blocks.scales.shape == (7, 96 // fmt.block_size)
    assert same(blocks.numbers(), rounded)
    assert rounded[0, : fmt.block_size].isnan().all()


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
@pytest.mark.parametrize("rounding", Rounding)
def test_torch_operations_give_the_same_bits(
    fmt: BlockFormat, rounding: Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = torch.cat([all_sorts(count=6400), moderate(count=6400)]).view(-1, 64)
    compiled = round_to_blocks(source, fmt, rounding=rounding, seed=2), quantize_blocks(source, fmt)
    monkeypatch.setattr(tensors, "_is_reachable", lambda *_, **__: False)
    assert same(round_to_blocks(source, fmt, rounding=rounding, seed=2), compiled[0])
    again = quantize_blocks(source, fmt)
    assert torch.equal(again.codes, compiled[1].codes)
    assert torch.equal(again.scales.view(torch.uint8), compiled[1].scales.view(torch.uint8))


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_any_axis_short_blocks_and_places(fmt: BlockFormat) -> None:
    source = moderate(count=5 * 70 * 3).view(5, 70, 3) / 64
    expected = round_to_blocks(source.movedim(1, -1).contiguous(), fmt).movedim(-1, 1)
    assert same(round_to_blocks(source, fmt, axis=1), expected)
    padded = torch.cat([source, torch.zeros(5, -70 % fmt.block_size, 3)], dim=1)
    assert same(round_to_blocks(padded, fmt, axis=1)[:, :70], expected)
    assert same(quantize_blocks(source, fmt, axis=1).numbers(), expected)
    place = source.clone()
    assert round_to_blocks(place, fmt, axis=1, out=place) is place
    assert same(place, expected)
    square = moderate(count=64 * 64).view(64, 64) / 64
    columns = round_to_blocks(square.t().contiguous(), fmt).t()
    assert same(round_to_blocks(square, fmt, axis=0, out=torch.empty(64, 64)), columns)
    shifted = torch.empty(64 * 64 + 1)
    shifted[:-1] = square.flatten()
    assert same(round_to_blocks(shifted[:-1], fmt, out=shifted[1:]), round_to_blocks(square, fmt).flatten())
    flat = source.reshape(-1)[:1024].clone()
    wanted = round_to_blocks(flat, fmt)
    assert same(round_to_blocks(flat, fmt, out=torch.empty(1024)), wanted)
    assert round_to_blocks(flat, fmt, out=flat) is flat
    assert same(flat, wanted)


@pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=str)
def test_rounding_twice_changes_nothing(fmt: BlockFormat) -> None:
    source = moderate(count=3200).view(-1, 32) / 2.0**10
    once = round_to_blocks(source, fmt)
    if fmt.has_tensor_scale:
        # a block's amax need not stay at 6 times its scale, so only the numbers' scale is kept
        assert float((round_to_blocks(once, fmt) - once).abs().max()) <= float(source.abs().max()) / 8
    else:
        assert same(round_to_blocks(once, fmt), once)


def test_empty_and_bad_input() -> None:
    assert round_to_blocks(torch.zeros(0, 32), "mxfp8").shape == (0, 32)
    assert quantize_blocks(torch.zeros(3, 0), "nvfp4").numbers().shape == (3, 0)
    with pytest.raises(FormatError, match="needs an axis"):
        round_to_blocks(torch.tensor(1.0), "mxfp8")
    with pytest.raises(FormatError, match="pass out= of the same shape"):
        round_to_blocks(torch.zeros(4), "mxfp8", out=torch.zeros(5))
    with pytest.raises(FormatError, match=r"tensors of torch\.float64 are not rounded"):
        round_to_blocks(torch.zeros(4).double(), "mxfp8")
    with pytest.raises(FormatError, match="unknown block format 'mxfp9'; did you mean mxfp"):
        round_to_blocks(torch.zeros(4), "mxfp9")
