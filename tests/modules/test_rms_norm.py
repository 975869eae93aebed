"""The adopted norm against torch's own, in float64; whatever reaches it in whatever way gives the same."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from saved import saved_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mezzotint.modules import rms_norm as room
from mezzotint.modules.rms_norm import RMSNorm, rms_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIT = 2.0**-24


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tolerance(dtype: torch.dtype, width: int) -> dict[str, float]:
    """Half an ulp of the result, at most eps / 2 of it, and float32 sums of up to 64 rows or `width` numbers.

    Sums of n terms of order 1 are off by n u at most; results that cancel have that as an absolute error.
    """
    summed = 4 * (64 + width / 64 + 16) * UNIT
    return {"rtol": torch.finfo(dtype).eps / 2 + summed, "atol": 4 * summed}


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
    kernels = room._norms()

    class Noting:
        num_parts = staticmethod(kernels.num_parts)

        def rms_forward(self, **arguments: int) -> None:
            noted.append("forward")
            kernels.rms_forward(**arguments)

        def rms_backward(self, **arguments: int) -> None:
            noted.append("backward")
            kernels.rms_backward(**arguments)

    monkeypatch.setattr(room, "_norms", Noting)
    return noted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 384, 8192])
def test_output_and_gradients_are_those_of_torch_in_float64(width: int, dtype: torch.dtype, calls: list[str]) -> None:
    x, grad, weight = draw(3, 5, width, dtype=dtype), draw(3, 5, width, dtype=dtype, seed=1), 1 + draw(width) / 4
    ours = gradients(lambda x, w: rms_norm(x, w, 1e-6), (x, weight), grad)
    exact = gradients(lambda x, w: F.rms_norm(x, (width,), w, 1e-6), (x.double(), weight.double()), grad)
    assert calls == ["forward", "backward"]
    assert [tensor.dtype for tensor in ours] == [dtype, dtype, torch.float32]
    for our, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), true, **tolerance(our.dtype, width))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return the numbers of (2, 3, D) in other places of memory."""
    B, T, D = x.shape
    wide = torch.full((B, T, D + 3), math.nan, dtype=x.dtype)
    wide[..., 1 : D + 1] = x
    spread = torch.full((B, T, 2 * D), math.nan, dtype=x.dtype)
    spread[..., ::2] = x
    return {
        "a slice of wider rows": wide[..., 1 : D + 1],
        "every second column": spread[..., ::2],
        "transposed batch": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }


