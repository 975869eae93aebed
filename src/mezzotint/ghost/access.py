"""What an operation really moves between memory and the card, where strides make it more or less than its elements.

A tensor with gaps (every second element) moves whole sectors of 32 bytes; an expanded one is read once. An operand
whose order differs from the result's is read across its rows: kernels that do so reach about half the speed of a copy,
which counts here as reading it three times (NVIDIA's transpose example: 40 % of a copy's speed without shared memory,
https://developer.nvidia.com/blog/efficient-matrix-transpose-cuda-cc/; later cards have larger caches).
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

_SECTOR = 32
_ACROSS = 3


def extra_bytes(args: Any, out: Any) -> int:
    """Return the bytes that an operation moves beyond those of its operands' and results' elements; may be negative."""
    results = list(_tensors(out))
    operands = list(_tensors(args))
    if all(one.is_contiguous() for one in (*operands, *results)):
        return 0
    fastest = _fastest(results[0]) if results else None
    total = 0
    for one in operands:
        is_alike = fastest is not None and one.shape == results[0].shape
        total += _touched(one, fastest if is_alike else None) - one.numel() * one.element_size()
    for one in results:
        total += _touched(one, None) - one.numel() * one.element_size()
    return total


def _tensors(tree: Any) -> Iterator[Tensor]:
    for one in tree if isinstance(tree, (tuple, list)) else (tree,):
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (tuple, list)):
            yield from _tensors(one)


def _touched(tensor: Tensor, fastest: int | None) -> int:
    """Return the bytes of the sectors that are touched when the axis `fastest` is walked first (None: the best)."""
    distinct, smallest = 1, 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if size > 1 and stride:
            distinct *= size
            smallest = min(smallest or stride, stride)
        elif not size:
            return 0
    itemsize = tensor.element_size()
    moved = distinct * (itemsize if smallest <= 1 else min(smallest * itemsize, max(_SECTOR, itemsize)))
    if fastest is not None and smallest and tensor.stride(fastest) > smallest:
        moved *= _ACROSS
    return moved


def _fastest(tensor: Tensor) -> int | None:
    """Return the axis along which a tensor's neighbours lie."""
    axes = [
        (stride, axis)
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        if size > 1 and stride
    ]
    return min(axes)[1] if axes else None
