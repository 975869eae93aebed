"""Steps that take an address, an int64, for a pointer to dense memory, as `numba.carray` wants it."""

from typing import Any

from numba import types
from numba.extending import intrinsic


def _pointer_to(number: Any) -> Any:
    @intrinsic
    def pointer(_context: Any, address: Any) -> Any:
        signature = types.CPointer(number)(types.int64)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return signature, generate

    return pointer


words32_at, words16_at, bytes_at, floats_at = (
    _pointer_to(number) for number in (types.uint32, types.uint16, types.uint8, types.float32)
)
