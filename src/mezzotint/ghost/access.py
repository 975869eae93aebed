"""What an operation really moves between memory and the card, where strides make it more or less than its elements.

A tensor with gaps (every second element) moves whole sectors of 32 bytes; an expanded one is read once. An operand
whose order differs from the result's is read across its rows: neighbouring threads read different sectors, and those
that need the rest of a sector run later and find it in the L2 cache, so memory moves it once and the cache as often as
it has elements (https://developer.nvidia.com/blog/efficient-matrix-transpose-cuda-cc/ shows the first half of this).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

_SECTOR = 32


class Access(NamedTuple):
    """Bytes beyond the elements that memory moves (may be negative), and those that the L2 cache serves in sectors."""

    memory: int
    across: int


NONE = Access(0, 0)


def access_of(args: Any, out: Any) -> Access:
    """Return what strides add to the bytes of an operation's operands and results."""
    results = list(_tensors(out))
    operands = list(_tensors(args))
    if all(one.is_contiguous() for one in (*operands, *results)):
        return NONE
    fastest = _fastest(results[0]) if results else None
    memory = across = 0
    for one in operands:
        distinct, smallest = _steps(one)
        if fastest is not None and one.shape == results[0].shape and one.stride(fastest) > smallest > 0:
            across += distinct * max(_SECTOR, one.element_size())
        memory += _touched(one) - one.numel() * one.element_size()
    for one in results:
        memory += _touched(one) - one.numel() * one.element_size()
    return Access(memory, across)


def num_turned(operands: Any) -> int:
    """Return how many of a product's two matrices do not lie along the axis that is summed over.

    0 for a linear layer, 1 for the gradient of its input, 2 for that of its weight.
    """
    first, second = [one for one in operands if isinstance(one, Tensor)][-2:]
    return int(_is_turned(first, -1)) + int(_is_turned(second, -2 if second.dim() > 1 else -1))


def _is_turned(matrix: Tensor, axis: int) -> bool:
    other = -3 - axis
    if matrix.dim() < 2 or not matrix.numel() or matrix.shape[axis] == 1 or matrix.shape[other] == 1:
        return False
    return matrix.stride(axis) > matrix.stride(other)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for one in tree if isinstance(tree, (tuple, list)) else (tree,):
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (tuple, list)):
            yield from _tensors(one)


def _steps(tensor: Tensor) -> tuple[int, int]:
    """Return how many different elements a tensor has, and the smallest step between them; 0, 0 without elements."""
    distinct, smallest = 1, 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size > 1 and stride:
            distinct *= size
            smallest = min(smallest or stride, stride)
        elif not size:
            return 0, 0
    return distinct, smallest


def _touched(tensor: Tensor) -> int:
    """Return the bytes of the sectors that are touched."""
    distinct, smallest = _steps(tensor)
    itemsize = tensor.element_size()
    return distinct * (itemsize if smallest <= 1 else min(smallest * itemsize, max(_SECTOR, itemsize)))


def _fastest(tensor: Tensor) -> int | None:
    """Return the axis along which a tensor's neighbours lie."""
    axes = [
        (stride, axis)
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        if size > 1 and stride
    ]
    return min(axes)[1] if axes else None
