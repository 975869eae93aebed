"""The whole of an Adam step in one loop of vector instructions, written in LLVM's portable kind.

Five arrays are read and four written. The loop vectoriser gives up on so many, since any two might overlap, and split
into loops the step waits for memory in each of them, where one loop divides while it waits.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mezzotint.kernels.tiles import LANES

# how weights are held: with float32 masters, rounded at random, with compensations; as MASTER, RANDOM, KAHAN of updates
_MASTER, _RANDOM, _KAHAN = 0, 1, 2
_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INFINITY, _MAGNITUDE, _SIGN, _QUIET = 0x7F800000, 0x7FFFFFFF, 0x80000000, 0x00400000


class _Numbers:
    """Emits instructions on `lanes` numbers at once, or on one."""

    def __init__(self, builder: Any, lanes: int) -> None:
        self.builder, self.lanes = builder, lanes
        self.floats, self.bits, self.words = (self._many(kind) for kind in (_F32, _I32, _I16))

    def _many(self, kind: Any) -> Any:
        return kind if self.lanes == 1 else ir.VectorType(kind, self.lanes)

    def constant(self, kind: Any, value: float) -> Any:
        return ir.Constant(kind, value if self.lanes == 1 else [value] * self.lanes)

    def splat(self, value: Any) -> Any:
        if self.lanes == 1:
            return value
        undefined = ir.Constant(ir.VectorType(value.type, self.lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, value, _I32(0))
        return self.builder.shuffle_vector(
            first, undefined, ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        )

    def place(self, base: Any, index: Any, kind: Any, size: int) -> Any:
        address = self.builder.add(base, self.builder.mul(index, _I64(size)))
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, base: Any, index: Any, kind: Any, size: int) -> Any:
        return self.builder.load(self.place(base, index, kind, size), align=size)

    def store(self, value: Any, base: Any, index: Any, size: int) -> None:
        self.builder.store(value, self.place(base, index, value.type, size), align=size)

    def call(self, name: str, *args: Any) -> Any:
        kind = f"v{self.lanes}f32" if self.lanes > 1 else "f32"
        function = ir.FunctionType(self.floats, [self.floats] * len(args))
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, function, f"llvm.{name}.{kind}"), args
        )

    def as_bits(self, numbers: Any) -> Any:
        return self.builder.bitcast(numbers, self.bits)

    def widened(self, words: Any) -> Any:
        shifted = self.builder.shl(self.builder.zext(words, self.bits), self.constant(self.bits, 16))
        return self.builder.bitcast(shifted, self.floats)

    def _upper(self, numbers: Any, near: Any) -> Any:
        """Return the upper halves of `near` as words, where a number is not NaN."""
        b = self.builder
        quiet = b.or_(self.as_bits(numbers), self.constant(self.bits, _QUIET))
        chosen = b.select(b.fcmp_unordered("uno", numbers, numbers), quiet, near)
        return b.trunc(b.lshr(chosen, self.constant(self.bits, 16)), self.words)

    def nearest(self, numbers: Any) -> Any:
        """Return bfloat16 words, ties to even."""
        b, bits = self.builder, self.as_bits(numbers)
        last = b.and_(b.lshr(bits, self.constant(self.bits, 16)), self.constant(self.bits, 1))
        return self._upper(numbers, b.add(bits, b.add(last, self.constant(self.bits, 0x7FFF))))

    def at_random(self, numbers: Any, noise: Any) -> Any:
        """Return the bfloat16 words to which 16 random bits, added below the last place, carry."""
        b, bits, infinity = self.builder, self.as_bits(numbers), self.constant(self.bits, _INFINITY)
        near = b.add(b.and_(bits, self.constant(self.bits, _MAGNITUDE)), noise)
        near = b.select(b.icmp_unsigned(">", near, infinity), infinity, near)
        return self._upper(numbers, b.or_(near, b.and_(bits, self.constant(self.bits, _SIGN))))


def _emit(n: _Numbers, kind: int, places: dict[str, Any], numbers: dict[str, Any], index: Any) -> None:
    """Emit the step of one vector."""
    b = n.builder
    words, held = places["words"], places["held"]
    if kind == _MASTER:
        weights = n.load(held, index, n.floats, 4)
    else:
        weights = n.widened(n.load(words, index, n.words, 2))
        if kind == _KAHAN:
            weights = b.fadd(weights, n.widened(n.load(held, index, n.words, 2)))
    grads = n.load(places["grads"], index, n.floats, 4)
    grads = b.select(numbers["has_penalty"], n.call("fma", weights, numbers["penalty"], grads), grads)
    before = n.load(places["first"], index, n.floats, 4)
    # from the nearer end, as torch's lerp does
    nearer = b.select(numbers["is_short"], before, grads)
    average = n.call("fma", numbers["way"], b.fsub(grads, before), nearer)
    squares = b.fmul(n.load(places["second"], index, n.floats, 4), numbers["kept"])
    squares = n.call("fma", b.fmul(numbers["added"], grads), grads, squares)
    n.store(average, places["first"], index, 4)
    n.store(squares, places["second"], index, 4)
    root = n.call("sqrt", squares)
    # root / correction, rounded to nearest by Markstein's theorem (1990); of an infinity there is no remainder
    near = b.fmul(root, numbers["inverse"])
    rest = n.call("fma", b.fneg(near), numbers["correction"], root)
    ratio = n.call("fma", rest, numbers["inverse"], near)
    ratio = b.select(b.fcmp_ordered("==", near, n.constant(n.floats, float("inf"))), near, ratio)
    below = b.fadd(ratio, numbers["epsilon"])
    change = b.fdiv(b.fmul(numbers["step"], average), below)
    weights = b.fadd(b.fmul(weights, numbers["factor"]), change)
    if kind == _RANDOM:
        noise = b.lshr(n.load(places["noise"], index, n.bits, 4), numbers["shift"])
        n.store(n.at_random(weights, b.and_(noise, n.constant(n.bits, 0xFFFF))), words, index, 2)
        return
    stored = n.nearest(weights)
    n.store(stored, words, index, 2)
    if kind == _MASTER:
        n.store(weights, held, index, 4)
    else:
        n.store(n.nearest(b.fsub(weights, n.widened(stored))), held, index, 2)


_PLACES = ("words", "held", "grads", "first", "second", "noise")
_SETTINGS = ("penalty", "factor", "way", "kept", "added", "correction", "epsilon", "step")


def _step(kind: int) -> Any:
    @intrinsic
    def step(_context: Any, addresses: Any, count: Any, shift: Any, settings: Any) -> Any:
        pair = types.UniTuple(types.int64, len(_PLACES)), types.UniTuple(types.float32, len(_SETTINGS))
        signature = types.void(pair[0], types.int64, types.uint32, pair[1])

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            places = dict(zip(_PLACES, cgutils.unpack_tuple(builder, args[0]), strict=True))
            scalars = dict(zip(_SETTINGS, cgutils.unpack_tuple(builder, args[3]), strict=True))
            done = _I64(0)
            for lanes in (LANES, 1):
                n = _Numbers(builder, lanes)
                numbers = {name: n.splat(value) for name, value in scalars.items()}
                numbers["shift"] = n.splat(args[2])
                one, half = n.constant(n.floats, 1.0), n.constant(n.floats, 0.5)
                numbers["inverse"] = builder.fdiv(one, numbers["correction"])
                numbers["has_penalty"] = builder.fcmp_unordered("!=", numbers["penalty"], n.constant(n.floats, 0.0))
                way = numbers["way"]
                numbers["is_short"] = builder.fcmp_ordered("<", n.call("fabs", way), half)
                numbers["way"] = builder.select(numbers["is_short"], way, builder.fneg(builder.fsub(one, way)))
                end = builder.sub(args[1], builder.srem(args[1], _I64(lanes)))
                with cgutils.for_range_slice(builder, done, end, _I64(lanes), intp=_I64) as (index, _):
                    _emit(n, kind, places, numbers, index)
                done = end
            return context.get_dummy_value()

        return signature, generate

    return step


# Steps of `count` elements at addresses, of which those that a way of holding weights has not are ignored: the bfloat16
# words, masters or compensations, gradients, averages, averages of squares, random words. Of a random word the upper
# half serves where `shift` is 16, the lower one where it is 0.
step_master, step_random, step_kahan = (_step(kind) for kind in (_MASTER, _RANDOM, _KAHAN))
