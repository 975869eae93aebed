"""One pass over the bits of a tensor: how many of each exponent, of zeros, infinities and NaN; the ends of its range.

A scalar histogram costs a load, an add and a store for each element, each waiting for the one before where neighbours
share an exponent. Here a chunk that fits the first-level cache has its exponents written out as bytes, by vector
instructions that find largest and smallest on the way; then the chunk's bytes are compared with one exponent after the
other, from the largest down. A dozen exponents hold nearly all elements of a tensor; the rest are picked out singly.
Formats of 16 bits are not widened, save for chunks with subnormals, infinities or NaN.
"""

import numpy as np

from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import FLOAT16, INF, NAN, ZERO
from mezzotint.kernels.vectors import (
    COUNT_STEP,
    MASK_STEP,
    WORD_STEP,
    count_pair,
    mask_between,
    trailing_zeros,
    word_exponents,
)
from mezzotint.kernels.words import bfloat16_bits, float16_bits

_u32, _u16, _u8, _i64, _u64 = np.uint32, np.uint16, np.uint8, np.int64, np.uint64
_CHUNK = 4096
_RARE = 24  # counting by exponent ends where fewer than one element in 24 is left
_NEIGHBOURS = 8  # chunks that follow one with subnormals, and likely have some too
_FEW = 10  # exponents to count before the rest of a chunk is judged


@compiled
def range_counts(source, kind, counts):
    """Add one pass over `source` to `counts` and return the bits of its largest and smallest magnitude as float32.

    `source` holds the bits of float32 (uint32) or, by `kind`, bfloat16 or float16 (uint16). `counts`, int64, has 256
    places for the exponent fields the numbers have as float32 (0: zeros and subnormals of float32, 255: infinities and
    NaN), then the numbers of NaN, infinities and zeros. Largest is over finite numbers (0 where there are none but
    zeros), smallest over those that are not zero (0xffffffff where there is none).
    """
    exponents = np.empty(_CHUNK, np.uint8)
    largest, smallest = _u32(0), _u32(0xFFFFFFFF)
    num_as_float32 = 0
    for start in range(0, source.size, _CHUNK):
        part = source[start : start + _CHUNK]
        is_counted = False
        if part.itemsize == 2 and num_as_float32 == 0:
            top, bottom, is_counted = _count_words(part, kind, exponents, counts)
            num_as_float32 = 0 if is_counted else _NEIGHBOURS
        else:
            num_as_float32 -= 1
        if not is_counted:
            top, bottom = _count_chunk(part, kind, exponents, counts)
        largest = top if top > largest else largest
        smallest = bottom if bottom < smallest else smallest
    return largest, _u32(smallest + _u32(1)) if smallest != _u32(0xFFFFFFFF) else smallest


@compiled
def _count_chunk(part, kind, exponents, counts):
    """Count a chunk as float32; return its ends as `_exponents` does."""
    top, bottom = _exponents(part, kind, exponents)
    if top >= _u32(0x7F800000) or bottom < _u32(0x007FFFFF):
        top, bottom = _count_one_by_one(part, kind, counts)
    else:
        _count_by_exponent(exponents, part.size, _i64(top >> _u32(23)), _i64(0), counts)
    return top, bottom


@compiled
def _count_words(part, kind, exponents, counts):
    """Count a chunk by its 16-bit words alone, twice as many to a vector; its ends as float32, and whether it did.

    A chunk with infinities, NaN or subnormals of its own format is left to `_count_chunk`.
    """
    shift, special = (_u16(10), _u16(0x7C00)) if kind == FLOAT16 else (_u16(7), _u16(0x7F80))
    top, bottom = _word_exponents(part, shift, exponents)
    if top >= special or bottom < _u16(_u16(1) << shift) - _u16(1):
        return _u32(0), _u32(0), False
    _count_by_exponent(exponents, part.size, _i64(top >> shift), _i64(112 if kind == FLOAT16 else 0), counts)
    if bottom == _u16(0xFFFF):
        return _u32(0), _u32(0xFFFFFFFF), True
    smallest = _u32(bottom) + _u32(1)
    if kind == FLOAT16:
        return float16_bits(_u32(top)), _u32(float16_bits(smallest) - _u32(1)), True
    return bfloat16_bits(_u32(top)), _u32(bfloat16_bits(smallest) - _u32(1)), True


