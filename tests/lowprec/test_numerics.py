"""Each operation that has a kernel of ours, against float64: a float32 sum, rounded once, in any shape and layout."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounds import DTYPES, assert_linear, assert_rounded_once, forced, laid_out
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import mezzotint as mz
from mezzotint.lowprec import packed
from mezzotint.lowprec.calls import call_counts
from mezzotint.lowprec.choice import Path


@pytest.fixture(autouse=True, params=["upcast", "packed"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compute by each path; the packing kernel also takes the small products that it would leave to upcasting."""
    monkeypatch.setattr(packed, "SMALLEST", 1)
    monkeypatch.setattr(packed, "THINNEST", 1)
    with forced(request.param, monkeypatch):
        yield request.param


sizes = st.one_of(st.integers(0, 40), st.sampled_from([47, 48, 64, 95, 96, 97, 130, 385, 513, 600]))
layouts = st.sampled_from("NTSR")
scales = st.sampled_from([1e-20, 1.0, 3.0])


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(m=sizes, k=sizes, n=sizes, left=layouts, right=layouts, seed=st.integers(0, 999), scale=scales)
def test_mm(dtype: torch.dtype, m: int, k: int, n: int, left: str, right: str, seed: int, scale: float) -> None:
    a = laid_out(numbers((m, k), seed, dtype, scale), left)
    b = laid_out(numbers((k, n), seed + 1, dtype), right)
    with mz.fast_cpu():
        got = a @ b
    assert got.is_contiguous()
    assert_linear(torch.mm, (a, b), k, got)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 5),
    m=st.integers(0, 70),
    k=st.integers(0, 70),
    n=st.integers(0, 70),
    left=layouts,
    right=layouts,
    seed=st.integers(0, 999),
)
def test_bmm_and_einsum(
    dtype: torch.dtype, batch: int, m: int, k: int, n: int, left: str, right: str, seed: int
) -> None:
    a = laid_out(numbers((batch, m, k), seed, dtype), left)
    b = laid_out(numbers((batch, k, n), seed + 1, dtype), right)
    with mz.fast_cpu():
        assert_linear(torch.bmm, (a, b), k, torch.bmm(a, b))
        assert_linear(torch.bmm, (a, b), k, torch.einsum("bmk,bkn->bmn", a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(
    m=sizes,
    k=st.integers(0, 100),
    n=st.integers(1, 100),
    bias_axes=st.integers(0, 2),
    beta=st.sampled_from([1, 0, 0.5]),
    alpha=st.sampled_from([1, -2.0]),
    right=layouts,
    seed=st.integers(0, 999),
)
def test_sums_with_a_bias(
    dtype: torch.dtype, m: int, k: int, n: int, bias_axes: int, beta: float, alpha: float, right: str, seed: int
) -> None:
    a = numbers((m, k), seed, dtype)
    b = laid_out(numbers((k, n), seed + 1, dtype), right)
    bias = numbers((m, n)[2 - bias_axes :], seed + 2, dtype)

    def check(operation: Any, got: Tensor, *low: Tensor, in_place: bool = False) -> None:
        exact = operation(*(t.double() for t in low), beta=beta, alpha=alpha)
        size = operation(*(t.double().abs() for t in low), beta=abs(beta), alpha=abs(alpha))
        assert_rounded_once(got, exact, size, k + 2)

    with mz.fast_cpu():
        check(torch.addmm, torch.addmm(bias, a, b, beta=beta, alpha=alpha), bias, a, b)
        check(torch.baddbmm, torch.baddbmm(bias, a[None], b[None], beta=beta, alpha=alpha), bias, a[None], b[None])
        check(torch.addbmm, torch.addbmm(bias, a[None], b[None], beta=beta, alpha=alpha), bias, a[None], b[None])
        whole = bias.expand(m, n).clone()
        check(torch.addmm, whole.clone().addmm_(a, b, beta=beta, alpha=alpha), whole, a, b)
        check(torch.addbmm, whole.clone().addbmm_(a[None], b[None], beta=beta, alpha=alpha), whole, a[None], b[None])
        stack = whole[None].clone()
        check(torch.baddbmm, stack.clone().baddbmm_(a[None], b[None], beta=beta, alpha=alpha), stack, a[None], b[None])
        if bias_axes == 1 and k:
            assert_linear(F.linear, (a, b.t(), bias), k + 1, F.linear(a, b.t(), bias))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 60), k=st.integers(1, 300), seed=st.integers(0, 999), layout=layouts)
