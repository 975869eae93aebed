"""Linear layers whose products round their inputs: against torchao's emulated float8, ml_dtypes and float64."""

import copy
import dataclasses
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bounds import assert_rounded_once, laid_out
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mezzotint.formats.inputs import BLOCK, InputRounding
from mezzotint.kernels.tensors import round_to_blocks
from mezzotint.lowprec import packed, rounded_linear
from mezzotint.lowprec.operands import Operand, largest_magnitude, scale_for
from mezzotint.lowprec.rounded_linear import RoundedLinear, multiply, round_products
from mezzotint.policy.grammar import parse_products

TENSOR = parse_products("e4m3(gradients=e5m2, scale=tensor)")
DELAYED = parse_products("e4m3(gradients=e5m2, scale=tensor, history=3)")
ROW = parse_products("e4m3(scale=row)")
TILES = parse_products("e4m3(scale=block)")
EVERY = [TENSOR, DELAYED, ROW, TILES, *map(parse_products, ("mxfp8", "nvfp4(stochastic=true)", "float16", "e5m2"))]


def layer(how: InputRounding, *, bias: bool = True, sizes: tuple[int, int] = (64, 48)) -> RoundedLinear:
    torch.manual_seed(0)
    made = nn.Linear(*sizes, bias=bias)
    round_products(made, how)
    return made


def run(model: nn.Module, x: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    out.backward(upstream)
    grads = tuple(p.grad for p in model.parameters())
    for parameter in model.parameters():
        parameter.grad = None
    return out.detach(), x.grad, *grads


def data(rows: int = 40, sizes: tuple[int, int] = (64, 48), seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, sizes[0], generator=generator).bfloat16()
    return x, (torch.randn(2, rows, sizes[1], generator=generator) * 1e-3).bfloat16()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("how", "recipe"), [(TENSOR, "tensorwise"), (ROW, "rowwise")])
def test_agrees_with_torchaos_float8(how: InputRounding, recipe: str) -> None:
    """torchao's emulation multiplies numbers that it has scaled back, ours scales the sum: apart by float32's rounding.

    Both then round to bfloat16, so that nearly all results are equal. (Its bias is added after the rounding.)
    """
    float8 = pytest.importorskip("torchao.float8")
    config = dataclasses.replace(
        float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True, round_scales_to_power_of_2=False
    )
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(64, 48, bias=False))
    float8.convert_to_float8_training(theirs, config=config)
    x, upstream = data()
    for one, other in zip(run(layer(how, bias=False), x, upstream), run(theirs, x, upstream), strict=True):
        assert float((one == other).float().mean()) > 0.99
        assert float((one.float() - other.float()).norm() / other.float().norm()) < 1e-3


def reference_operand(source: Tensor, how: InputRounding, axis: int, *, is_gradient: bool) -> np.ndarray:
    """Return what an operand stands for in float64, by ml_dtypes and numpy."""
    kind = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}[
        how.gradients if is_gradient else how.inputs
    ]
    numbers = source.float().numpy()
    largest = np.abs(numbers).max() if how.scale == "tensor" else np.abs(numbers).max(axis=axis, keepdims=True)
    top = float(ml_dtypes.finfo(kind).max)
    scale = (top / np.maximum(largest.astype(np.float64), 1e-12)).astype(np.float32)
    codes = np.clip(numbers * scale, -top, top).astype(kind)
    return codes.astype(np.float64) / scale.astype(np.float64)


