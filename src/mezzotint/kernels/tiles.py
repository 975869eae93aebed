"""The three steps of a product that carry its speed, as vector instructions of LLVM's portable kind.

`multiply_by_rows` and `multiply_by_columns` are the micro-kernel: a tile of ROWS x COLUMNS sums stays in registers
while it walks along K. `widen_*` reads LANES words as float32, `transpose_*` reads a square of them with rows for
columns, and `narrow_*` rounds float32 to words, to nearest, ties to even; words of float32 are copied.

The tile fits the registers of the processor that compiles it: 16 of 8 floats (AVX2), 32 of 16 (AVX-512), 32 of 4
(NEON). All take addresses.
"""

import platform
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from mezzotint.kernels.constants import BFLOAT16, FLOAT16, FLOAT32

_I1, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
_F32, _F16 = ir.FloatType(), ir.HalfType()


def _features() -> frozenset[str]:
    """Return the instruction sets that numba compiles for: those of this processor, unless its settings name others."""
    if config.CPU_FEATURES is not None:
        return frozenset(flag[1:] for flag in config.CPU_FEATURES.split(",") if flag.startswith("+"))
    try:
        return frozenset(name for name, is_there in llvm.get_host_cpu_features().items() if is_there)
    except RuntimeError:  # LLVM cannot tell on this platform
        return frozenset()


_FEATURES = _features()
_IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
# whether a product of float32 vectors is one instruction, and whether float16 words convert in one
HAS_FMA = _IS_ARM or {"avx2", "fma"} <= _FEATURES
HAS_HALF = _IS_ARM or "f16c" in _FEATURES or "avx512f" in _FEATURES

LANES, ROWS = (16, 12) if "avx512f" in _FEATURES else (4, 12) if _IS_ARM else (8, 6)
COLUMNS = 2 * LANES

_WORDS = ir.VectorType(_I16, LANES)
_BITS = ir.VectorType(_I32, LANES)
_FLOATS = ir.VectorType(_F32, LANES)
_HALVES = ir.VectorType(_F16, LANES)


def _pointer(builder: Any, address: Any, element: Any) -> Any:
    return builder.inttoptr(address, element.as_pointer())


def _all(value: int, vector: Any = _BITS) -> Any:
    return ir.Constant(vector, [value] * LANES)


def _splat(builder: Any, value: Any) -> Any:
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))


def _micro_kernel(is_by_rows: bool) -> Any:
    @intrinsic
    def multiply(_context: Any, left: Any, right: Any, sums: Any, depth: Any, stride: Any, width: Any, is_first: Any):
        signature = types.void(*[types.int64] * 7)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            left, right, sums, depth, stride, width, is_first = args
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
            )
            left, right, sums = (_pointer(builder, address, _F32) for address in (left, right, sums))
            # the address of each row, or their common one with the row as a constant distance
            rows = [builder.gep(left, [builder.mul(stride, _I64(m)) if is_by_rows else _I64(m)]) for m in range(ROWS)]
            before = builder.block
            loop, done = builder.append_basic_block("depth"), builder.append_basic_block("summed")
            builder.branch(loop)
            builder.position_at_end(loop)
            index = builder.phi(_I64)
            index.add_incoming(_I64(0), before)
            totals = [[builder.phi(_FLOATS) for _ in range(2)] for _ in range(ROWS)]
            strip = builder.gep(right, [builder.mul(index, _I64(COLUMNS))])
            halves = [
                builder.load(builder.bitcast(builder.gep(strip, [_I64(h * LANES)]), _FLOATS.as_pointer()), align=4)
                for h in range(2)
            ]
            place = index if is_by_rows else builder.mul(index, stride)
            for row, pair in zip(rows, totals, strict=True):
                factor = _splat(builder, builder.load(builder.gep(row, [place]), align=4))
                for half, total in zip(halves, pair, strict=True):
                    total.add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
                    total.add_incoming(builder.call(fma, [factor, half, total]), loop)
            following = builder.add(index, _I64(1))
            index.add_incoming(following, loop)
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
            builder.position_at_end(done)
            final = [[phi.incomings[1][0] for phi in pair] for pair in totals]
            places = [
                [
                    builder.bitcast(
                        builder.gep(sums, [builder.add(builder.mul(width, _I64(m)), _I64(h * LANES))]),
                        _FLOATS.as_pointer(),
                    )
                    for h in range(2)
                ]
                for m in range(ROWS)
            ]
            with builder.if_else(builder.icmp_signed("!=", is_first, _I64(0))) as (fresh, more):
                with fresh:
                    for pair, targets in zip(final, places, strict=True):
                        for total, target in zip(pair, targets, strict=True):
                            builder.store(total, target, align=4)
                with more:
                    for pair, targets in zip(final, places, strict=True):
                        for total, target in zip(pair, targets, strict=True):
                            builder.store(builder.fadd(builder.load(target, align=4), total), target, align=4)
            return context.get_dummy_value()

        return signature, generate

    return multiply


