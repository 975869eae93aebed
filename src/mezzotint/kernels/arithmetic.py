"""Steps of float32 arithmetic for loops that have to round as another library does."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from mezzotint.kernels.addresses import floats_at
from mezzotint.kernels.compiled import compiled

# of MKL's vector mathematics: highest accuracy, subnormals kept, errors not reported
_MODE = 0x2 | 0x00140000 | 0x100


@intrinsic
def multiply_add(_context: Any, one: Any, other: Any, added: Any) -> Any:
    """Return one * other + added, float32, rounded once."""
    signature = types.float32(types.float32, types.float32, types.float32)

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return signature, generate


@intrinsic
def quotient(_context: Any, one: Any, other: Any) -> Any:
    """Return one / other, float32; Python's division tests for zero, and that keeps a loop from being vectorised."""
    signature = types.float32(types.float32, types.float32)

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fdiv(*args)

    return signature, generate


@intrinsic
def _call(_context: Any, function: Any, count: Any, source: Any, out: Any, mode: Any) -> Any:
    signature = types.void(*[types.int64] * 5)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        # all are integers or pointers, which registers pass alike
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 4)
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])
        return context.get_dummy_value()

    return signature, generate


@compiled
def square_roots(source, out, count, function):
    """Write the square roots of `count` float32 at one address to another; rounded to nearest where `function` is 0.

    Otherwise it is the address of MKL's `vmsSqrt`, by which torch computes them where it is built with MKL: its roots
    are off by up to 3/4 of a unit in the last place.
    """
    if function:
        _call(function, count, source, out, _MODE)
    else:
        numbers, roots = carray(floats_at(source), (count,)), carray(floats_at(out), (count,))
        for i in range(numbers.size):
            roots[i] = np.sqrt(numbers[i])
