"""Tensors of all kinds given to the rounding and statistics of tensors: the oracle's numbers, or one of our errors."""

import contextlib
import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hostile import examples, in_child
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.formats.catalog import BLOCK_FORMATS, FORMATS
from mezzotint.formats.rounding import Overflow, Rounding, round_scalar
from mezzotint.kernels import tensors as kernels

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e8m0fnu, torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float4_e2m1fn_x2),
)
SPECIAL = (0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-149, 65520.0, 448.0, 464.0, 3.4028234663852886e38, 1.0)


class Subclass(torch.Tensor):
    """A tensor that somebody else has changed."""


@st.composite
def dense(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of random bits and special numbers, of any shape and strides, views of others among them."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4) | st.lists(st.sampled_from([1, 31, 33, 64]), max_size=1))
    count = math.prod(shape)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    numbers = bits.view(torch.float32)
    if draw(st.booleans()):
        numbers = torch.randn(count, generator=generator) * 2.0 ** draw(st.integers(-30, 30))
    for place, number in enumerate(draw(st.lists(st.sampled_from(SPECIAL), max_size=count))):
        numbers[place] = number
    dtype = dtype or draw(st.sampled_from(DTYPES[:-1]))
    return laid_out(draw, numbers.view(shape).to(dtype))


def laid_out(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """Return the tensor's numbers in another layout."""
    layout = draw(st.sampled_from(["as it is", "transposed", "every other", "expanded", "reversed", "offset", "alias"]))
    if layout == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(0, -1)
    if layout == "every other" and tensor.dim():
        return tensor.repeat_interleave(2, dim=-1)[..., ::2] if tensor.element_size() > 1 else tensor
    if layout == "expanded":
        return tensor.expand(3, *tensor.shape)
    if layout == "reversed" and tensor.dim() >= 2:
        return tensor.permute(*reversed(range(tensor.dim())))
    if layout == "offset" and tensor.numel():
        return tensor.flatten()[1:]
    if layout == "alias" and tensor.numel() >= 3 and tensor.dim() == 1:
        return tensor.as_strided((tensor.numel() // 2, 2), (1, 1))
    return tensor


def dangerous() -> st.SearchStrategy[Callable[[], Tensor]]:
    """Makers of tensors whose numbers cannot be read at an address, or not all of them."""

    def freed() -> Tensor:
        tensor = torch.randn(64)
        tensor.untyped_storage().resize_(0)
        return tensor

    def half_freed() -> Tensor:
        tensor = torch.randn(1 << 20)
        tensor.untyped_storage().resize_(64)
        return tensor

    def wrapped(function: Callable[[Tensor], Any]) -> Callable[[], Tensor]:
        def make() -> Tensor:
            kept: list[Tensor] = []

            def keep(tensor: Tensor) -> Tensor:
                kept.append(tensor)
                return tensor * 1

            function(keep)  # type: ignore[arg-type]
            return kept[0]

        return make

    makers: list[Callable[[], Tensor]] = [
        freed,
        half_freed,
        lambda: torch._efficientzerotensor(64),
        lambda: torch.empty(64, device="meta"),
        lambda: torch.randn(8, 8).to_sparse(),
        lambda: torch.randn(8, 8).to_sparse_csr(),
        lambda: torch.randn(8, 8).to_mkldnn(),
        lambda: torch.quantize_per_tensor(torch.randn(64), 0.1, 0, torch.qint8),
        lambda: torch.nested.nested_tensor([torch.randn(3), torch.randn(5)]),
        lambda: torch.nested.nested_tensor([torch.randn(3), torch.randn(5)], layout=torch.jagged),
        lambda: torch.randn(64).as_subclass(Subclass),
        lambda: torch.randn(64, dtype=torch.complex64).conj().imag,  # a negative view
        lambda: torch.nn.Parameter(torch.randn(64)),
        torch.nn.UninitializedParameter,
        lambda: torch.nn.Buffer(torch.randn(64)),
        lambda: torch.empty(64, dtype=torch.float4_e2m1fn_x2),
        wrapped(lambda keep: torch.vmap(keep)(torch.randn(4, 8))),
        wrapped(lambda keep: torch.func.grad(lambda x: keep(x).sum())(torch.randn(8))),
        wrapped(lambda keep: torch.func.jvp(keep, (torch.randn(8),), (torch.ones(8),))),
        wrapped(lambda keep: torch.func.functionalize(keep)(torch.randn(8))),
        fake,
    ]
    return st.sampled_from(makers)


@cache
def load_jvp() -> None:
    """Let torch load what forward mode needs, once and not in every child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))


def fake() -> Tensor:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.randn(64)


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "round_to e4m3": lambda x: kernels.round_to(x, "e4m3"),
    "round_to in place": lambda x: kernels.round_to(x, "bfloat16", out=x),
    "round_to at random": lambda x: kernels.round_to(x, "bfloat16", rounding=Rounding.STOCHASTIC, seed=3),
    "encode": lambda x: kernels.encode(x, "e5m2"),
    "decode": lambda x: kernels.decode_codes(x, "e4m3"),
    "round_to_blocks": lambda x: kernels.round_to_blocks(x, "mxfp8_e4m3"),
    "quantize_blocks": lambda x: kernels.quantize_blocks(x, "nvfp4").numbers(),
    "range_stats": kernels.range_stats,
}


def same(one: float, other: float) -> bool:
    return (math.isnan(one) and math.isnan(other)) or (
        one == other and math.copysign(1, one) == math.copysign(1, other)
    )


@examples(150)
@given(
    st.sampled_from(FLOATS).flatmap(dense),
    st.sampled_from(FORMATS),
    st.sampled_from([Rounding.NEAREST_EVEN, Rounding.TOWARD_ZERO]),
    st.none() | st.sampled_from(Overflow),
    st.sampled_from(["fresh", "transposed", "in place", "overlapping"]),
)
def test_rounding_equals_the_scalar_oracle(
    source: Tensor, fmt: Any, rounding: Rounding, overflow: Overflow | None, where: str
) -> None:
    if where == "overlapping":
        both = torch.zeros(source.numel() + 1, dtype=source.dtype)
        both[:-1] = source.flatten()
        source, out = both[:-1], both[1:]
    elif where == "in place":
        out = source
    else:
        turned = torch.empty(source.shape[::-1]).permute(tuple(reversed(range(source.dim()))))
        out = turned if where == "transposed" else None
    numbers = source.detach().clone().flatten().double().tolist()
    try:
        got = kernels.round_to(source, fmt, out=out, rounding=rounding, overflow=overflow)
    except MezzotintError:
        return
    for number, found in zip(numbers, got.flatten().double().tolist(), strict=True):
        # float32 has a NaN where the format has none
        expected = number if math.isnan(number) else round_scalar(number, fmt, rounding, overflow)
        assert same(expected, found), (number, expected, found)


@examples(80)
@given(dense())
def test_statistics_count_what_is_there(source: Tensor) -> None:
    try:
        stats = kernels.range_stats(source)
    except MezzotintError:
        assert not source.is_floating_point()
        return
    numbers = source.double().flatten()
    finite = numbers[numbers.isfinite()].abs()
    assert stats.count == source.numel()
    assert stats.nans == int(numbers.isnan().sum())
    assert stats.infinities == int(numbers.isinf().sum())
    assert stats.zeros == int((numbers == 0).sum())
    assert stats.amax == (float(finite.max()) if finite.numel() else 0.0)


@examples(80)
@given(dense(), st.sampled_from(sorted(CALLS)))
def test_every_call_takes_a_tensor_or_refuses_it(source: Tensor, name: str) -> None:
    try:
        got = CALLS[name](source)
    except MezzotintError:
        return
    if isinstance(got, Tensor):
        assert got.shape == source.shape


@examples(40)
@given(st.sampled_from(FLOATS).flatmap(dense), st.sampled_from(BLOCK_FORMATS), st.integers(-4, 4))
def test_blocks_equal_their_codes(source: Tensor, fmt: Any, axis: int) -> None:
    try:
        rounded = kernels.round_to_blocks(source, fmt, axis=axis)
    except (MezzotintError, IndexError):
        assert not -source.dim() <= axis < source.dim()
        return
    again = kernels.quantize_blocks(source, fmt, axis=axis).numbers()
    assert rounded.shape == source.shape
    assert torch.equal(rounded.nan_to_num(-7.0), again.nan_to_num(-7.0))


@examples(21)
@given(dangerous())
def test_no_call_crashes_on_a_tensor_without_memory(make: Callable[[], Tensor]) -> None:
    load_jvp()

    def work() -> None:
        warnings.simplefilter("ignore")
        for name in sorted(CALLS):
            # torch's own word on an operation that this kind of tensor does not have will do
            with contextlib.suppress(Exception):
                CALLS[name](make())

    in_child(work)