@pytest.mark.parametrize("how", [TENSOR, DELAYED, ROW])
@pytest.mark.parametrize("sizes", [(64, 48), (33, 7), (400, 520)])
def test_products_are_sums_of_rounded_inputs(how: InputRounding, sizes: tuple[int, int]) -> None:
    model = layer(how, sizes=sizes)
    x, upstream = data(sizes=sizes)
    out, grad_x, grad_w, grad_b = run(model, x, upstream)
    flat, grad, weight = x.flatten(0, 1), upstream.flatten(0, 1), model.weight.detach()
    bias = model.bias.detach().double().numpy()

    def check(got: Tensor, left: np.ndarray, right: np.ndarray, bias: Any = 0.0) -> None:
        exact = torch.from_numpy(left @ right + bias)
        size = torch.from_numpy(np.abs(left) @ np.abs(right) + np.abs(bias))
        # the scales, each rounded to float32, count as three more roundings of every term
        assert_rounded_once(got.flatten(0, -2), exact, size, left.shape[1] + 8)

    of = reference_operand
    check(out, of(flat, how, 1, is_gradient=False), of(weight, how, 1, is_gradient=False).T, bias)
    check(grad_x, of(grad, how, 1, is_gradient=True), of(weight, how, 0, is_gradient=False))
    grad_bf16 = grad_w.bfloat16()
    assert torch.equal(grad_bf16.float(), grad_w), "the layer computes in bfloat16"
    check(grad_bf16, of(grad, how, 0, is_gradient=True).T, of(flat, how, 0, is_gradient=False))
    torch.testing.assert_close(grad_b, grad.float().sum(0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "mxfp4"])
def test_blocks_lie_along_the_summed_axis(name: str) -> None:
    how = parse_products(name)
    source = data()[0][0]
    for axis in (0, 1):
        values, scale = Operand(source=source, how=how, axis=axis).rounded()
        assert scale is None
        assert torch.equal(values, round_to_blocks(source, name, axis=axis))


@pytest.mark.parametrize(("axis", "is_weight"), [(0, False), (1, False), (0, True), (1, True)])
def test_tiles(axis: int, is_weight: bool) -> None:
    """Each tile by itself is a tensor with a scale of its own."""
    source = torch.randn(200, 300) * torch.logspace(-3, 3, 300)
    got, _ = Operand(source=source, how=TILES, axis=axis, is_weight=is_weight).rounded()
    height = BLOCK if is_weight or axis == 0 else 1
    width = BLOCK if is_weight or axis == 1 else 1
    for top in range(0, 200, max(height, 50)):
        for left in range(0, 300, max(width, 100)):
            tile = source[top : top + height, left : left + width]
            values, scale = Operand(source=tile, how=TENSOR, axis=1).rounded()
            near = values.double() / scale.double()
            torch.testing.assert_close(got[top : top + height, left : left + width].double(), near, rtol=1e-6, atol=0)


def test_a_scale_brings_the_largest_number_to_the_top() -> None:
    fmt = TENSOR.format_of(is_gradient=False)
    source = torch.tensor([[3.0, -6.0], [0.0, 1.0]])
    values, scale = Operand(source=source, how=TENSOR, axis=1).rounded()
    assert values.abs().max() == fmt.max
    assert scale == scale_for(largest_magnitude(source), fmt)
    assert Operand(source=torch.zeros(2, 2), how=TENSOR, axis=1).rounded()[0].eq(0).all()


def test_delayed_scales_come_from_past_steps() -> None:
    model = layer(DELAYED)
    x, upstream = data()
    run(model, x, upstream)
    assert model.magnitudes[0].tolist() == [float(x.abs().max()), 0, 0, 0]
    assert model.magnitudes[2, 0] == upstream.abs().max()
    model.roll_magnitudes()
    louder = run(model, x * 100, upstream)[0]  # saturates: the scale is the past step's
    assert float(louder.abs().max()) < 20 * float(run(layer(TENSOR), x, upstream)[0].abs().max())
    for _ in range(3):
        model.roll_magnitudes()
    assert model.magnitudes[0].tolist() == [0, 0, 0, float((x * 100).abs().max())]
    model.roll_magnitudes()
    assert not model.magnitudes.any()
    assert "magnitudes" not in model.state_dict()


def test_magnitudes_that_are_not_finite_are_forgotten() -> None:
    model = layer(DELAYED)
    x, upstream = data()
    out = run(model, x * float("inf"), upstream)[0]
    assert not torch.isfinite(out).any()
    model.roll_magnitudes()
    assert torch.isfinite(model.magnitudes).all()