@settings(deadline=None, max_examples=60)
@given(dtype=st.sampled_from(DTYPES), width=st.one_of(st.integers(1, 100), st.just(384)), seed=st.integers(0, 2**16))
def test_a_layout_in_memory_changes_no_bit(dtype: torch.dtype, width: int, seed: int) -> None:
    x, grad = draw(2, 3, width, dtype=dtype, seed=seed), draw(2, 3, width, dtype=dtype, seed=seed + 1)
    weight = draw(width, seed=seed)
    expected = gradients(rms_norm, (x, weight), grad)
    for name, laid in layouts(x).items():
        for name_of_grad, laid_grad in (("dense", grad), *layouts(grad).items()):
            found = gradients(rms_norm, (laid, weight), laid_grad)
            assert all(map(torch.equal, found, expected)), (name, name_of_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_and_gradients_that_are_one_in_memory(dtype: torch.dtype) -> None:
    row, weight = draw(9, dtype=dtype), draw(9, seed=3)
    expanded, repeated = row.expand(4, 9), row.repeat(4, 1)
    grad = torch.ones((), dtype=dtype).expand(4, 9)
    found = gradients(rms_norm, (expanded, weight), grad)
    expected = gradients(rms_norm, (repeated, weight), torch.ones(4, 9))
    assert all(map(torch.equal, found, expected))
    leaf = row.clone().requires_grad_()
    rms_norm(leaf.expand(4, 9), weight).sum().backward()
    torch.testing.assert_close(leaf.grad, expected[1].float().sum(0).to(dtype), **tolerance(dtype, 9))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_axis_no_rows_and_no_numbers(dtype: torch.dtype) -> None:
    weight = draw(6)
    line = gradients(rms_norm, (draw(6, dtype=dtype), weight), torch.ones(6))
    rows = gradients(rms_norm, (draw(6, dtype=dtype)[None], weight), torch.ones(1, 6))
    assert line[0].shape == (6,)
    assert all(torch.equal(one, other.view(one.shape)) for one, other in zip(line, rows, strict=True))
    for shape in ((0, 6), (2, 0, 6)):
        out, grad_x, grad_weight = gradients(rms_norm, (torch.empty(shape, dtype=dtype), weight), torch.empty(shape))
        assert out.shape == grad_x.shape == shape
        assert torch.equal(grad_weight, torch.zeros(6))


@pytest.mark.parametrize("shape", [(2048, 384), (3, 7), (2, 5, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_backward_keeps_the_input_and_one_number_a_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(*shape, dtype=dtype).requires_grad_()
    norm = RMSNorm(shape[-1], eps=1e-6)
    rows, width = math.prod(shape[:-1]), shape[-1]
    assert saved_bytes(lambda: norm(x), (norm.weight,)) == 2 * rows * width + 4 * rows
    composite = saved_bytes(lambda: F.rms_norm(x, (width,), norm.weight.to(dtype), 1e-6), (norm.weight,))
    assert composite >= 8 * rows * width


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_gradients_are_computed_where_they_are_wanted(needed: str) -> None:
    both = gradients(rms_norm, (draw(40, 33), draw(33, seed=1)), draw(40, 33, seed=2))
    x, weight = draw(40, 33), draw(33, seed=1)
    leaf = (x if needed == "x" else weight).requires_grad_()
    rms_norm(x, weight).backward(draw(40, 33, seed=2))
    assert torch.equal(leaf.grad, both[1 if needed == "x" else 2])
    assert (weight if needed == "x" else x).grad is None


def test_a_weight_of_low_precision_and_one_with_gaps() -> None:
    x, grad = draw(5, 24, dtype=torch.bfloat16), draw(5, 24, dtype=torch.bfloat16, seed=1)
    weight = draw(48, dtype=torch.bfloat16)[::2]
    out, grad_x, grad_weight = gradients(rms_norm, (x, weight), grad)
    expected = gradients(rms_norm, (x, weight.float().contiguous()), grad)
    assert grad_weight.dtype == torch.bfloat16
    assert torch.equal(out, expected[0])
    assert torch.equal(grad_x, expected[1])
    assert torch.equal(grad_weight, expected[2].bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", [(12,), ([3, 4], 1e-3), (torch.Size((2, 3, 4)), None, False), (12, 1e-5, False)])
def test_it_stands_in_for_torchs_module(arguments: tuple, dtype: torch.dtype) -> None:
    """The same arguments, parameters and numbers; eps of None is float32's, as it is there."""
    ours, theirs = RMSNorm(*arguments), nn.RMSNorm(*arguments)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert (ours.normalized_shape, ours.eps) == (theirs.normalized_shape, theirs.eps)
    x = draw(5, 2, 3, 4, dtype=dtype) if ours.normalized_shape != (12,) else draw(5, 12, dtype=dtype)
    x = 1e-3 * x  # so that eps counts
    expected = theirs.double()(x.double())
    if ours.eps is None:
        wide = None if theirs.weight is None else theirs.weight.double()
        expected = F.rms_norm(x.double(), ours.normalized_shape, wide, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ours(x).double(), expected, **tolerance(dtype, 24))


def test_its_arguments_reach_the_parameter_and_the_text() -> None:
    norm = RMSNorm((3, 4), eps=1e-3, device="meta", dtype=torch.bfloat16)
    assert (norm.weight.device.type, norm.weight.dtype, norm.weight.shape) == ("meta", torch.bfloat16, (3, 4))
    assert str(norm) == "RMSNorm((3, 4), eps=0.001, elementwise_affine=True)"
    assert norm(torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16)).shape == (2, 3, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_neither_the_weight_nor_the_result(dtype: torch.dtype, calls: list[str]) -> None:
    """The weights differ by 2^-20, which no 16-bit format holds; a factor of 2^20 - 1 shows the difference."""
    norm = RMSNorm(8, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(1 + torch.arange(8) * 2.0**-20)
    x = torch.full((2, 8), 1.0, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        low, full = norm(x), norm(x.float())
    assert (low.dtype, full.dtype) == (dtype, torch.float32)
    assert torch.equal(full, norm(x.float()))
    assert full.unique().numel() == 8
    low.float().sum().backward()
    assert norm.weight.grad.dtype == torch.float32
    assert calls == ["forward", "forward", "forward", "backward"]


def test_inference_mode_and_no_grad() -> None:
    norm, x = RMSNorm(16), draw(3, 16)
    expected = norm(x)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found = norm(x)
        assert torch.equal(found, expected)
        assert not found.requires_grad


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(use_reentrant: bool) -> None:
    x, weight, grad = draw(6, 40, dtype=torch.bfloat16), draw(40, seed=1), draw(6, 40, dtype=torch.bfloat16, seed=2)
    plain = gradients(rms_norm, (x, weight), grad)
    again = gradients(lambda *inputs: checkpoint(rms_norm, *inputs, use_reentrant=use_reentrant), (x, weight), grad)
    assert all(map(torch.equal, plain, again))


def test_a_changed_input_is_noticed() -> None:
    x = draw(4, 8).requires_grad_()
    before = x * 1
    out = rms_norm(before, torch.ones(8))
    before.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("has_weight", [False, True])
def test_gradients_can_be_differentiated_again(has_weight: bool) -> None:
    """Of inputs of order 1, second derivatives are sums of 10 x 33 products; each is off by some u."""
    x, grad, direction = draw(10, 33), draw(10, 33, seed=1), draw(10, 33, seed=2)
    weight = 1 + draw(33, seed=3) / 4

    def second(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, grad)]
        used = inputs if has_weight else [inputs[0], inputs[2]]
        out = function(inputs[0], inputs[1] if has_weight else None)
        first = torch.autograd.grad(out, used[:-1], inputs[2], create_graph=True)
        total = (first[0] * direction.to(dtype)).sum() + sum((part**2).sum() for part in first[1:])
        return torch.autograd.grad(total, used)

    ours = second(lambda x, w: rms_norm(x, w, 1e-6), torch.float32)
    exact = second(lambda x, w: F.rms_norm(x, (33,), w, 1e-6), torch.float64)
    for our, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), true, rtol=1e-4, atol=330 * 8 * UNIT)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp calls it
def test_functional_transforms_see_torch_operations(calls: list[str]) -> None:
    x, weight, tangent = draw(4, 12), draw(12, seed=1), draw(4, 12, seed=2)

    def norm(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, (12,), w, 1e-6)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, w, 1e-6)

    expected = norm(x, weight)
    torch.testing.assert_close(torch.vmap(ours, (0, None))(x, weight), expected)
    torch.testing.assert_close(
        torch.func.grad(lambda x: ours(x, weight).square().sum())(x),
        torch.func.grad(lambda x: norm(x, weight).square().sum())(x),
    )
    got, true = (torch.func.jvp(lambda x, f=f: f(x, weight), (x,), (tangent,)) for f in (ours, norm))
    torch.testing.assert_close(got, true)
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent), weight)).tangent for f in (ours, norm)]
    torch.testing.assert_close(*duals)
    assert not calls


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch.func.jvp calls it
def test_batched_gradients_of_a_compiled_forward(calls: list[str]) -> None:
    x, weight, grads = draw(4, 12).requires_grad_(), draw(12, seed=1).requires_grad_(), draw(5, 4, 12, seed=2)
    found = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), grads, is_grads_batched=True)
    assert calls == ["forward"]
    for index, grad in enumerate(grads):
        expected = torch.autograd.grad(F.rms_norm(x, (12,), weight, 1e-6), (x, weight), grad)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[index], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_module_traces_torch_operations(dtype: torch.dtype, calls: list[str]) -> None:
    norm, x = RMSNorm(24, eps=1e-6), draw(5, 24, dtype=dtype)
    expected = norm(x)
    calls.clear()
    torch.compiler.reset()
    out = torch.compile(norm, backend="aot_eager", fullgraph=True)(x.requires_grad_())
    out.float().sum().backward()
    torch.testing.assert_close(out, expected, **tolerance(dtype, 24))
    assert norm.weight.grad is not None
    assert not calls