@compiled
def _word_exponents(part, shift, exponents):
    """Write the exponent fields of words as bytes, as `_exponents` does; return largest word, smallest less 1."""
    whole = part.size // WORD_STEP * WORD_STEP
    ends = word_exponents(part, whole, shift, exponents) if whole else _u32(0xFFFF)
    top, bottom = _u16(ends >> _u32(16)), _u16(ends & _u32(0xFFFF))
    for i in range(whole, part.size):
        word = _u16(part[i] & _u16(0x7FFF))
        top = word if word > top else top
        less = _u16(word - _u16(1))
        bottom = less if less < bottom else bottom
        exponents[i] = _u8(word >> shift)
    for i in range(part.size, _padded(part.size)):
        exponents[i] = _u8(0)
    return top, bottom


@compiled
def _exponents(part, kind, exponents):
    """Write exponent fields as bytes, the rest of a counting step as 0; return largest bits, smallest bits less 1."""
    top, bottom = _u32(0), _u32(0xFFFFFFFF)
    fields = exponents[: part.size]
    if kind == FLOAT16:
        for i in range(part.size):
            bits = _u32(float16_bits(_u32(part[i])) & _u32(0x7FFFFFFF))
            top = bits if bits > top else top
            less = _u32(bits - _u32(1))  # zero becomes the largest, so that the smallest is not zero
            bottom = less if less < bottom else bottom
            fields[i] = _u32(bits >> _u32(23))
    elif part.itemsize == 2:
        for i in range(part.size):
            bits = _u32(bfloat16_bits(_u32(part[i])) & _u32(0x7FFFFFFF))
            top = bits if bits > top else top
            less = _u32(bits - _u32(1))
            bottom = less if less < bottom else bottom
            fields[i] = _u32(bits >> _u32(23))
    else:
        for i in range(part.size):
            bits = _u32(part[i] & _u32(0x7FFFFFFF))
            top = bits if bits > top else top
            less = _u32(bits - _u32(1))
            bottom = less if less < bottom else bottom
            fields[i] = _u32(bits >> _u32(23))
    rest = exponents[part.size : _padded(part.size)]
    for i in range(rest.size):
        rest[i] = _u8(0)
    return top, bottom


@compiled
def _padded(size):
    return (size + COUNT_STEP - 1) // COUNT_STEP * COUNT_STEP


@compiled
def _count_by_exponent(exponents, size, top, base, counts):
    """Count a chunk without infinities, NaN or subnormals: its exponent 0 is the zeros'.

    `base` is what makes the format's exponent fields those of float32.
    """
    length = _padded(size)
    left = size
    exponent = top
    is_zeros_counted = False
    while left * _RARE > size and exponent > 0:
        pair = count_pair(exponents, length, _u8(exponent), _u8(exponent - 1))
        upper = pair & _i64(0xFFFFFFFF)
        lower = pair >> 32 if exponent > 1 else 0
        counts[base + exponent] += upper
        counts[base + exponent - 1] += lower
        left -= upper + lower
        exponent -= 2
        if not is_zeros_counted and exponent <= top - _FEW:
            zeros = (count_pair(exponents, length, _u8(0), _u8(0)) >> 32) - (length - size)
            counts[0] += zeros
            counts[ZERO] += zeros
            left -= zeros
            is_zeros_counted = True
    if left > 0 and exponent > 0:
        for start in range(0, length, MASK_STEP):
            mask = mask_between(exponents, start, _u8(exponent))
            while mask != _u64(0):
                counts[base + exponents[start + trailing_zeros(mask)]] += 1
                left -= 1
                mask = _u64(mask & _u64(mask - _u64(1)))
    if not is_zeros_counted:
        counts[0] += left
        counts[ZERO] += left


@compiled
def _count_one_by_one(part, kind, counts):
    top, bottom = _u32(0), _u32(0xFFFFFFFF)
    for i in range(part.size):
        bits = _u32(part[i])
        if part.itemsize == 2:
            bits = float16_bits(bits) if kind == FLOAT16 else bfloat16_bits(bits)
        bits = _u32(bits & _u32(0x7FFFFFFF))
        counts[_i64(bits >> _u32(23))] += 1
        if bits > _u32(0x7F800000):
            counts[NAN] += 1
        elif bits == _u32(0x7F800000):
            counts[INF] += 1
        elif bits == _u32(0):
            counts[ZERO] += 1
        else:
            top = bits if bits > top else top
            bottom = _u32(bits - _u32(1)) if _u32(bits - _u32(1)) < bottom else bottom
    return top, bottom
