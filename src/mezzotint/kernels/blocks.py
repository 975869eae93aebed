"""Rounding to formats whose elements share a scale by block: MX (OCP Microscaling Formats 1.0) and NVFP4.

MX, section 6.3: the scale is 2^(floor(log2(amax)) - emax), emax being the exponent of the element format's largest
number, kept to E8M0's range; elements are divided by it, rounded and saturated. Where a block holds an infinity or NaN
the specification leaves the result open; here its scale is NaN, as a lost NaN is worse than a spread one.

NVFP4 (arXiv 2509.25149, appendix C): a float32 scale of the tensor, its amax / (448 * 6), brings the scale of a block,
amax of the block / 6, into E4M3's range; elements are divided by the product of both. A block so small beside the
tensor's amax that its scale rounds to 0 becomes 0.
"""

import numpy as np

from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import BLOCK_WORDS, CODES, HALVES, NEAREST, STOCHASTIC
from mezzotint.kernels.loops import load, nearest, nearest_codes, stochastic_narrow, toward_zero
from mezzotint.kernels.philox import fill_words
from mezzotint.kernels.vectors import largest_16, largest_32, multiply_16, multiply_32
from mezzotint.kernels.words import as_bits, as_float

_u32, _f32, _u64 = np.uint32, np.float32, np.uint64
_CHUNK = 2 * HALVES
_MAGNITUDE, _INFINITY, _NAN = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.uint32(0x7FC00000)
_ONE, _FIELD = np.uint32(1), np.uint32(23)
_E8M0_NAN, _E4M3_NAN = np.uint32(0xFF), np.uint32(0x7F)
_E4M3_LOWEST, _E4M3_PLACES = np.uint32((127 - 6) << 23), np.uint32((23 - 3) << 23)


