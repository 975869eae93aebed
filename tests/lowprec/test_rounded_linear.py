"""Linear layers whose products round their inputs: against torchao's emulated float8, ml_dtypes and float64."""

import copy
import dataclasses
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from bounds import assert_rounded_once
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mezzotint.formats.inputs import BLOCK, InputRounding
from mezzotint.kernels.tensors import round_to_blocks
from mezzotint.lowprec.operands import Operand, Role, largest_magnitude, rounded_operand, scale_for
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
    along = rounded_operand(source, how, 1, Role())
    across = rounded_operand(source, how, 0, Role())
    assert torch.equal(along.values, round_to_blocks(source, name, axis=1))
    assert torch.equal(across.values, round_to_blocks(source, name, axis=0))


@pytest.mark.parametrize(("axis", "is_weight"), [(0, False), (1, False), (0, True), (1, True)])
def test_tiles(axis: int, is_weight: bool) -> None:
    """Each tile by itself is a tensor with a scale of its own."""
    source = torch.randn(200, 300) * torch.logspace(-3, 3, 300)
    got = rounded_operand(source, TILES, axis, Role(is_weight=is_weight)).values
    height = BLOCK if is_weight or axis == 0 else 1
    width = BLOCK if is_weight or axis == 1 else 1
    for top in range(0, 200, max(height, 50)):
        for left in range(0, 300, max(width, 100)):
            tile = source[top : top + height, left : left + width]
            values, _ = rounded_operand(tile, TENSOR, 1, Role())
            near = values.double() / scale_for(largest_magnitude(tile), TENSOR.format_of(is_gradient=False)).double()
            torch.testing.assert_close(got[top : top + height, left : left + width].double(), near, rtol=1e-6, atol=0)


def test_a_scale_brings_the_largest_number_to_the_top() -> None:
    fmt = TENSOR.format_of(is_gradient=False)
    operand = rounded_operand(torch.tensor([[3.0, -6.0], [0.0, 1.0]]), TENSOR, 1, Role())
    assert operand.values.abs().max() == fmt.max
    assert rounded_operand(torch.zeros(2, 2), TENSOR, 1, Role()).values.eq(0).all()


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


def test_the_packing_kernel_and_torch_multiply_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from mezzotint.lowprec import packed, rounded_linear

    left = rounded_operand(torch.randn(70, 300), ROW, 1, Role())
    right = rounded_operand(torch.randn(300, 90), ROW, 0, Role())
    bias = torch.randn(90)
    monkeypatch.setattr(packed, "SMALLEST", 1)
    ours = [multiply(left, right, bias, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    ours.append(multiply(*(Operand(v.t(), f) for v, f in (right, left)), None, torch.float32).t() + bias)
    monkeypatch.setattr(rounded_linear, "product", lambda *_, **__: None)
    exact = multiply(left, right, bias, torch.float32)
    for got in ours:
        torch.testing.assert_close(got.float(), exact, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-4)
