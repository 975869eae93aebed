"""Steps of a loop that a compiler does not find by itself, as vector instructions of LLVM's portable kind.

LLVM lowers them to whatever the processor has (AVX2, AVX-512, NEON, SSE2), so one text serves all.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
# 256 bits: a comparison of wider vectors fills a mask register, which costs an instruction more to count
_LANES = 32
_UNROLL = 4
COUNT_STEP = _LANES * _UNROLL
# a lane counts up to 255, and 16 bits hold the sum of all lanes
COUNT_LIMIT = COUNT_STEP * 255
MASK_STEP = 64
WORD_STEP = _LANES * 2


@intrinsic
def count_pair(_context: Any, array: Any, length: Any, one: Any, other: Any) -> Any:
    """Count the bytes equal to `one` and those equal to `other` among the first `length`.

    `length` is a multiple of COUNT_STEP, at most COUNT_LIMIT. The count of `other` is in the upper 32 bits.
    """
    signature = types.int64(array, types.int64, types.uint8, types.uint8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = make_array(signature.args[0])(context, builder, args[0]).data
        vector = ir.VectorType(_I8, _LANES)
        wanted = [_splat(builder, value, vector) for value in args[2:]]
        before = builder.block
        loop, done = builder.append_basic_block("count"), builder.append_basic_block("counted")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_I64)
        index.add_incoming(_I64(0), before)
        counts = [[builder.phi(vector) for _ in range(_UNROLL)] for _ in wanted]
        totals: list[list[Any]] = [[] for _ in wanted]
        for unrolled in range(_UNROLL):
            place = builder.gep(data, [builder.add(index, _I64(unrolled * _LANES))])
            loaded = builder.load(builder.bitcast(place, vector.as_pointer()), align=1)
            for value, total, count in zip(wanted, totals, (row[unrolled] for row in counts), strict=True):
                is_equal = builder.sext(builder.icmp_unsigned("==", loaded, value), vector)  # -1 where equal
                total.append(builder.sub(count, is_equal))
                count.add_incoming(ir.Constant(vector, [0] * _LANES), before)
                count.add_incoming(total[-1], loop)
        following = builder.add(index, _I64(COUNT_STEP))
        index.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, args[1]), loop, done)
        builder.position_at_end(done)
        low, high = (builder.zext(_sum_of(builder, total), _I64) for total in totals)
        return builder.or_(low, builder.shl(high, _I64(32)))

    return signature, generate


@intrinsic
def mask_between(_context: Any, array: Any, start: Any, limit: Any) -> Any:
    """Return 64 bits, one for each byte from `start` on: whether it lies in 1..limit."""
    signature = types.uint64(array, types.int64, types.uint8)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = make_array(signature.args[0])(context, builder, args[0]).data
        vector = ir.VectorType(_I8, MASK_STEP)
        place = builder.bitcast(builder.gep(data, [args[1]]), vector.as_pointer())
        lowered = builder.sub(builder.load(place, align=1), ir.Constant(vector, [1] * MASK_STEP))  # 0 becomes 255
        is_within = builder.icmp_unsigned("<", lowered, _splat(builder, args[2], vector))
        return builder.bitcast(is_within, _I64)

    return signature, generate


@intrinsic
def word_exponents(_context: Any, words: Any, length: Any, shift: Any, fields: Any) -> Any:
    """Write the exponent fields of the first `length` 16-bit words, a multiple of WORD_STEP other than 0, as bytes.

    Returns the largest word without its sign, in the upper 16 bits, and the smallest less 1, where 0 counts as 65535.
    """
    signature = types.uint32(words, types.int64, types.uint16, fields)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, target = (make_array(signature.args[i])(context, builder, args[i]).data for i in (0, 3))
        vector, narrow = ir.VectorType(_I16, _LANES), ir.VectorType(_I8, _LANES)
        shifts = _splat(builder, args[2], vector)
        before = builder.block
        loop, done = builder.append_basic_block("fields"), builder.append_basic_block("written")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(_I64)
        index.add_incoming(_I64(0), before)
        ends = [(builder.phi(vector), builder.phi(vector)) for _ in range(WORD_STEP // _LANES)]
        found = []
        for unrolled, (top, bottom) in enumerate(ends):
            start = builder.add(index, _I64(unrolled * _LANES))
            place = builder.bitcast(builder.gep(source, [start]), vector.as_pointer())
            word = builder.and_(builder.load(place, align=2), ir.Constant(vector, [0x7FFF] * _LANES))
            less = builder.sub(word, ir.Constant(vector, [1] * _LANES))  # 0 becomes the largest
            field = builder.trunc(builder.lshr(word, shifts), narrow)
            builder.store(field, builder.bitcast(builder.gep(target, [start]), narrow.as_pointer()), align=1)
            higher = builder.select(builder.icmp_unsigned(">", word, top), word, top)
            lower = builder.select(builder.icmp_unsigned("<", less, bottom), less, bottom)
            for phi, first, following in ((top, 0, higher), (bottom, 0xFFFF, lower)):
                phi.add_incoming(ir.Constant(vector, [first] * _LANES), before)
                phi.add_incoming(following, loop)
            found.append((higher, lower))
        following = builder.add(index, _I64(WORD_STEP))
        index.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, args[1]), loop, done)
        builder.position_at_end(done)
        top, bottom = found[0]
        for higher, lower in found[1:]:
            top = builder.select(builder.icmp_unsigned(">", higher, top), higher, top)
            bottom = builder.select(builder.icmp_unsigned("<", lower, bottom), lower, bottom)
        results = []
        for name, value in (("umax", top), ("umin", bottom)):
            reduce = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_I16, [vector]), f"llvm.vector.reduce.{name}.v{_LANES}i16"
            )
            results.append(builder.zext(builder.call(reduce, [value]), _I32))
        return builder.or_(builder.shl(results[0], _I32(16)), results[1])

    return signature, generate


def _block_steps(lanes: int) -> tuple[Any, Any]:
    """Return the two steps on blocks of so many float32: the loop vectoriser unrolls too far for loops this short."""
    whole, numbers = ir.VectorType(_I32, lanes), ir.VectorType(ir.FloatType(), lanes)

    @intrinsic
    def largest(_context: Any, bits: Any, start: Any) -> Any:
        signature = types.uint32(bits, types.int64)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loaded = builder.load(_place(context, builder, signature, args, 0, args[1], whole), align=4)
            magnitudes = builder.and_(loaded, ir.Constant(whole, [0x7FFFFFFF] * lanes))
            reduce = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_I32, [whole]), f"llvm.vector.reduce.umax.v{lanes}i32"
            )
            return builder.call(reduce, [magnitudes])

        return signature, generate

    @intrinsic
    def multiply(_context: Any, bits: Any, out: Any, start: Any, factor: Any) -> Any:
        signature = types.void(bits, out, types.int64, types.float32)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            loaded = builder.load(_place(context, builder, signature, args, 0, args[2], numbers), align=4)
            product = builder.fmul(loaded, _splat(builder, args[3], numbers))
            builder.store(product, _place(context, builder, signature, args, 1, args[2], numbers), align=4)
            return context.get_dummy_value()

        return signature, generate

    return largest, multiply


def _place(context: Any, builder: Any, signature: Any, args: Any, array: int, start: Any, vector: Any) -> Any:
    data = make_array(signature.args[array])(context, builder, args[array]).data
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


# The largest bits without sign among 16 or 32 words of float32 from a start on, and those words times a factor.
largest_16, multiply_16 = _block_steps(16)
largest_32, multiply_32 = _block_steps(32)


@intrinsic
def trailing_zeros(_context: Any, bits: Any) -> Any:
    """Return the place of the lowest set bit of a uint64 that is not 0."""
    signature = types.int64(types.uint64)

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], _I1(1))

    return signature, generate


def _sum_of(builder: Any, vectors: list[Any]) -> Any:
    wide = ir.VectorType(_I16, _LANES)
    whole = builder.zext(vectors[0], wide)
    for vector in vectors[1:]:
        whole = builder.add(whole, builder.zext(vector, wide))
    reduce = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_I16, [wide]), f"llvm.vector.reduce.add.v{_LANES}i16"
    )
    return builder.call(reduce, [whole])


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))