def test_fake_tensors_and_other_dtypes_pass_through(calls: list[str]) -> None:
    with FakeTensorMode():
        norm = RMSNorm(24)
        out = norm(torch.empty(5, 24, dtype=torch.bfloat16))
    assert (out.shape, out.dtype) == ((5, 24), torch.bfloat16)
    x = draw(3, 24).double()
    assert torch.equal(rms_norm(x, torch.ones(24).double(), 1e-6), F.rms_norm(x, (24,), eps=1e-6))
    assert not calls


def test_the_number_of_torchs_threads_changes_no_bit() -> None:
    x, weight, grad = draw(900, 384, dtype=torch.bfloat16), draw(384, seed=1), draw(900, 384, seed=2).bfloat16()
    results = []
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(gradients(rms_norm, (x, weight), grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 7\) does not end in normalized_shape=\(8,\)"):
        RMSNorm(8)(torch.ones(2, 7))
    with pytest.raises(ValueError, match="no last axes of the weight's shape"):
        rms_norm(torch.ones(8), torch.ones(2, 8))
    with pytest.raises(ValueError, match="no last axes"):
        rms_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"torch\.int64 cannot be normalised"):
        rms_norm(torch.ones(8, dtype=torch.int64))


def test_saved_tensors_may_come_back_in_another_dtype() -> None:
    """Kept in float16 and given back so: gradients are off by its rounding, in each of a few factors of order 1."""
    inputs, grad = (draw(6, 40), draw(40, seed=1)), draw(6, 40, seed=2)
    expected = gradients(rms_norm, inputs, grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.half(), lambda tensor: tensor):
        found = gradients(rms_norm, inputs, grad)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=6 * 8 * 2**-11)
