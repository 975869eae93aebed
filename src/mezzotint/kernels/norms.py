"""RMSNorm over the last axis, forward and backward, on rows stored as float32, bfloat16 or float16.

    r = 1 / sqrt(mean(x^2) + eps)        y = x r w                                     (arXiv 1910.07467)
    h = x r                              dx = r (dy w - h mean(dy w h))                dw = sum over rows of dy h

All of it is float32 arithmetic and each result is rounded once where it is stored. A few rows at a time stay in the
first cache between their passes, so that memory is read once. Sums over a row are those of `mezzotint.kernels.rows`.
The gradient of the weight is summed row by row within blocks of rows, then over blocks in their order; blocks depend on
the number of rows alone, so the result does not depend on the number of threads.

A task takes a block of int64 words; work is handed out by blocks of rows.
"""

from array import array
from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from mezzotint.kernels.addresses import floats_at
from mezzotint.kernels.arithmetic import quotient
from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import BFLOAT16, FLOAT16, FLOAT32
from mezzotint.kernels.rows import Vectors, walk
from mezzotint.kernels.team import run, take_unit, task

_f32 = np.float32

# words of a block, behind the counters of units and threads
_NUM_UNITS, _UNIT_ROWS, _GROUP, _NUM_ROWS, _WIDTH, _KIND, _X, _X_BYTES, _RSTD, _WEIGHT = range(2, 12)
_OUT, _EPS = 12, 13
_GRAD, _GRAD_BYTES, _GRAD_X, _PARTS = range(12, 16)
_FORWARD_WORDS, _BACKWARD_WORDS = 14, 16

# elements below which waking other threads takes longer than they save
_SMALLEST_SHARED = 1 << 15
_UNIT_ELEMENTS = 1 << 14
# rows that take each step together, so that none waits for the end of another's sum; they fit the first cache
_GROUP_ELEMENTS, _LARGEST_GROUP = 1 << 11, 16
# rows whose gradients of the weight are one partial sum; few enough partial sums to cost nothing beside the rows
_SMALLEST_BLOCK, _LARGEST_BLOCKS = 32, 64


def _square_sum(kind: int) -> Any:
    @intrinsic
    def square_sum(_context: Any, x: Any, count: Any) -> Any:
        """Return the sum of squares of a row."""
        signature = types.float32(types.int64, types.int64)

        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            def body(vectors: Vectors, sums: list[Any]) -> list[Any]:
                number = vectors.read(args[0], kind)
                return [vectors.multiply_add(number, number, sums[0])]

            return walk(builder, args[1], body, num_sums=1)[0]

        return signature, generate

    return square_sum


def _scale(kind: int) -> Any:
    @intrinsic
    def scale(context: Any, x: Any, factor: Any, weight: Any, out: Any, count: Any) -> Any:
        """Write x * factor * weight."""
        signature = types.void(types.int64, types.float32, types.int64, types.int64, types.int64)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            x, factor, weight, out, count = args

            def body(vectors: Vectors, _sums: list[Any]) -> list[Any]:
                hat = vectors.multiply(vectors.read(x, kind), vectors.spread(factor))
                vectors.write(out, kind, vectors.multiply(hat, vectors.read(weight, FLOAT32)))
                return []

            walk(builder, count, body)
            return context.get_dummy_value()

        return signature, generate

    return scale


def _products(kind: int) -> Any:
    @intrinsic
    def products(_context: Any, grad: Any, x: Any, factor: Any, weight: Any, totals: Any, count: Any) -> Any:
        """Add grad * (x * factor) to float32 totals, and return the sum of all that times weight."""
        integer, number = types.int64, types.float32
        signature = types.float32(integer, integer, number, integer, integer, integer)

        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            grad, x, factor, weight, totals, count = args

            def body(vectors: Vectors, sums: list[Any]) -> list[Any]:
                hat = vectors.multiply(vectors.read(x, kind), vectors.spread(factor))
                grads = vectors.read(grad, kind)
                vectors.write(totals, FLOAT32, vectors.multiply_add(grads, hat, vectors.read(totals, FLOAT32)))
                weighted = vectors.multiply(grads, vectors.read(weight, FLOAT32))
                return [vectors.multiply_add(weighted, hat, sums[0])]

            return walk(builder, count, body, num_sums=1)[0]

        return signature, generate

    return products