def test_vectors(dtype: torch.dtype, m: int, k: int, seed: int, layout: str) -> None:
    a, x = laid_out(numbers((m, k), seed, dtype), layout), numbers((k,), seed + 1, dtype)
    with mz.fast_cpu():
        assert_linear(torch.mv, (a, x), k, torch.mv(a, x))
        assert_linear(torch.dot, (a[0], x), k, torch.dot(a[0], x))
        assert_linear(torch.matmul, (x, a.t()), k, x @ a.t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-40, 6e-8, 3e38, 65504.0])
def test_special_values(dtype: torch.dtype, value: float) -> None:
    left = torch.full((9, 21), value).to(dtype)
    right = torch.eye(21, 20).to(dtype)
    expected = left.float().clone()[:, :20]
    expected = expected if torch.isfinite(left.float()).all() else torch.full_like(expected, float("nan"))
    with mz.fast_cpu():
        got = left @ right
        ones = left[:, :1] @ right[:1, :1]
    torch.testing.assert_close(got.float(), expected, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(ones, left[:, :1], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_operands(dtype: torch.dtype) -> None:
    left, right = numbers((1, 8), 0, dtype).expand(60, 8), numbers((8, 1), 1, dtype).expand(8, 40)
    one = numbers((1, 1), 2, dtype).expand(60, 8)
    with mz.fast_cpu():
        assert_linear(torch.mm, (left, right), 8, left @ right)
        assert_linear(torch.mm, (one, right), 8, one @ right)


def test_the_packing_kernel_is_what_computes_large_products(path: str) -> None:
    before = call_counts().get(("mm", Path.PACKED), 0)
    with mz.fast_cpu():
        numbers((128, 128), 0, torch.bfloat16) @ numbers((128, 128), 1, torch.bfloat16)
    after = call_counts().get(("mm", Path.PACKED), 0)
    assert after - before == (path == "packed" and packed.is_available(torch.bfloat16, torch.get_num_threads()))


def test_products_do_not_depend_on_the_number_of_threads() -> None:
    a, b = numbers((300, 700), 0, torch.bfloat16), numbers((700, 500), 1, torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with mz.fast_cpu():
                results.append(a @ b)
    finally:
        torch.set_num_threads(threads)
    if packed.is_available(torch.bfloat16, 5):
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python warns that a forked process had threads
def test_scratch_memory_is_not_shared_with_forked_processes() -> None:
    workspace = packed._workspace(16)
    workspace[:16] = 1.0
    child = os.fork()
    if child == 0:
        workspace[:16] = 2.0
        os._exit(0)
    os.waitpid(child, 0)
    assert packed._workspace(16)[:16].eq(1.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_products(dtype: torch.dtype) -> None:
    a, b = numbers((48, 32), 0, dtype), numbers((3, 32, 16), 1, dtype)
    ends = torch.tensor([16, 16, 48], dtype=torch.int32)
    cuts = ((0, 16), (16, 16), (16, 48))
    with mz.fast_cpu():
        got = F.grouped_mm(a, b, offs=ends)
        for index, (start, end) in enumerate(cuts):
            assert_linear(torch.mm, (a[start:end], b[index]), 32, got[start:end])
        got = F.grouped_mm(a.t(), numbers((48, 16), 2, dtype), offs=ends)
        for index, (start, end) in enumerate(cuts):
            low = (a.t()[:, start:end], numbers((48, 16), 2, dtype)[start:end])
            assert_linear(torch.mm, low, 48, got[index])
        stacked = numbers((3, 8, 32), 3, dtype)
        assert_linear(torch.bmm, (stacked, b), 32, F.grouped_mm(stacked, b))
        got = F.grouped_mm(stacked, numbers((32, 48), 4, dtype), offs=ends)
        for index, (start, end) in enumerate(cuts):
            low = (stacked[index], numbers((32, 48), 4, dtype)[:, start:end])
            assert_linear(torch.mm, low, 32, got[:, start:end])


convolutions = st.fixed_dictionaries(
    {
        "axes": st.integers(1, 3),
        "groups": st.sampled_from([1, 2]),
        "kernel": st.integers(1, 3),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 1),
        "dilation": st.integers(1, 2),
        "is_transposed": st.booleans(),
        "has_bias": st.booleans(),
        "is_channels_last": st.booleans(),
        "batch": st.integers(1, 2),
        "seed": st.integers(0, 999),
    }
)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(how=convolutions)
def test_convolutions(dtype: torch.dtype, how: dict[str, Any]) -> None:
    axes, groups = how["axes"], how["groups"]
    name = f"conv{'_transpose' if how['is_transposed'] else ''}{axes}d"
    operation = getattr(F, name)
    source = numbers((how["batch"], 4, *[6] * axes), how["seed"], dtype)
    weight = numbers((4, 6 // groups if how["is_transposed"] else 4 // groups, *[how["kernel"]] * axes), 7, dtype)
    channels = 6 if how["is_transposed"] else 4
    if how["is_channels_last"] and axes > 1:
        last = torch.channels_last if axes == 2 else torch.channels_last_3d
        source, weight = source.to(memory_format=last), weight.to(memory_format=last)
    low = [source, weight, *([numbers((channels,), 9, dtype)] if how["has_bias"] else [])]
    settings_ = {key: how[key] for key in ("stride", "padding", "dilation")} | {"groups": groups}

    def run(*tensors: Tensor) -> Tensor:
        return operation(*tensors, **settings_)

    terms = 4 * how["kernel"] ** axes + 1
    leaves = [t.clone().requires_grad_() for t in low]
    with mz.fast_cpu():
        out = run(*leaves)
        assert_linear(run, low, terms, out.detach())
        grad_out = numbers(tuple(out.shape), 11, dtype)
        grads = torch.autograd.grad(out, leaves, grad_out)

    def exact_grads(*tensors: Tensor) -> tuple[Tensor, ...]:
        inner = [t.clone().requires_grad_() for t in tensors[:-1]]
        return torch.autograd.grad(run(*inner), inner, tensors[-1])

    exact = exact_grads(*(t.double() for t in low), grad_out.double())
    size = exact_grads(*(t.double().abs() for t in low), grad_out.double().abs())
    for got, wanted, magnitude in zip(grads, exact, size, strict=True):
        assert_rounded_once(got, wanted, magnitude, max(terms, 6 * 3**axes, out.numel() // channels))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, "low"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention(dtype: torch.dtype, mask_dtype: Any, kv_heads: int) -> None:
    """Outputs are averages of values: half an ulp for the result, and for weights that bfloat16's kernel rounds too.

    Gradients pass two products more, each of operands with a relative error of eps: 8 eps of the largest bounds them.
    """
    query = numbers((2, 4, 24, 16), 0, dtype)
    key, value = (numbers((2, kv_heads, 24, 16), seed, dtype) for seed in (1, 2))
    mask = None
    if mask_dtype is torch.bool:
        mask = torch.ones(24, 24, dtype=torch.bool).tril()
    elif mask_dtype == "low":
        mask = numbers((24, 24), 3, dtype)
    low = [t.clone().requires_grad_() for t in (query, key, value)]
    full = [t.double().requires_grad_() for t in (query, key, value)]

    def run(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        given = mask.to(dtype) if mask is not None and mask.dtype != torch.bool else mask
        return F.scaled_dot_product_attention(
            *tensors, attn_mask=given, is_causal=mask is None, enable_gqa=kv_heads != 4
        )

    with mz.fast_cpu():
        got = run(low, dtype)
        grads = torch.autograd.grad(got.float().square().sum(), low)
    exact = run(full, torch.float64)
    exact_grads = torch.autograd.grad(exact.square().sum(), full)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=eps, atol=eps * float(value.abs().max()))
    for one, other in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=8 * eps, atol=8 * eps * float(other.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_recurrent_layers(dtype: torch.dtype, kind: str) -> None:
    """Gates and states are rounded at each of 5 steps; with eps per step and slopes below 1, 16 eps bounds the sum."""
    torch.manual_seed(0)
    layer = getattr(torch.nn, kind)(12, 10)
    low, full = layer.to(dtype), getattr(torch.nn, kind)(12, 10).double()
    full.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    x = numbers((3, 12) if "Cell" in kind else (5, 3, 12), 1, dtype)

    def first(out: Any) -> Tensor:
        return out if isinstance(out, Tensor) else out[0]

    with mz.fast_cpu():
        got = first(low(x))
        got.float().sum().backward()
    exact = first(full(x.double()))
    exact.sum().backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=16 * eps)
    for one, other in zip(low.parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=32 * eps * float(other.grad.abs().max()))


LABELS = torch.arange(24) % 7
LEFT_TO_TORCH = {
    "embedding": lambda x: F.embedding(LABELS, x.flatten(1)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x, 2),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "cross_entropy": lambda x: F.cross_entropy(x.flatten(1), LABELS),
    "nll_loss": lambda x: F.nll_loss(x.flatten(1), LABELS),
    "mse_loss": lambda x: F.mse_loss(x, x.detach() * 0.5),
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "add": lambda x: x + 0.5,
    "mul": lambda x: x * x,
    "sum": lambda x: x.sum((1, 2)),
    "mean": lambda x: x.mean(1),
    "cumsum": lambda x: x.cumsum(-1),
    "cat": lambda x: torch.cat((x, x), 1),
    "linear in bilinear": lambda x: F.bilinear(x[0, 0], x[0, 1], x[:3, 0]),
    "pdist": lambda x: torch.cdist(x[:, 0].flatten(0, 1), x[:, 1].flatten(0, 1) + 3),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "gaps"])
@pytest.mark.parametrize("name", LEFT_TO_TORCH)
def test_what_is_left_to_torch(name: str, layout: str, dtype: torch.dtype) -> None:
    """Forward and backward of the other operations of models inside the context, against float64.

    Each makes a few roundings of half an ulp: 4 eps of the norm for the result, 8 for the gradient.
    """
    operation = LEFT_TO_TORCH[name]
    low = numbers((24, 4, 6, 6), 3, dtype)
    if layout == "channels_last":
        low = low.to(memory_format=torch.channels_last)
    elif layout == "gaps":
        low = laid_out(low, "S")
    leaf, exact = low.detach().requires_grad_(), low.double().requires_grad_()
    with mz.fast_cpu():
        out = operation(leaf)
        upstream = numbers(tuple(out.shape), 4, dtype)
        (grad,) = torch.autograd.grad(out, leaf, upstream)
    wanted = operation(exact)
    (wanted_grad,) = torch.autograd.grad(wanted, exact, upstream.double())
    eps = torch.finfo(dtype).eps
    out, wanted = out.detach().double(), wanted.detach()
    assert float((out - wanted).norm()) <= 4 * eps * float(wanted.norm()) + 1e-12
    assert float((grad.double() - wanted_grad).norm()) <= 8 * eps * float(wanted_grad.norm()) + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_agreement_with_torchs_kernels(dtype: torch.dtype) -> None:
    """Both are roundings of a float32 sum, so they differ by one ulp at most, and only where that is near a tie."""
    a, b = numbers((65, 200), 0, dtype), numbers((200, 70), 1, dtype)
    image, weight = numbers((2, 8, 12, 12), 2, dtype), numbers((8, 8, 3, 3), 3, dtype)
    stock = (a @ b, F.conv2d(image, weight))
    with mz.fast_cpu():
        ours = (a @ b, F.conv2d(image, weight))
    for one, other in zip(ours, stock, strict=True):
        words, other_words = (t.view(torch.int16).int() for t in (one, other))
        apart = (words - other_words).abs()
        big = one.abs().float() > 0.1  # sums that cancel lie many of their own small ulps apart
        assert int(apart[big].max()) <= 1
        assert float((apart[big] == 0).float().mean()) > 0.97
