"""Rounding of packed float32 to a narrower format, in place, as vector instructions: what a product's packing adds.

The rules are those of `mezzotint.kernels.loops` (nearest, ties to even) and of `mezzotint.kernels.blocks` (MX scales),
for all formats but those with float32's exponents. A format's numbers come as the array of `mezzotint.kernels.target`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from mezzotint.kernels.addresses import words32_at
from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.target import Target
from mezzotint.kernels.tiles import LANES
from mezzotint.kernels.words import as_float

MX_BLOCK = 32

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_BITS, _FLOATS = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)
_SIGN, _MAGNITUDE, _EXPONENT = 0x80000000, 0x7FFFFFFF, 0x7F800000
_NAN, _SMALLEST_SCALE, _LARGEST_INVERSE = 0x7FC00000, 1 << 22, 254 << 23
_DROPPED, _LOWEST, _CLAMP, _LARGEST, _BEYOND = (
    Target._fields.index(name) for name in ("dropped", "lowest", "clamp", "largest", "beyond")
)
_NUM_NUMBERS = len(Target._fields)
_u32, _FIELD = np.uint32, np.uint32(23)


def _all(value: int) -> Any:
    return ir.Constant(_BITS, [value] * LANES)


def _splat(builder: Any, value: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_BITS, [0] * LANES))


def _place(builder: Any, address: Any, vector: Any) -> Any:
    return builder.inttoptr(address, vector.as_pointer())


def _rounded(builder: Any, numbers: Any, limits: tuple[Any, ...]) -> Any:
    """Return a vector of floats rounded; `limits` are clamp, largest, beyond (floats), lowest, places (bits)."""
    clamp, largest, beyond, lowest, places = limits
    bits = builder.bitcast(numbers, _BITS)
    magnitude = builder.bitcast(builder.and_(bits, _all(_MAGNITUDE)), _FLOATS)
    # compared in this order, a NaN stays
    magnitude = builder.select(builder.fcmp_ordered("<", clamp, magnitude), clamp, magnitude)
    exponent = builder.and_(builder.bitcast(magnitude, _BITS), _all(_EXPONENT))
    exponent = builder.select(builder.icmp_unsigned(">", exponent, lowest), exponent, lowest)
    shift = builder.bitcast(builder.add(exponent, places), _FLOATS)
    near = builder.fsub(builder.fadd(magnitude, shift), shift)
    near = builder.select(builder.fcmp_ordered(">", near, largest), beyond, near)
    sign = builder.and_(bits, _all(_SIGN))
    return builder.bitcast(builder.or_(builder.bitcast(near, _BITS), sign), _FLOATS)


def _limits(builder: Any, args: Any) -> tuple[Any, ...]:
    return tuple(_splat(builder, value, vector) for value, vector in zip(args, _LIMIT_VECTORS, strict=True))


_LIMIT_VECTORS = (_FLOATS, _FLOATS, _FLOATS, _BITS, _BITS)
_LIMIT_TYPES = (types.float32, types.float32, types.float32, types.uint32, types.uint32)


def _snapping(has_many_scales: bool) -> Any:
    """Return the step for one vector, times one scale, or times a vector of them at an address."""

    @intrinsic
    def snap(_context: Any, place: Any, scale: Any, clamp: Any, largest: Any, beyond: Any, lowest: Any, places: Any):
        signature = types.void(types.int64, types.int64 if has_many_scales else types.float32, *_LIMIT_TYPES)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            at = _place(builder, args[0], _FLOATS)
            if has_many_scales:
                factor = builder.load(_place(builder, args[1], _FLOATS), align=4)
            else:
                factor = _splat(builder, args[1], _FLOATS)
            numbers = builder.fmul(builder.load(at, align=4), factor)
            builder.store(_rounded(builder, numbers, _limits(builder, args[2:])), at, align=4)
            return context.get_dummy_value()

        return signature, generate

    return snap


_snap, _snap_by = _snapping(has_many_scales=False), _snapping(has_many_scales=True)


def _block_step(is_across: bool) -> Any:
    """Return the step for a block of MX: 32 consecutive numbers, or in each lane 32 that lie `stride` bytes apart."""

    @intrinsic
    def snap(_context, place, stride, top, clamp, largest, beyond, lowest, places):
        signature = types.void(types.int64, types.int64, types.uint32, *_LIMIT_TYPES)

        def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            count = MX_BLOCK if is_across else MX_BLOCK // LANES
            step = args[1] if is_across else _I64(4 * LANES)
            ats = [
                _place(builder, builder.add(args[0], builder.mul(step, _I64(index))), _FLOATS) for index in range(count)
            ]
            tops = None
            for at in ats:
                bits = builder.and_(builder.bitcast(builder.load(at, align=4), _BITS), _all(_MAGNITUDE))
                tops = bits if tops is None else builder.select(builder.icmp_unsigned(">", bits, tops), bits, tops)
            if not is_across:
                reduce = cgutils.get_or_insert_function(
                    builder.module, ir.FunctionType(_I32, [_BITS]), f"llvm.vector.reduce.umax.v{LANES}i32"
                )
                tops = _splat(builder, builder.call(reduce, [tops]), _BITS)
            inverse, factor = _mx_scale(builder, tops, _splat(builder, args[2], _BITS))
            limits = _limits(builder, args[3:])
            for at in ats:
                scaled = builder.fmul(builder.load(at, align=4), inverse)
                builder.store(builder.fmul(_rounded(builder, scaled, limits), factor), at, align=4)
            return context.get_dummy_value()

        return signature, generate

    return snap


def _mx_scale(builder: Any, tops: Any, top: Any) -> tuple[Any, Any]:
    """Return 1 / scale and the scale of blocks by the bits of their largest magnitudes; NaN where one is not finite."""
    field = builder.and_(tops, _all(_EXPONENT))
    is_above = builder.icmp_unsigned(">", field, top)
    field = builder.select(is_above, builder.sub(field, top), _all(0))
    is_finite = builder.icmp_unsigned("<", tops, _all(_EXPONENT))
    factor = builder.select(builder.icmp_unsigned(">", field, _all(0)), field, _all(_SMALLEST_SCALE))
    factor = builder.select(is_finite, factor, _all(_NAN))
    inverse = builder.select(is_finite, builder.sub(_all(_LARGEST_INVERSE), field), _all(0))
    return builder.bitcast(inverse, _FLOATS), builder.bitcast(factor, _FLOATS)


_snap_along, _snap_across = _block_step(is_across=False), _block_step(is_across=True)


@compiled
def snap_run(place, count, target, scale, scales):
    """Round `count` float32 at `place`, and what fills their last vector, to the format whose array is at `target`.

    They are multiplied by `scale` before, or where `scales` is not 0 by the float32 there, one for each number.
    """
    numbers = carray(words32_at(target), (_NUM_NUMBERS,))
    clamp, largest, lowest = as_float(numbers[_CLAMP]), as_float(numbers[_LARGEST]), numbers[_LOWEST]
    beyond = as_float(numbers[_BEYOND])
    places = _u32(numbers[_DROPPED] << _FIELD)
    if scales:
        for i in range(0, count, LANES):
            _snap_by(place + 4 * i, scales + 4 * i, clamp, largest, beyond, lowest, places)
    else:
        for i in range(0, count, LANES):
            _snap(place + 4 * i, scale, clamp, largest, beyond, lowest, places)


@compiled
def snap_blocks_along(place, count, target, largest_exponent):
    """Round `count` float32 at `place` to an MX format in blocks of 32; the memory of the last one is whole."""
    numbers = carray(words32_at(target), (_NUM_NUMBERS,))
    clamp, largest, lowest = as_float(numbers[_CLAMP]), as_float(numbers[_LARGEST]), numbers[_LOWEST]
    beyond = as_float(numbers[_BEYOND])
    places, top = _u32(numbers[_DROPPED] << _FIELD), _u32(largest_exponent << 23)
    for i in range(0, count, MX_BLOCK):
        _snap_along(place + 4 * i, 0, top, clamp, largest, beyond, lowest, places)


@compiled
def snap_blocks_across(place, stride, width, count, target, largest_exponent):
    """Round `count` rows of `width` float32, `stride` bytes apart, to an MX format whose blocks lie across the rows.

    Rows up to the next multiple of 32, and numbers up to the next whole vector, are there and are rounded with them.
    """
    numbers = carray(words32_at(target), (_NUM_NUMBERS,))
    clamp, largest, lowest = as_float(numbers[_CLAMP]), as_float(numbers[_LARGEST]), numbers[_LOWEST]
    beyond = as_float(numbers[_BEYOND])
    places, top = _u32(numbers[_DROPPED] << _FIELD), _u32(largest_exponent << 23)
    for k in range(0, count, MX_BLOCK):
        for i in range(0, width, LANES):
            _snap_across(place + k * stride + 4 * i, stride, top, clamp, largest, beyond, lowest, places)
