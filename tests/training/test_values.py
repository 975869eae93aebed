"""Nested values survive the way through JSON and tensors bit for bit."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.errors import CheckpointError
from mezzotint.training.values import flatten, unflatten

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def through(value):
    tree, tensors = flatten(value)
    return unflatten(json.loads(json.dumps(tree)), tensors)


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.contiguous().flatten().view(torch.uint8).tolist()
            == right.contiguous().flatten().view(torch.uint8).tolist()
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float):
        return left == right or (math.isnan(left) and math.isnan(right))
    return left == right


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    raw = torch.randint(0, 256, (math.prod(shape), 16), generator=generator, dtype=torch.uint8)
    if dtype is torch.bool:
        return (raw[:, 0] > 127).reshape(shape)
    width = torch.empty((), dtype=dtype).element_size()
    return raw[:, :width].contiguous().view(dtype).reshape(shape)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
values = st.recursive(
    scalars | tensors() | st.sampled_from(DTYPES),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(value=values)
def test_the_way_there_and_back_is_identity(value) -> None:
    assert same(through(value), value)


def test_shared_memory_is_stored_once_and_comes_back_shared() -> None:
    weight = torch.randn(3, 4)
    state = {"embed": weight, "head": weight, "other": weight.clone(), "row": weight[0]}
    _, tensors = flatten(state)
    assert len(tensors) == 3
    back = through(state)
    assert back["embed"] is back["head"]
    assert back["other"] is not back["embed"]
    assert torch.equal(back["row"], weight[0])


def test_the_copy_is_taken_at_once() -> None:
    weight = torch.zeros(2)
    _, tensors = flatten({"w": weight})
    weight.fill_(1)
    assert tensors["w"].tolist() == [0, 0]


def test_non_contiguous_tensors_keep_their_values() -> None:
    value = torch.arange(12).view(3, 4).t()
    assert torch.equal(through([value])[0], value)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", lambda: None])
def test_anything_else_is_refused_by_its_place(value) -> None:
    with pytest.raises(CheckpointError, match=r"\.engine\.extra\[1\] is a"):
        flatten({"engine": {"extra": [0, value]}})


def test_an_unknown_mark_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"unknown mark \$future"):
        unflatten({"$future": 1}, {})
