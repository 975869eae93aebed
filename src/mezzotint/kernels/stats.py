"""One pass over the bits of a tensor: how many of each exponent, of zeros, infinities and NaN; the ends of its range.

A scalar histogram costs a load, an add and a store for each element, each waiting for the one before where neighbours
share an exponent. Here a chunk that fits the first-level cache has its exponents written out as bytes, by vector
instructions that find largest and smallest on the way; then the chunk's bytes are compared with one exponent after the
other, from the largest down. A dozen exponents hold nearly all elements of a tensor; the rest are picked out singly.
"""

import numpy as np

from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import FLOAT16, INF, NAN, ZERO
from mezzotint.kernels.vectors import COUNT_STEP, MASK_STEP, count_pair, mask_between, trailing_zeros
from mezzotint.kernels.words import bfloat16_bits, float16_bits

_u32, _u8, _i64, _u64 = np.uint32, np.uint8, np.int64, np.uint64
_CHUNK = 4096
_RARE = 24  # counting by exponent ends where fewer than one element in 24 is left
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
    for start in range(0, source.size, _CHUNK):
        part = source[start : start + _CHUNK]
        top, bottom = _exponents(part, kind, exponents)
        if top >= _u32(0x7F800000) or bottom < _u32(0x007FFFFF):
            top, bottom = _count_one_by_one(part, kind, counts)
        else:
            _count_by_exponent(exponents, part.size, _i64(top >> _u32(23)), counts)
        largest = top if top > largest else largest
        smallest = bottom if bottom < smallest else smallest
    return largest, _u32(smallest + _u32(1)) if smallest != _u32(0xFFFFFFFF) else smallest


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
def _count_by_exponent(exponents, size, top, counts):
    """Count a chunk without infinities, NaN or subnormals of float32: its exponent 0 is the zeros'."""
    length = _padded(size)
    left = size
    exponent = top
    is_zeros_counted = False
    while left * _RARE > size and exponent > 0:
        pair = count_pair(exponents, length, _u8(exponent), _u8(exponent - 1))
        upper = pair & _i64(0xFFFFFFFF)
        lower = pair >> 32 if exponent > 1 else 0
        counts[exponent] += upper
        counts[exponent - 1] += lower
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
                counts[exponents[start + trailing_zeros(mask)]] += 1
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