def _input_gradient(kind: int) -> Any:
    @intrinsic
    def input_gradient(
        _context: Any, grad: Any, x: Any, factor: Any, weight: Any, mean: Any, grad_x: Any, count: Any
    ) -> Any:
        """Write factor * (grad * weight - mean * (x * factor))."""
        integer, number = types.int64, types.float32
        signature = types.void(integer, integer, number, integer, number, integer, integer)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            grad, x, factor, weight, mean, grad_x, count = args

            def body(vectors: Vectors, _sums: list[Any]) -> list[Any]:
                factors = vectors.spread(factor)
                hat = vectors.multiply(vectors.read(x, kind), factors)
                weighted = vectors.multiply(vectors.read(grad, kind), vectors.read(weight, FLOAT32))
                along = vectors.multiply(hat, vectors.spread(mean))
                vectors.write(grad_x, kind, vectors.multiply(vectors.subtract(weighted, along), factors))
                return []

            walk(builder, count, body)
            return context.get_dummy_value()

        return signature, generate

    return input_gradient


@intrinsic
def _add(_context: Any, source: Any, totals: Any, count: Any) -> Any:
    """Add a row of float32 to another."""
    signature = types.void(types.int64, types.int64, types.int64)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        def body(vectors: Vectors, _sums: list[Any]) -> list[Any]:
            total = vectors.add(vectors.read(args[1], FLOAT32), vectors.read(args[0], FLOAT32))
            vectors.write(args[1], FLOAT32, total)
            return []

        walk(builder, args[2], body)
        return context.get_dummy_value()

    return signature, generate


_square_sum_float32, _square_sum_bfloat16, _square_sum_float16 = map(_square_sum, (FLOAT32, BFLOAT16, FLOAT16))
_scale_float32, _scale_bfloat16, _scale_float16 = map(_scale, (FLOAT32, BFLOAT16, FLOAT16))
_products_float32, _products_bfloat16, _products_float16 = map(_products, (FLOAT32, BFLOAT16, FLOAT16))
_input_gradient_float32, _input_gradient_bfloat16, _input_gradient_float16 = map(
    _input_gradient, (FLOAT32, BFLOAT16, FLOAT16)
)


@compiled
def _square_sum_of(kind, x, width):
    if kind == BFLOAT16:
        return _square_sum_bfloat16(x, width)
    if kind == FLOAT16:
        return _square_sum_float16(x, width)
    return _square_sum_float32(x, width)


@compiled
def _scale_row(kind, x, factor, weight, out, width):
    if kind == BFLOAT16:
        _scale_bfloat16(x, factor, weight, out, width)
    elif kind == FLOAT16:
        _scale_float16(x, factor, weight, out, width)
    else:
        _scale_float32(x, factor, weight, out, width)


@task
def forward(block):
    """Normalise rows."""
    words = carray(block, (_FORWARD_WORDS,))
    kind, width, weight = words[_KIND], words[_WIDTH], words[_WEIGHT]
    rstd, eps = carray(floats_at(words[_RSTD]), (words[_NUM_ROWS],)), carray(floats_at(words[_EPS]), (1,))[0]
    out_bytes = width * (4 if kind == FLOAT32 else 2)
    while True:
        unit = take_unit(block)
        if unit >= words[_NUM_UNITS]:
            break
        first = unit * words[_UNIT_ROWS]
        last = min(first + words[_UNIT_ROWS], words[_NUM_ROWS])
        for start in range(first, last, words[_GROUP]):
            rows = range(start, min(start + words[_GROUP], last))
            for row in rows:
                total = _square_sum_of(kind, words[_X] + row * words[_X_BYTES], width)
                rstd[row] = quotient(_f32(1), np.sqrt(_f32(quotient(total, _f32(width)) + eps)))
            for row in rows:
                out = words[_OUT] + row * out_bytes
                _scale_row(kind, words[_X] + row * words[_X_BYTES], rstd[row], weight, out, width)


@compiled
def _products_of(kind, grad, x, factor, weight, totals, width):
    if kind == BFLOAT16:
        return _products_bfloat16(grad, x, factor, weight, totals, width)
    if kind == FLOAT16:
        return _products_float16(grad, x, factor, weight, totals, width)
    return _products_float32(grad, x, factor, weight, totals, width)


