"""The bits of 16-bit formats as those of float32, and back, one word at a time; what the loops of this room share."""

import numpy as np

from mezzotint.kernels.compiled import compiled

_u32, _f32 = np.uint32, np.float32


@compiled
def as_float(bits):
    """Return the float32 that has these bits."""
    return _u32(bits).view(_f32)


@compiled
def as_bits(number):
    """Return the bits of a float32."""
    return _f32(number).view(_u32)


@compiled
def bfloat16_bits(word):
    """Return the float32 bits of a bfloat16 word."""
    return _u32(word << _u32(16))


@compiled
def float16_bits(word):
    """Return the float32 bits of a float16 word; exact, also where the processor flushes subnormals."""
    sign = _u32(_u32(word & _u32(0x8000)) << _u32(16))
    magnitude = _u32(_u32(word & _u32(0x7FFF)) << _u32(13))
    rebias = _u32(112 << 23)
    normal = _u32(magnitude + rebias)
    special = _u32(normal + rebias)
    # a subnormal's mantissa below 2^-14: subtracting 2^-14 normalises it
    base = _u32(113 << 23)
    subnormal = as_bits(as_float(magnitude + base) - as_float(base))
    bits = subnormal if magnitude < _u32(1 << 23) else normal
    bits = special if magnitude >= _u32(31 << 23) else bits
    return _u32(bits | sign)


@compiled
def float16_word(bits):
    """Return the float16 word of float32 bits that hold a number of float16."""
    sign = _u32(_u32(bits >> _u32(16)) & _u32(0x8000))
    magnitude = _u32(bits & _u32(0x7FFFFFFF))
    normal = _u32(_u32(magnitude - _u32(112 << 23)) >> _u32(13))
    # the sum with 0.5 has float16's smallest subnormal as its last bit
    subnormal = _u32(as_bits(as_float(magnitude) + _f32(0.5)) - _u32(126 << 23))
    word = subnormal if magnitude < _u32(113 << 23) else normal
    infinity = _u32(0x7C00) if magnitude == _u32(0x7F800000) else _u32(0x7E00)
    word = infinity if magnitude >= _u32(0x7F800000) else word
    return _u32(word | sign)
