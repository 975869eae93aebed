"""SwiGLU's gate, silu(g) u, forward and backward, on numbers stored as float32, bfloat16 or float16.

    s = 1 / (1 + exp(-g))       y = g s u       du = dy g s       dg = dy u s (1 + g (1 - s))         (arXiv 2002.05202)

All of it is float32 arithmetic and each result is rounded once where it is stored. With e = exp(-|g|), s is 1 / (1 + e)
for g of 0 or more and e / (1 + e) below, and 1 - s the other of them: neither overflows nor cancels, so that silu is
accurate as far as it is a number of float32. As in torch, silu of minus infinity is NaN.

A task takes a block of int64 words; work is handed out in runs of rows.
"""

from array import array
from typing import Any

from numba import carray, types
from numba.extending import intrinsic

from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import BFLOAT16, FLOAT16, FLOAT32
from mezzotint.kernels.rows import Vectors, walk
from mezzotint.kernels.team import run, take_unit, task

# words of a block, behind the counters of units and threads
_NUM_UNITS, _UNIT_ROWS, _NUM_ROWS, _WIDTH, _COUNT, _KIND, _GATE, _GATE_BYTES, _UP, _UP_BYTES = range(2, 12)
_OUT = 12
_GRAD, _GRAD_BYTES, _GRAD_GATE, _GRAD_UP = range(12, 16)
_FORWARD_WORDS, _BACKWARD_WORDS = 13, 16

# elements below which waking other threads takes longer than they save
_SMALLEST_SHARED = 1 << 14
_UNIT_ELEMENTS = 1 << 13

# ln 2 as a float32 and what that leaves
_LN_2, _LN_2_REST = 0.693147182464599609375, -1.904654323148236017e-9
_LOG2_E = 1.44269502162933349609375
_ROUNDER = 12582912.0  # 1.5 * 2^23: float32 numbers of this size are whole, so a sum with it is rounded to an integer
# float32 numbers, as LLVM refuses constants that it would have to round
_TAYLOR = tuple(array("f", [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1]))


def decay(vectors: Vectors, numbers: Any) -> Any:
    """Return exp(-|x|), float32; subnormal results are rounded as such.

    With n = x / ln 2 rounded to an integer, exp(x) = 2^n exp(r), |r| <= ln 2 / 2 (Cody and Waite 1980, Software Manual
    for the Elementary Functions, chapter 6). ln 2 is subtracted in two parts, each with one rounding of |r| < 2^-1, so
    r is off by 2^-25 at most. Taylor's series to r^7 leaves less than 2^-27 of exp(r), and the roundings within it are
    below 1.2 |r| 2^-24: in all 1.05 * 2^-24 of the result. The last step, 1 + r (...), adds half a unit in the last
    place. So the error is below 1.6 units by this bound; the largest that tests have met is 0.92.
    """
    builder = vectors.builder
    # what is beyond becomes 0, too
    clipped = vectors.at_least(-104.0, vectors.negative_magnitude(numbers))
    shifted = vectors.multiply_add(clipped, vectors.number(_LOG2_E), vectors.number(_ROUNDER))
    count = vectors.subtract(shifted, vectors.number(_ROUNDER))
    rest = vectors.multiply_add(count, vectors.number(-_LN_2), clipped)
    rest = vectors.multiply_add(count, vectors.number(-_LN_2_REST), rest)
    total = vectors.number(_TAYLOR[0])
    for coefficient in _TAYLOR[1:]:
        total = vectors.multiply_add(total, rest, vectors.number(coefficient))
    # n, from -150 on, is in the lowest bits of `shifted`; 2^(n + 64) is a normal number and its product exact
    field = builder.add(builder.shl(vectors.bits(shifted), vectors.whole(23)), vectors.whole((127 + 64) << 23))
    return vectors.multiply(vectors.multiply(total, vectors.floats(field)), vectors.number(2.0**-64))


def _sigmoids(vectors: Vectors, gate: Any) -> tuple[Any, Any]:
    """Return the sigmoid of numbers, and 1 minus it."""
    small, one = decay(vectors, gate), vectors.number(1.0)
    larger = vectors.divide(one, vectors.add(one, small))
    smaller = vectors.multiply(small, larger)
    is_negative = vectors.is_negative(gate)
    return vectors.choose(is_negative, smaller, larger), vectors.choose(is_negative, larger, smaller)


def _multiply(kind: int) -> Any:
    @intrinsic
    def multiply(_context: Any, gate: Any, up: Any, out: Any, count: Any) -> Any:
        """Write silu(gate) * up."""
        signature = types.void(*[types.int64] * 4)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            def body(vectors: Vectors, _sums: list[Any]) -> list[Any]:
                gate = vectors.read(args[0], kind)
                small, one = decay(vectors, gate), vectors.number(1.0)
                top = vectors.multiply(gate, vectors.choose(vectors.is_negative(gate), small, one))
                silu = vectors.divide(top, vectors.add(one, small))
                vectors.write(args[2], kind, vectors.multiply(silu, vectors.read(args[1], kind)))
                return []

            walk(builder, args[3], body)
            return context.get_dummy_value()

        return signature, generate

    return multiply


