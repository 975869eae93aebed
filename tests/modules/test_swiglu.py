"""The adopted gate against torch's chain, in float64; whatever reaches it in whatever way gives the same."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import saved_bytes
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mezzotint.models.gpt import FeedForward
from mezzotint.modules import swiglu as room
from mezzotint.modules.swiglu import SwiGLU, swiglu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chain(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    """One rounding of the result, and 20 of float32 on the way, of terms of order 1 that may cancel in a gradient."""
    return {"rtol": torch.finfo(dtype).eps / 2 + 20 * 2.0**-24, "atol": 40 * 2.0**-24}


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """Return the output and the gradients of the inputs; leaves are made of them, with strides as they are."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    out.backward(grad.to(out.dtype))
    return out.detach(), *(leaf.grad for leaf in leaves)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note which kernels run."""
    noted: list[str] = []
    kernels = room._gates()

    class Noting:
        def swiglu_forward(self, **arguments: int) -> None:
            noted.append("forward")
            kernels.swiglu_forward(**arguments)

        def swiglu_backward(self, **arguments: int) -> None:
            noted.append("backward")
            kernels.swiglu_backward(**arguments)

    monkeypatch.setattr(room, "_gates", Noting)
    return noted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5, 384), (70001,)])
def test_output_and_gradients_are_those_of_torch_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, calls: list[str]
) -> None:
    gate, up, grad = (draw(*shape, dtype=dtype, seed=seed) for seed in range(3))
    ours = gradients(swiglu, (gate, up), grad)
    exact = gradients(chain, (gate.double(), up.double()), grad)
    assert calls == ["forward", "backward"]
    for our, true in zip(ours, exact, strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our.double(), true, **tolerance(dtype))


def layouts(tensor: Tensor) -> list[Tensor]:
    """Return the numbers of (B, T, D) as half of a fused layer's output, and by columns."""
    B, T, D = tensor.shape
    both = torch.full((B, T, 2 * D), math.nan, dtype=tensor.dtype)
    both[..., D:] = tensor
    return [tensor, both.chunk(2, -1)[1], tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)]


@settings(deadline=None, max_examples=40)
@given(dtype=st.sampled_from(DTYPES), width=st.integers(1, 100), seed=st.integers(0, 2**16))
def test_a_layout_in_memory_changes_no_bit(dtype: torch.dtype, width: int, seed: int) -> None:
    gate, up, grad = (draw(2, 3, width, dtype=dtype, seed=seed + i) for i in range(3))
    expected = gradients(swiglu, (gate, up), grad)
    for laid_gate in layouts(gate):
        for laid_up in layouts(up):
            for laid_grad in layouts(grad):
                assert all(map(torch.equal, gradients(swiglu, (laid_gate, laid_up), laid_grad), expected))


def test_expanded_empty_and_single_numbers(calls: list[str]) -> None:
    row = draw(9)
    expected = gradients(swiglu, (row.repeat(4, 1), row.repeat(4, 1)), torch.ones(4, 9))
    found = gradients(swiglu, (row.expand(4, 9), row.expand(4, 9)), torch.ones(()).expand(4, 9))
    assert all(map(torch.equal, found, expected))
    assert len(calls) == 4
    assert swiglu(torch.empty(0, 9), torch.empty(0, 9)).shape == (0, 9)
    torch.testing.assert_close(swiglu(row[0], row[1]), chain(row[0], row[1]))
    assert len(calls) == 4


