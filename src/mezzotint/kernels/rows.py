"""Passes over a row of numbers as vector instructions of LLVM's portable kind: read, compute in float32, add up, write.

A pass is a body that is written once, in the steps of `Vectors`, and emitted three times: for 4 x 16 numbers, for 16,
and for one, so that rows of any length are served without padding. The number of lanes is the same for every processor,
so the sums are too: 64 partial sums, added as a tree. A sum of n terms has at most n / 64 + 16 roundings on the way of
any term (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 4.2), where one running sum has n.

Numbers are stored as float32, bfloat16 or float16 words at an address; rounding is to nearest, ties to even.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from mezzotint.kernels.constants import FLOAT16, FLOAT32

LANES, UNROLL = 16, 4

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_F16, _F32 = ir.HalfType(), ir.FloatType()


class Vectors:
    """The steps of a body: on `lanes` numbers each, from the number `index` of a row on."""

    def __init__(self, builder: Any, index: Any, lanes: int) -> None:
        self.builder, self._index, self._lanes = builder, index, lanes
        self._words, self._halves = ir.VectorType(_I16, lanes), ir.VectorType(_F16, lanes)
        self._bits, self._floats = ir.VectorType(_I32, lanes), ir.VectorType(_F32, lanes)

    def read(self, row: Any, kind: int) -> Any:
        """Return the numbers of the row at an address."""
        if kind == FLOAT32:
            return self.builder.load(self._place(row, 4, self._floats), align=4)
        if kind == FLOAT16:
            return self.builder.fpext(self.builder.load(self._place(row, 2, self._halves), align=2), self._floats)
        words = self.builder.load(self._place(row, 2, self._words), align=2)
        return self.floats(self.builder.shl(self.builder.zext(words, self._bits), self.whole(16)))

    def write(self, row: Any, kind: int, numbers: Any) -> None:
        """Round numbers into the row at an address."""
        if kind == FLOAT32:
            self.builder.store(numbers, self._place(row, 4, self._floats), align=4)
        elif kind == FLOAT16:
            halves = self.builder.fptrunc(numbers, self._halves)
            self.builder.store(halves, self._place(row, 2, self._halves), align=2)
        else:
            words = self.builder.trunc(self._bfloat16(numbers), self._words)
            self.builder.store(words, self._place(row, 2, self._words), align=2)

    def _bfloat16(self, numbers: Any) -> Any:
        builder, bits = self.builder, self.bits(numbers)
        upper = builder.lshr(bits, self.whole(16))
        last = builder.and_(upper, self.whole(1))
        near = builder.lshr(builder.add(bits, builder.add(last, self.whole(0x7FFF))), self.whole(16))
        is_nan = builder.fcmp_unordered("uno", numbers, numbers)
        return builder.select(is_nan, builder.or_(upper, self.whole(0x40)), near)

    def _place(self, row: Any, word_bytes: int, vector: Any) -> Any:
        offset = self.builder.mul(self._index, _I64(word_bytes))
        return self.builder.inttoptr(self.builder.add(row, offset), vector.as_pointer())

    def number(self, value: float) -> Any:
        """Return a float32 constant in all lanes."""
        return ir.Constant(self._floats, [value] * self._lanes)

    def whole(self, value: int) -> Any:
        """Return a 32-bit constant in all lanes."""
        return ir.Constant(self._bits, [value] * self._lanes)

    def spread(self, value: Any) -> Any:
        """Return one float32 in all lanes."""
        undefined = ir.Constant(self._floats, ir.Undefined)
        first = self.builder.insert_element(undefined, value, _I32(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(self._bits, [0] * self._lanes))

    def floats(self, bits: Any) -> Any:
        """Return the numbers that have these bits."""
        return self.builder.bitcast(bits, self._floats)

    def bits(self, numbers: Any) -> Any:
        """Return the bits of numbers."""
        return self.builder.bitcast(numbers, self._bits)

    def add(self, one: Any, other: Any) -> Any:
        """Return the sum."""
        return self.builder.fadd(one, other)

    def subtract(self, one: Any, other: Any) -> Any:
        """Return the difference."""
        return self.builder.fsub(one, other)

    def multiply(self, one: Any, other: Any) -> Any:
        """Return the product."""
        return self.builder.fmul(one, other)

    def divide(self, one: Any, other: Any) -> Any:
        """Return the quotient."""
        return self.builder.fdiv(one, other)

    def negative_magnitude(self, numbers: Any) -> Any:
        """Return numbers with their signs set."""
        return self.floats(self.builder.or_(self.bits(numbers), self.whole(0x80000000)))

    def is_negative(self, numbers: Any) -> Any:
        """Return whether each number is below zero."""
        return self.builder.fcmp_ordered("<", numbers, self.number(0.0))

    def choose(self, condition: Any, one: Any, other: Any) -> Any:
        """Return the first where the condition holds, the second where not."""
        return self.builder.select(condition, one, other)

    def at_least(self, limit: float, numbers: Any) -> Any:
        """Return numbers with those below a limit raised to it; a NaN stays."""
        bound = self.number(limit)
        return self.builder.select(self.builder.fcmp_ordered("<", numbers, bound), bound, numbers)

    def multiply_add(self, one: Any, other: Any, added: Any) -> Any:
        """Return one * other + added, rounded once."""
        kind = ir.FunctionType(self._floats, [self._floats] * 3)
        fma = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fma.v{self._lanes}f32")
        return self.builder.call(fma, [one, other, added])


Body = Callable[[Vectors, list[Any]], list[Any]]


def walk(builder: Any, count: Any, body: Body, num_sums: int = 0) -> list[Any]:
    """Emit a pass over rows of `count` numbers and return the sums, each a float32.

    `body` gets the vectors that sums have grown to, and returns what they are with its own terms.
    """
    index = _I64(0)
    totals = [_zeros(LANES, num_sums) for _ in range(UNROLL)]
    index, totals = _loop(builder, index, count, LANES, totals, body)
    index, firsts = _loop(builder, index, count, LANES, totals[:1], body)
    index, rest = _loop(builder, index, count, 1, [_zeros(1, num_sums)], body)
    sums = []
    for first, second, third, fourth, single in zip(*firsts, *totals[1:], *rest, strict=True):
        total = builder.fadd(builder.fadd(first, second), builder.fadd(third, fourth))
        sums.append(builder.fadd(_total(builder, total), builder.extract_element(single, _I32(0))))
    return sums


def _zeros(lanes: int, num_sums: int) -> list[Any]:
    return [ir.Constant(ir.VectorType(_F32, lanes), [0.0] * lanes) for _ in range(num_sums)]


def _loop(builder: Any, index: Any, count: Any, lanes: int, totals: list[list[Any]], body: Body) -> Any:
    """Emit the loop over whole steps from `index` on, unrolled as often as there are totals; return where it ends."""
    before = builder.block
    test, step, done = (builder.append_basic_block(name) for name in ("test", "step", "done"))
    builder.branch(test)
    builder.position_at_end(test)
    place = builder.phi(_I64)
    place.add_incoming(index, before)
    running = []
    for row in totals:
        running.append([builder.phi(total.type) for total in row])
        for phi, total in zip(running[-1], row, strict=True):
            phi.add_incoming(total, before)
    following = builder.add(place, _I64(lanes * len(totals)))
    builder.cbranch(builder.icmp_signed("<=", following, count), step, done)
    builder.position_at_end(step)
    for unrolled, row in enumerate(running):
        found = body(Vectors(builder, builder.add(place, _I64(unrolled * lanes)), lanes), list(row))
        for phi, total in zip(row, found, strict=True):
            phi.add_incoming(total, builder.block)
    # a body has no branches, so that this is the block its sums come from
    place.add_incoming(following, builder.block)
    builder.branch(test)
    builder.position_at_end(done)
    return place, running


def _total(builder: Any, vector: Any) -> Any:
    """Return the sum of all lanes, halves first."""
    undefined = ir.Constant(vector.type, ir.Undefined)
    width = LANES // 2
    while width:
        picks = [lane + width if lane < width else lane for lane in range(LANES)]
        upper = builder.shuffle_vector(vector, undefined, ir.Constant(ir.VectorType(_I32, LANES), picks))
        vector = builder.fadd(vector, upper)
        width //= 2
    return builder.extract_element(vector, _I32(0))