@pytest.mark.parametrize("how", EVERY, ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(how: InputRounding, use_reentrant: bool) -> None:
    x, upstream = data()

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer(how)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    plain, checked = layer(how), Checkpointed()
    for _ in range(3):
        for one, other in zip(run(plain, x, upstream), run(checked, x, upstream), strict=True):
            assert torch.equal(one, other)
        plain.roll_magnitudes()
        checked.inner.roll_magnitudes()


@pytest.mark.parametrize("how", EVERY, ids=str)
def test_copies_and_shapes(how: InputRounding) -> None:
    model = layer(how, bias=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        x, upstream = data()
        assert all(torch.equal(a, b) for a, b in zip(run(model, x, upstream), run(other, x, upstream), strict=True))
    empty = model(torch.zeros(0, 64, dtype=torch.bfloat16))
    assert empty.shape == (0, 48)
    assert model(torch.randn(64)).dtype is torch.float32
    assert str(how) in repr(model)
    with torch.no_grad():
        assert not model(torch.randn(3, 64)).requires_grad


def test_only_what_needs_a_gradient_gets_one() -> None:
    model = layer(TENSOR)
    model.weight.requires_grad_(False)
    x = data()[0].requires_grad_()
    model(x).float().sum().backward()
    assert x.grad is not None
    assert model.weight.grad is None
    assert model.bias.grad is not None


def test_stochastic_gradients_leave_torchs_generator_alone() -> None:
    model = layer(parse_products("nvfp4(stochastic=true)"))
    before = torch.get_rng_state()
    first = run(model, *data())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, run(model, *data()), strict=True))
    nearest = run(layer(parse_products("nvfp4")), *data())
    assert torch.equal(first[0], nearest[0])
    assert not torch.equal(first[2], nearest[2])


SHAPES = [(70, 300, 90), (97, 385, 33), (8, 31, 200), (130, 40, 20)]


@pytest.mark.parametrize("text", ["e4m3(scale=row)", "e5m2(scale=tensor)", "e4m3", "float16", "bfloat16", "e3m2",
                                  "mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp4", "nvfp4", "e4m3(scale=block)"])  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["NN", "NT", "TN", "TT"])
def test_packing_rounds_as_rounding_before_does(
    text: str, shape: tuple[int, int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rounded numbers, so the same sums but for their order in float32."""
    how = parse_products(text)
    generator = torch.Generator().manual_seed(0)
    m, k, n = shape
    a = laid_out((torch.randn(m, k, generator=generator) * torch.logspace(-3, 2, k)).bfloat16(), layout[0])
    b = laid_out(torch.randn(k, n, generator=generator), layout[1])
    bias = torch.randn(n, generator=generator)
    left, right = Operand(source=a, how=how, axis=1), Operand(source=b, how=how, axis=0)
    monkeypatch.setattr(packed, "SMALLEST", 1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    ours = [multiply(left, right, bias, dtype) for dtype in dtypes]
    turned = Operand(source=b.t(), how=how, axis=1), Operand(source=a.t(), how=how, axis=0)
    ours.append(multiply(*turned, None, torch.float32).t() + bias)
    monkeypatch.setattr(rounded_linear, "product", lambda *_, **__: None)
    (first, one), (second, other) = left.rounded(), right.rounded()
    magnitude = first.double().abs() @ second.double().abs()
    if one is not None and other is not None:
        magnitude = magnitude / one.double()[:, None] / other.double()
    exact = multiply(left, right, bias, torch.float32)
    for got in ours:
        rounding = 0.0 if got.dtype is torch.float32 else torch.finfo(got.dtype).eps
        allowed = (k + 8) * 2.0**-23 * (magnitude + bias.abs()) + rounding * exact.abs()
        assert bool(((got.double() - exact.double()).abs() <= allowed + 1e-7).all())


@pytest.mark.parametrize("text", ["e4m3(scale=row)", "e4m3(scale=tensor)", "mxfp8", "float16"])
def test_packing_keeps_what_is_not_finite(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    how = parse_products(text)
    a, b = torch.randn(20, 64), torch.randn(64, 20)
    a[3, 5], b[7, 11] = float("nan"), float("inf")
    left, right = Operand(source=a, how=how, axis=1), Operand(source=b, how=how, axis=0)
    monkeypatch.setattr(packed, "SMALLEST", 1)
    ours = multiply(left, right, None, torch.float32)
    monkeypatch.setattr(rounded_linear, "product", lambda *_, **__: None)
    exact = multiply(left, right, None, torch.float32)
    assert not ours[3].isfinite().any()
    assert torch.equal(ours.isfinite(), exact.isfinite())