# sums[m * width + n] (=, or += unless it is the first) sum over k < depth of left(m, k) * right[k * COLUMNS + n], with
# left(m, k) at m * stride + k, or at k * stride + m; depth is at least 1.
multiply_by_rows, multiply_by_columns = _micro_kernel(True), _micro_kernel(False)


def _wide(builder: Any, address: Any, kind: int) -> Any:
    """Return LANES words at an address as float32."""
    if kind == FLOAT32:
        return builder.load(_pointer(builder, address, _FLOATS), align=4)
    if kind == FLOAT16:
        return builder.fpext(builder.load(_pointer(builder, address, _HALVES), align=2), _FLOATS)
    words = builder.zext(builder.load(_pointer(builder, address, _WORDS), align=2), _BITS)
    return builder.bitcast(builder.shl(words, _all(16)), _FLOATS)


def _widening(kind: int) -> Any:
    @intrinsic
    def widen(_context: Any, source: Any, out: Any) -> Any:
        signature = types.void(types.int64, types.int64)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            builder.store(_wide(builder, args[0], kind), _pointer(builder, args[1], _FLOATS), align=4)
            return context.get_dummy_value()

        return signature, generate

    return widen


def _transposition(kind: int) -> Any:
    @intrinsic
    def transpose(_context: Any, source: Any, source_bytes: Any, out: Any, out_bytes: Any) -> Any:
        signature = types.void(*[types.int64] * 4)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            source, source_bytes, out, out_bytes = args
            rows = [_wide(builder, builder.add(source, builder.mul(source_bytes, _I64(i))), kind) for i in range(LANES)]
            step = 1
            while step < LANES:  # Eklundh 1972: exchange off-diagonal blocks of 1, 2, 4, ... elements
                low = [j if not j & step else LANES + j - step for j in range(LANES)]
                high = [j + step if not j & step else LANES + j for j in range(LANES)]
                masks = [ir.Constant(ir.VectorType(_I32, LANES), picks) for picks in (low, high)]
                for i in range(LANES):
                    if not i & step:
                        pair = rows[i], rows[i | step]
                        rows[i], rows[i | step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
                step *= 2
            for i, row in enumerate(rows):
                place = builder.add(out, builder.mul(out_bytes, _I64(i)))
                builder.store(row, _pointer(builder, place, _FLOATS), align=4)
            return context.get_dummy_value()

        return signature, generate

    return transpose


def _narrowing(kind: int) -> Any:
    @intrinsic
    def narrow(_context: Any, source: Any, out: Any) -> Any:
        signature = types.void(types.int64, types.int64)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            numbers = builder.load(_pointer(builder, args[0], _FLOATS), align=4)
            if kind == FLOAT32:
                builder.store(numbers, _pointer(builder, args[1], _FLOATS), align=4)
                return context.get_dummy_value()
            if kind == FLOAT16:
                builder.store(builder.fptrunc(numbers, _HALVES), _pointer(builder, args[1], _HALVES), align=2)
                return context.get_dummy_value()
            bits = builder.bitcast(numbers, _BITS)
            last = builder.and_(builder.lshr(bits, _all(16)), _all(1))
            near = builder.lshr(builder.add(bits, builder.add(last, _all(0x7FFF))), _all(16))
            quiet = builder.or_(builder.lshr(bits, _all(16)), _all(0x40))
            is_nan = builder.fcmp_unordered("uno", numbers, numbers)
            words = builder.trunc(builder.select(is_nan, quiet, near), _WORDS)
            builder.store(words, _pointer(builder, args[1], _WORDS), align=2)
            return context.get_dummy_value()

        return signature, generate

    return narrow


widen_bfloat16, widen_float16, widen_float32 = (_widening(kind) for kind in (BFLOAT16, FLOAT16, FLOAT32))
transpose_bfloat16, transpose_float16, transpose_float32 = (
    _transposition(kind) for kind in (BFLOAT16, FLOAT16, FLOAT32)
)
narrow_bfloat16, narrow_float16, narrow_float32 = (_narrowing(kind) for kind in (BFLOAT16, FLOAT16, FLOAT32))