def _gradients(kind: int) -> Any:
    @intrinsic
    def gradients(_context: Any, grad: Any, gate: Any, up: Any, grad_gate: Any, grad_up: Any, count: Any) -> Any:
        """Write the gradients of both factors."""
        signature = types.void(*[types.int64] * 6)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            def body(vectors: Vectors, _sums: list[Any]) -> list[Any]:
                grad, gate = vectors.read(args[0], kind), vectors.read(args[1], kind)
                opened, closed = _sigmoids(vectors, gate)
                slope = vectors.multiply(opened, vectors.multiply_add(gate, closed, vectors.number(1.0)))
                of_gate = vectors.multiply(vectors.multiply(grad, vectors.read(args[2], kind)), slope)
                vectors.write(args[3], kind, of_gate)
                vectors.write(args[4], kind, vectors.multiply(grad, vectors.multiply(gate, opened)))
                return []

            walk(builder, args[5], body)
            return context.get_dummy_value()

        return signature, generate

    return gradients


@intrinsic
def _decays(_context: Any, source: Any, out: Any, count: Any) -> Any:
    """Write `decay` of the float32 numbers at one address to another."""
    signature = types.void(types.int64, types.int64, types.int64)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        def body(vectors: Vectors, _sums: list[Any]) -> list[Any]:
            vectors.write(args[1], FLOAT32, decay(vectors, vectors.read(args[0], FLOAT32)))
            return []

        walk(builder, args[2], body)
        return context.get_dummy_value()

    return signature, generate


_multiply_float32, _multiply_bfloat16, _multiply_float16 = map(_multiply, (FLOAT32, BFLOAT16, FLOAT16))
_gradients_float32, _gradients_bfloat16, _gradients_float16 = map(_gradients, (FLOAT32, BFLOAT16, FLOAT16))


@compiled
def decays(source, out, count):
    """Write `decay` of `count` float32 at one address to another, by which it is tested."""
    _decays(source, out, count)


@task
def forward(block):
    """Write products."""
    words = carray(block, (_FORWARD_WORDS,))
    kind, width = words[_KIND], words[_WIDTH]
    word_bytes = 4 if kind == FLOAT32 else 2
    while True:
        unit = take_unit(block)
        if unit >= words[_NUM_UNITS]:
            break
        first = unit * words[_UNIT_ROWS]
        for row in range(first, min(first + words[_UNIT_ROWS], words[_NUM_ROWS])):
            count = min(width, words[_COUNT] - row * width)
            gate, up = words[_GATE] + row * words[_GATE_BYTES], words[_UP] + row * words[_UP_BYTES]
            out = words[_OUT] + row * width * word_bytes
            if kind == BFLOAT16:
                _multiply_bfloat16(gate, up, out, count)
            elif kind == FLOAT16:
                _multiply_float16(gate, up, out, count)
            else:
                _multiply_float32(gate, up, out, count)


@task
def backward(block):
    """Write the gradients of both factors."""
    words = carray(block, (_BACKWARD_WORDS,))
    kind, width = words[_KIND], words[_WIDTH]
    word_bytes = 4 if kind == FLOAT32 else 2
    while True:
        unit = take_unit(block)
        if unit >= words[_NUM_UNITS]:
            break
        first = unit * words[_UNIT_ROWS]
        for row in range(first, min(first + words[_UNIT_ROWS], words[_NUM_ROWS])):
            count = min(width, words[_COUNT] - row * width)
            grad = words[_GRAD] + row * words[_GRAD_BYTES]
            gate, up = words[_GATE] + row * words[_GATE_BYTES], words[_UP] + row * words[_UP_BYTES]
            place = row * width * word_bytes
            grad_gate, grad_up = words[_GRAD_GATE] + place, words[_GRAD_UP] + place
            if kind == BFLOAT16:
                _gradients_bfloat16(grad, gate, up, grad_gate, grad_up, count)
            elif kind == FLOAT16:
                _gradients_float16(grad, gate, up, grad_gate, grad_up, count)
            else:
                _gradients_float32(grad, gate, up, grad_gate, grad_up, count)


def swiglu_forward(
    *, gate: int, gate_bytes: int, up: int, up_bytes: int, kind: int, width: int, count: int, out: int,
    num_threads: int,
) -> None:  # fmt: skip
    """Write silu(gate) * up for `count` elements in rows of `width`, to dense memory at `out`.

    Rows of a factor lie so many bytes apart; the last one may be short.
    """
    header = _header(width, count, kind)
    block = array("q", (*header, gate, gate_bytes, up, up_bytes, out))
    run(forward, block.buffer_info()[0], _threads(count, header, num_threads))


def swiglu_backward(
    *, grad: int, grad_bytes: int, gate: int, gate_bytes: int, up: int, up_bytes: int, kind: int, width: int,
    count: int, grad_gate: int, grad_up: int, num_threads: int,
) -> None:  # fmt: skip
    """Write the gradients of both factors to dense memory; all else is as in `swiglu_forward`."""
    header = _header(width, count, kind)
    block = array("q", (*header, gate, gate_bytes, up, up_bytes, grad, grad_bytes, grad_gate, grad_up))
    run(backward, block.buffer_info()[0], _threads(count, header, num_threads))


def _header(width: int, count: int, kind: int) -> tuple[int, ...]:
    num_rows = -(-count // width)
    unit_rows = max(1, _UNIT_ELEMENTS // width)
    return 0, 0, -(-num_rows // unit_rows), unit_rows, num_rows, width, count, kind


def _threads(count: int, header: tuple[int, ...], num_threads: int) -> int:
    return min(num_threads, header[_NUM_UNITS]) if count >= _SMALLEST_SHARED else 1
