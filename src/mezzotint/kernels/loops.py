"""Compiled loops over the bits of float32 that round a chunk of them to a target format.

Two rules serve all formats. A format with float32's exponents (bfloat16, TF32) is float32 with fewer mantissa bits:
adding half of the last kept place, less one where that place is even, carries into it exactly where rounding goes up.
For all others the floating-point unit does the work: a power of two C, whose last place is the wanted one around x,
makes (|x| + C) - C the nearest multiple of that place, ties to even (Goldberg 1991, What Every Computer Scientist
Should Know About Floating-Point Arithmetic, section 4), and the bits of |x| + C, less those of C, count that place,
which is the code. Below the smallest normal number C stays, so subnormals need no case of their own.

The loops are written to become vector instructions: selections instead of branches, each step wrapped in uint32 because
uint32 with uint32 is uint64 in numba, shift counts masked so that the compiler sees that they fit 32 bits.
`source` and `out` are uint32 arrays of one length, `target` is the array of `kernels.target`; a NaN stays NaN.
"""

import numpy as np

from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import BFLOAT16, FLOAT16, HALVES
from mezzotint.kernels.target import Target
from mezzotint.kernels.words import as_bits, as_float, bfloat16_bits, float16_bits, float16_word

_u32, _f32, _i32 = np.uint32, np.float32, np.int32
_SIGN, _MAGNITUDE, _INFINITY = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_EXPONENT = _INFINITY
_QUIET = np.uint32(0x00400000)
_ONE, _HALF, _FIELD, _COUNT = np.uint32(1), np.uint32(16), np.uint32(23), np.uint32(31)

# places in a target's array
_DROPPED, _IS_WIDE, _LOWEST, _CLAMP, _LARGEST, _BEYOND, _KEEPS_ZERO_SIGN = range(7)
_LARGEST_CODE, _BEYOND_CODE, _NAN_CODE, _SIGN_SHIFT, _SIGN_BIT = range(7, len(Target._fields))


@compiled
def load(part, kind, bits):
    """Write the words of `part` as float32 bits."""
    if kind == BFLOAT16:
        for i in range(part.size):
            bits[i] = bfloat16_bits(_u32(part[i]))
    elif kind == FLOAT16:
        for i in range(part.size):
            bits[i] = float16_bits(_u32(part[i]))
    else:
        for i in range(part.size):
            bits[i] = _u32(part[i])


@compiled
def store(bits, kind, out):
    """Write float32 bits as words of `kind`, whose numbers they are; anything but 16-bit floats is taken as it is."""
    if kind == BFLOAT16:
        for i in range(out.size):
            out[i] = _u32(bits[i] >> _u32(16))
    elif kind == FLOAT16:
        for i in range(out.size):
            out[i] = float16_word(bits[i])
    else:
        for i in range(out.size):
            out[i] = bits[i]


@compiled
def _clamped(bits, clamp):
    """Return the magnitude, at most `clamp`; compared in this order, a NaN stays."""
    magnitude = as_float(bits & _MAGNITUDE)
    return clamp if clamp < magnitude else magnitude


@compiled
def _exponent(magnitude, lowest):
    """Return the exponent bits at which a magnitude is cut: its own, or those of the smallest normal number."""
    exponent = _u32(as_bits(magnitude) & _EXPONENT)
    return exponent if exponent > lowest else lowest


@compiled
def nearest(source, out, target):
    """Round to the nearest, ties to even."""
    dropped, lowest, beyond = _u32(target[_DROPPED] & _COUNT), target[_LOWEST], target[_BEYOND]
    if target[_IS_WIDE]:
        mask = _u32(_u32(_ONE << dropped) - _ONE)
        kept, half = _u32(~mask), _u32(mask >> _ONE)
        last = _u32(_u32(mask + _ONE) & _u32(-_i32(dropped != _u32(0))))
        more = _u32(half + _ONE)
        if beyond == _INFINITY:
            for i in range(source.size):
                bits = source[i]
                added = more if _u32(bits & last) != _u32(0) else half
                near = _u32(_u32(bits + added) & kept)
                out[i] = _u32(bits | _QUIET) if _u32(bits & _MAGNITUDE) > _INFINITY else near
        else:
            for i in range(source.size):
                bits = source[i]
                magnitude = _u32(bits & _MAGNITUDE)
                added = more if _u32(bits & last) != _u32(0) else half
                near = _u32(_u32(magnitude + added) & kept)
                near = beyond if near >= _INFINITY else near
                near = _u32(near | _u32(bits & _SIGN))
                out[i] = _u32(bits | _QUIET) if magnitude > _INFINITY else near
    else:
        places = _u32(dropped << _FIELD)
        clamp, largest, over = as_float(target[_CLAMP]), as_float(target[_LARGEST]), as_float(beyond)
        for i in range(source.size):
            bits = source[i]
            magnitude = _clamped(bits, clamp)
            shift = as_float(_exponent(magnitude, lowest) + places)
            near = _f32(_f32(magnitude + shift) - shift)
            near = over if near > largest else near
            out[i] = _u32(as_bits(near) | _u32(bits & _SIGN))
        if target[_KEEPS_ZERO_SIGN] == _u32(0):
            # apart, as all formats would pay for what two of them need
            for i in range(out.size):
                out[i] = _u32(0) if out[i] == _SIGN else out[i]