@compiled
def _write_gradient(kind, grad, x, factor, weight, mean, grad_x, width):
    if kind == BFLOAT16:
        _input_gradient_bfloat16(grad, x, factor, weight, mean, grad_x, width)
    elif kind == FLOAT16:
        _input_gradient_float16(grad, x, factor, weight, mean, grad_x, width)
    else:
        _input_gradient_float32(grad, x, factor, weight, mean, grad_x, width)


@task
def backward(block):
    """Write the gradients of rows and, for each block of rows, that of the weight."""
    words = carray(block, (_BACKWARD_WORDS,))
    kind, width, weight = words[_KIND], words[_WIDTH], words[_WEIGHT]
    rstd = carray(floats_at(words[_RSTD]), (words[_NUM_ROWS],))
    means = np.empty(_LARGEST_GROUP, np.float32)
    out_bytes = width * (4 if kind == FLOAT32 else 2)
    while True:
        unit = take_unit(block)
        if unit >= words[_NUM_UNITS]:
            break
        totals = words[_PARTS] + unit * width * 4
        first = unit * words[_UNIT_ROWS]
        last = min(first + words[_UNIT_ROWS], words[_NUM_ROWS])
        for start in range(first, last, words[_GROUP]):
            rows = range(start, min(start + words[_GROUP], last))
            for row in rows:
                grad, x = words[_GRAD] + row * words[_GRAD_BYTES], words[_X] + row * words[_X_BYTES]
                means[row - start] = quotient(
                    _products_of(kind, grad, x, rstd[row], weight, totals, width), _f32(width)
                )
            if words[_GRAD_X]:
                for row in rows:
                    grad, x = words[_GRAD] + row * words[_GRAD_BYTES], words[_X] + row * words[_X_BYTES]
                    grad_x = words[_GRAD_X] + row * out_bytes
                    _write_gradient(kind, grad, x, rstd[row], weight, means[row - start], grad_x, width)


@compiled
def _add_up(parts, num_parts, totals, width):
    for part in range(num_parts):
        _add(parts + 4 * width * part, totals, width)


def rms_forward(
    *, x: int, x_bytes: int, kind: int, num_rows: int, width: int, weight: int, eps: float, out: int, rstd: int,
    num_threads: int,
) -> None:  # fmt: skip
    """Normalise `num_rows` rows at `x`, `x_bytes` apart, into dense rows at `out`; 1 / rms goes to float32 at `rstd`.

    `weight` is the address of `width` float32.
    """
    unit_rows = max(1, _UNIT_ELEMENTS // width)
    num_units = -(-num_rows // unit_rows)
    settings = array("f", (eps,))
    numbers = (0, 0, num_units, unit_rows, _group(width), num_rows, width, kind, x, x_bytes, rstd, weight, out)
    block = array("q", (*numbers, settings.buffer_info()[0]))
    run(forward, block.buffer_info()[0], _threads(num_rows * width, num_units, num_threads))


def num_parts(num_rows: int) -> int:
    """Return the number of partial sums that the weight's gradient of so many rows is made of."""
    return -(-num_rows // _part_rows(num_rows))


def _part_rows(num_rows: int) -> int:
    return max(_SMALLEST_BLOCK, -(-num_rows // _LARGEST_BLOCKS))


def rms_backward(
    *, grad: int, grad_bytes: int, x: int, x_bytes: int, kind: int, num_rows: int, width: int, weight: int, rstd: int,
    grad_x: int, parts: int, grad_weight: int, num_threads: int,
) -> None:  # fmt: skip
    """Write the gradient of the input to dense rows at `grad_x`, add that of the weight to float32 at `grad_weight`.

    Either may be 0 for none. `parts` is the address of `num_parts` times `width` float32 zeros. All else is as in
    `rms_forward`.
    """
    unit_rows, num_units = _part_rows(num_rows), num_parts(num_rows)
    numbers = (
        0,
        0,
        num_units,
        unit_rows,
        _group(width),
        num_rows,
        width,
        kind,
        x,
        x_bytes,
        rstd,
        weight,
        grad,
        grad_bytes,
        grad_x,
    )
    block = array("q", (*numbers, parts))
    run(backward, block.buffer_info()[0], _threads(num_rows * width, num_units, num_threads))
    if grad_weight:
        _add_up(parts, num_units, grad_weight, width)


def _group(width: int) -> int:
    return min(max(1, _GROUP_ELEMENTS // width), _LARGEST_GROUP)


def _threads(num_elements: int, num_units: int, num_threads: int) -> int:
    return min(num_threads, num_units) if num_elements >= _SMALLEST_SHARED else 1