def test_what_broadcasts_or_promotes_is_computed_by_torch(calls: list[str]) -> None:
    gate, up = draw(4, 1, dtype=torch.bfloat16), draw(3, dtype=torch.float32)
    found = swiglu(gate, up)
    assert (found.shape, found.dtype) == ((4, 3), torch.float32)
    torch.testing.assert_close(found, chain(gate.float(), up))
    wide = draw(4, 3).double()
    assert torch.equal(swiglu(wide, wide), chain(wide, wide))
    assert not calls
    with pytest.raises(ValueError, match=r"gates of torch\.int64 and torch\.float32 are refused"):
        swiglu(torch.ones(3, dtype=torch.int64), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_keeps_both_inputs_and_nothing_else(dtype: torch.dtype) -> None:
    gate, up = (draw(20, 64, dtype=dtype, seed=seed).requires_grad_() for seed in range(2))
    assert saved_bytes(lambda: swiglu(gate, up)) == 2 * 2 * 20 * 64
    assert saved_bytes(lambda: chain(gate, up)) == 3 * 2 * 20 * 64


@pytest.mark.parametrize("needed", [0, 1])
def test_one_gradient_alone(needed: int) -> None:
    inputs, grad = (draw(4, 8), draw(4, 8, seed=1)), draw(4, 8, seed=2)
    both = gradients(swiglu, inputs, grad)
    inputs[needed].requires_grad_()
    swiglu(*inputs).backward(grad)
    assert torch.equal(inputs[needed].grad, both[1 + needed])
    assert inputs[1 - needed].grad is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_and_inference_mode_change_no_bit(use_reentrant: bool) -> None:
    inputs, grad = (draw(4, 8), draw(4, 8, seed=1)), draw(4, 8, seed=2)
    plain = gradients(swiglu, inputs, grad)
    again = gradients(lambda *inputs: checkpoint(swiglu, *inputs, use_reentrant=use_reentrant), inputs, grad)
    assert all(map(torch.equal, plain, again))
    with torch.inference_mode():
        assert torch.equal(swiglu(*inputs), plain[0])


def test_gradients_can_be_differentiated_again() -> None:
    def second(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [draw(6, 7, seed=seed).to(dtype).requires_grad_() for seed in range(3)]
        first = torch.autograd.grad(function(*inputs[:2]), inputs[:2], inputs[2], create_graph=True)
        return torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), inputs)

    for our, true in zip(second(swiglu, torch.float32), second(chain, torch.float64), strict=True):
        torch.testing.assert_close(our.double(), true, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp calls it
def test_transforms_and_compilation_see_torch_operations(calls: list[str]) -> None:
    gate, up = draw(4, 12), draw(4, 12, seed=1)
    expected = chain(gate, up)
    torch.testing.assert_close(torch.vmap(swiglu)(gate, up), expected)
    torch.testing.assert_close(
        torch.func.jvp(swiglu, (gate, up), (up, gate)), torch.func.jvp(chain, (gate, up), (up, gate))
    )
    torch.compiler.reset()
    compiled = torch.compile(swiglu, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(gate.requires_grad_(), up), expected)
    assert swiglu(torch.empty(3, 4, device="meta"), torch.empty(3, 4, device="meta")).device.type == "meta"
    assert not calls
    grads = draw(5, 4, 12, seed=2)
    (batched,) = torch.autograd.grad(swiglu(gate, up), gate, grads, is_grads_batched=True)
    for found, grad in zip(batched, grads, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(chain(gate, up), gate, grad)[0])


@pytest.mark.parametrize("is_autocast", [False, True])
def test_the_layer_takes_the_weights_of_the_models_and_gives_them_back(is_autocast: bool) -> None:
    torch.manual_seed(0)
    plain = FeedForward(16, 24)
    torch.manual_seed(0)
    fused = SwiGLU(16, 24)
    for one, other in zip(plain.state_dict().items(), fused.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    x = draw(2, 5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        found, expected = fused(x), plain(x)
    assert found.dtype == expected.dtype == (torch.bfloat16 if is_autocast else torch.float32)
    # two roundings of each gated number instead of one, 24 of which are summed with weights of up to 1/5
    rounding = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=2 * rounding, atol=24 / 5 * 2 * rounding)
    found.float().sum().backward()
    assert all(parameter.grad is not None for parameter in fused.parameters())


def test_the_layers_arguments() -> None:
    layer = SwiGLU(4, 6, bias=True, device="meta", dtype=torch.bfloat16)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "gate.weight": (6, 4), "gate.bias": (6,), "up.weight": (6, 4), "up.bias": (6,),
        "out.weight": (4, 6), "out.bias": (4,),
    }  # fmt: skip
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in layer.parameters())


def test_saved_tensors_may_come_back_in_another_dtype() -> None:
    """Kept in float16 and given back so: gradients are off by its rounding, in each of a few factors of order 1."""
    inputs, grad = (draw(6, 40), draw(6, 40, seed=1)), draw(6, 40, seed=2)
    expected = gradients(swiglu, inputs, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.half(), lambda tensor: tensor):
        found = gradients(swiglu, inputs, grad)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=6 * 8 * 2**-11)