@compiled
def round_blocks(source, kind, out, out_kind, scales, how):
    """Round `source`, whose length is a multiple of the block's, 16 or 32, into `out` and `scales`.

    `source` and `kind` are those of `round_words`. `out` holds float32 bits of the rounded numbers, or codes of the
    elements where `out_kind` is CODES (uint8). `scales`, uint8, takes a code for each block. `how` is a tuple: the
    length of a block, the saturating target array of the element format, the exponent of that format's largest number,
    the scale of the tensor (float32; scales are codes of E8M0 where it is 0, else of E4M3), rounding, seed and offset.
    """
    bits = np.empty(_CHUNK, np.uint32)
    block_size, rounding = how[0], how[4]
    buffers = _buffers(block_size, rounding)
    for start in range(0, source.size, _CHUNK):
        part = source[start : start + _CHUNK]
        loaded = bits[: part.size]
        load(part, kind, loaded)
        _round_chunk(loaded, start, out[start : start + _CHUNK], out_kind, scales[start // block_size :], how, buffers)


@compiled
def round_blocks_float32(source, out, out_kind, scales, how):
    """Do what `round_blocks` does for `source` of FLOAT32 and another `out`, with no copy between."""
    block_size, rounding = how[0], how[4]
    buffers = _buffers(block_size, rounding)
    for start in range(0, source.size, _CHUNK):
        part = source[start : start + _CHUNK]
        _round_chunk(part, start, out[start : start + _CHUNK], out_kind, scales[start // block_size :], how, buffers)


@compiled
def _buffers(block_size, rounding):
    num_blocks = _CHUNK // block_size
    scaled, near = np.empty(_CHUNK, np.uint32), np.empty(_CHUNK, np.uint32)
    words = np.empty(_CHUNK if rounding == STOCHASTIC else 0, np.uint32)
    inverses, factors = np.empty(num_blocks, np.float32), np.empty(num_blocks, np.float32)
    return scaled, near, words, np.empty(num_blocks, np.uint32), inverses, factors


@compiled
def _round_chunk(bits, start, out, out_kind, scales, how, buffers):
    block_size, element, largest_exponent, tensor_scale, rounding, seed, offset = how
    scaled, near, words, tops, inverses, factors = buffers
    scaled, near = scaled[: bits.size], near[: bits.size]
    _divide(bits, scaled, tops, inverses, factors, scales, block_size, largest_exponent, tensor_scale)
    if rounding == NEAREST:
        if out_kind == CODES:
            nearest_codes(scaled, near, element)
        else:
            nearest(scaled, near, element)
    else:
        if rounding == STOCHASTIC:
            fill_words(words, _u64(start // BLOCK_WORDS), seed, offset)
            stochastic_narrow(scaled, near, element, words)
        else:
            toward_zero(scaled, near, element)
        if out_kind == CODES:
            nearest_codes(near, scaled, element)
            near = scaled
    if out_kind == CODES:
        for i in range(out.size):
            out[i] = near[i]
    else:
        _multiply(near, factors, out, block_size)


@compiled
def _divide(bits, out, tops, inverses, factors, scales, block_size, largest_exponent, tensor_scale):
    """Divide each block by its scale, whose value and code are written; where that is NaN, the block becomes 0."""
    num_blocks = bits.size // block_size
    _largest_of(bits, tops[:num_blocks], block_size)
    if tensor_scale == _f32(0):
        _mx_scales(tops[:num_blocks], inverses, factors, scales, _u32(largest_exponent << 23))
    else:
        _nvfp4_scales(tops[:num_blocks], inverses, factors, scales, tensor_scale)
    _multiply(bits, inverses, out, block_size)
    for block in range(num_blocks):
        if tops[block] >= _INFINITY:
            for i in range(block * block_size, (block + 1) * block_size):
                out[i] = _u32(0)


@compiled
def _largest_of(bits, tops, block_size):
    for block in range(tops.size):
        if block_size == 32:
            tops[block] = largest_32(bits, block * 32)
        else:
            tops[block] = largest_16(bits, block * 16)


@compiled
def _multiply(bits, factors, out, block_size):
    for block in range(bits.size // block_size):
        if block_size == 32:
            multiply_32(bits, out, block * 32, factors[block])
        else:
            multiply_16(bits, out, block * 16, factors[block])


@compiled
def _mx_scales(tops, inverses, factors, scales, largest_exponent):
    """Write 1/scale, the scale and its code in E8M0 for blocks whose amax has the bits `tops`."""
    for block in range(tops.size):
        top = tops[block]
        # an amax that is subnormal in float32 needs a scale below E8M0's smallest anyway
        field = _u32(top & _INFINITY)
        field = _u32(field - largest_exponent) if field > largest_exponent else _u32(0)
        is_finite = top < _INFINITY
        factor = field if field > _u32(0) else _u32(1 << 22)  # 2^-127 is a subnormal of float32
        factors[block] = as_float(factor if is_finite else _NAN)
        inverses[block] = as_float(_u32(_u32(254 << 23) - field) if is_finite else _u32(0))
        scales[block] = _u32(field >> _FIELD) if is_finite else _E8M0_NAN


@compiled
def _nvfp4_scales(tops, inverses, factors, scales, tensor_scale):
    """Write the same for NVFP4, with codes in E4M3; the factor is the product of both scales."""
    for block in range(tops.size):
        top = tops[block]
        is_finite = top < _INFINITY
        wanted = _f32(_f32(as_float(top) / _f32(6)) / tensor_scale)
        wanted = wanted if wanted < _f32(448) else _f32(448)
        exponent = _u32(as_bits(wanted) & _INFINITY)
        exponent = exponent if exponent > _E4M3_LOWEST else _E4M3_LOWEST
        shift = _u32(exponent + _E4M3_PLACES)
        summed = _f32(wanted + as_float(shift))
        code = _u32(_u32(_u32(exponent - _E4M3_LOWEST) >> _u32(20)) + _u32(as_bits(summed) - shift))
        factor = _f32(_f32(summed - as_float(shift)) * tensor_scale)
        inverse = _f32(_f32(1) / factor) if factor > _f32(0) else _f32(0)
        factors[block] = factor if is_finite else as_float(_NAN)
        inverses[block] = inverse if is_finite else _f32(0)
        scales[block] = code if is_finite else _E4M3_NAN