@compiled
def nearest_codes(source, out, target):
    """Round to the nearest, ties to even, and write codes of the format; not for those with float32's exponents."""
    dropped, lowest, clamp = _u32(target[_DROPPED] & _COUNT), target[_LOWEST], as_float(target[_CLAMP])
    places = _u32(dropped << _FIELD)
    largest, beyond, nan = target[_LARGEST_CODE], target[_BEYOND_CODE], target[_NAN_CODE]
    sign_shift, sign_bit = _u32(target[_SIGN_SHIFT] & _COUNT), target[_SIGN_BIT]
    lost_sign = _u32(0) if target[_KEEPS_ZERO_SIGN] else sign_bit
    for i in range(source.size):
        bits = source[i]
        magnitude = _clamped(bits, clamp)
        exponent = _exponent(magnitude, lowest)
        shift = _u32(exponent + places)
        count = _u32(as_bits(magnitude + as_float(shift)) - shift)
        code = _u32(_u32(_u32(exponent - lowest) >> dropped) + count)
        code = beyond if code > largest else code
        code = nan if _u32(bits & _MAGNITUDE) > _INFINITY else code
        sign = _u32(_u32(bits >> sign_shift) & sign_bit)
        sign = _u32(sign & _u32(~lost_sign)) if code == _u32(0) else sign
        out[i] = _u32(code | sign)


@compiled
def toward_zero(source, out, target):
    """Round toward zero; no finite number becomes more than the largest."""
    dropped, lowest, beyond = _u32(target[_DROPPED] & _COUNT), target[_LOWEST], target[_BEYOND]
    if target[_IS_WIDE]:
        kept = _u32(~_u32(_u32(_ONE << dropped) - _ONE))
        for i in range(source.size):
            bits = source[i]
            magnitude = _u32(bits & _MAGNITUDE)
            near = beyond if magnitude == _INFINITY else _u32(magnitude & kept)
            near = _u32(near | _u32(bits & _SIGN))
            out[i] = _u32(bits | _QUIET) if magnitude > _INFINITY else near
    else:
        clamp, largest = as_float(target[_CLAMP]), as_float(target[_LARGEST])
        places = _u32(dropped << _FIELD)
        down = _u32(places - _u32(_FIELD << _FIELD))
        lost_sign = _u32(0) if target[_KEEPS_ZERO_SIGN] else _SIGN
        for i in range(source.size):
            bits = source[i]
            magnitude = _clamped(bits, clamp)
            exponent = _exponent(magnitude, lowest)
            shift = as_float(exponent + places)
            near = _f32(_f32(magnitude + shift) - shift)
            near = _f32(near - as_float(exponent + down)) if near > magnitude else near
            near = largest if near > largest else near
            sign = _u32(bits & _SIGN)
            sign = _u32(sign & _u32(~lost_sign)) if near == _f32(0) else sign
            near_bits = beyond if _u32(bits & _MAGNITUDE) == _INFINITY else as_bits(near)
            out[i] = _u32(near_bits | sign)


@compiled
def stochastic_wide(source, out, target, words):
    """Round at random, half a word an element, to a format with float32's exponents.

    Random bits added below the last kept place carry into it with just the right probability.
    """
    mask = _u32(_u32(_ONE << _u32(target[_DROPPED] & _COUNT)) - _ONE)
    kept, beyond = _u32(~mask), target[_BEYOND]
    lower, upper = source[:HALVES], source[HALVES:]
    near_lower, near_upper = out[:HALVES], out[HALVES:]
    for i in range(lower.size):
        near_lower[i] = _add_noise(lower[i], _u32(words[i] & mask), kept, beyond)
    for i in range(upper.size):
        near_upper[i] = _add_noise(upper[i], _u32(_u32(words[i] >> _HALF) & mask), kept, beyond)


@compiled
def _add_noise(bits, noise, kept, beyond):
    magnitude = _u32(bits & _MAGNITUDE)
    near = _u32(_u32(magnitude + noise) & kept)
    near = beyond if near >= _INFINITY else near
    near = _u32(near | _u32(bits & _SIGN))
    return _u32(bits | _QUIET) if magnitude > _INFINITY else near


@compiled
def stochastic_narrow(source, out, target, words):
    """Round at random, a word an element, to any other format.

    Up where the word's upper 31 bits are below the way to the farther neighbour in units of 2^-31.
    """
    dropped, lowest, clamp = _u32(target[_DROPPED] & _COUNT), target[_LOWEST], as_float(target[_CLAMP])
    largest, beyond = as_float(target[_LARGEST]), as_float(target[_BEYOND])
    places = _u32(dropped << _FIELD)
    down = _u32(places - _u32(_FIELD << _FIELD))
    lost_sign = _u32(0) if target[_KEEPS_ZERO_SIGN] else _SIGN
    for i in range(source.size):
        bits = source[i]
        magnitude = _clamped(bits, clamp)
        exponent = _exponent(magnitude, lowest)
        shift, place = as_float(exponent + places), _u32(exponent + down)
        near = _f32(_f32(magnitude + shift) - shift)
        near = _f32(near - as_float(place)) if near > magnitude else near
        scale = as_float(_u32((127 + 127 + 31) << 23) - place)  # 2^31 / place
        way = _i32(_f32(_f32(magnitude - near) * scale))
        near = _f32(near + as_float(place)) if _i32(words[i] >> _ONE) < way else near
        near = beyond if near > largest else near
        sign = _u32(bits & _SIGN)
        sign = _u32(sign & _u32(~lost_sign)) if near == _f32(0) else sign
        out[i] = _u32(as_bits(near) | sign)
