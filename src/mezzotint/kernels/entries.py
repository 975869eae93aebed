"""The compiled loops behind plain integers: addresses of dense CPU memory, counts and constants.

Turning a tensor into a numpy array takes 2.5 us, an address 0.1 us, and a call with integers alone 0.3 us: on a small
tensor that is the whole cost. The caller keeps the memory alive and vouches for its length. Seeds and offsets are
int64 whose bits are taken as uint64.
"""

import numpy as np
from numba import carray

from mezzotint.kernels.addresses import bytes_at, words16_at, words32_at
from mezzotint.kernels.blocks import round_blocks, round_blocks_float32
from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import CODES, FLOAT32
from mezzotint.kernels.rounding import round_float32, round_words
from mezzotint.kernels.stats import range_counts
from mezzotint.kernels.target import Target
from mezzotint.kernels.words import as_float

_f32, _u64 = np.float32, np.uint64
_INFINITY = np.uint32(0x7F800000)
_TARGET = len(Target._fields)


@compiled
def round_at(source, kind, out, out_kind, out_bytes, count, target, rounding, seed, offset):
    """Round `count` words at `source` into those at `out`; kinds and modes are those of `round_words`.

    `out_bytes` is the size of a word of `out`, `target` the address of the format's array.
    """
    numbers = carray(words32_at(target), (_TARGET,))
    seed, offset = _u64(seed), _u64(offset)
    if kind == FLOAT32:
        words = carray(words32_at(source), (count,))
        if out_bytes == 4:
            place = carray(words32_at(out), (count,))
            if source == out:
                round_words(words, kind, place, out_kind, numbers, rounding, seed, offset)
            else:
                round_float32(words, place, out_kind, numbers, rounding, seed, offset)
        elif out_bytes == 2:
            round_float32(words, carray(words16_at(out), (count,)), out_kind, numbers, rounding, seed, offset)
        else:
            round_float32(words, carray(bytes_at(out), (count,)), out_kind, numbers, rounding, seed, offset)
    else:
        halves = carray(words16_at(source), (count,))
        if out_bytes == 4:
            round_words(halves, kind, carray(words32_at(out), (count,)), out_kind, numbers, rounding, seed, offset)
        elif out_bytes == 2:
            round_words(halves, kind, carray(words16_at(out), (count,)), out_kind, numbers, rounding, seed, offset)
        else:
            round_words(halves, kind, carray(bytes_at(out), (count,)), out_kind, numbers, rounding, seed, offset)


@compiled
def round_blocks_at(
    source,
    kind,
    out,
    out_kind,
    scales,
    count,
    block_size,
    element,
    largest_exponent,
    tensor_scale,
    rounding,
    seed,
    offset,
):
    """Round `count` words at `source` to blocks; all else is as for `round_blocks`, arrays given by address."""
    numbers = carray(words32_at(element), (_TARGET,))
    codes = carray(bytes_at(scales), (count // block_size,))
    scale, seed, offset = _f32(tensor_scale), _u64(seed), _u64(offset)
    how = (block_size, numbers, largest_exponent, scale, rounding, seed, offset)
    if kind == FLOAT32:
        words = carray(words32_at(source), (count,))
        if out_kind == CODES:
            round_blocks_float32(words, carray(bytes_at(out), (count,)), out_kind, codes, how)
        elif source == out:
            round_blocks(words, kind, carray(words32_at(out), (count,)), out_kind, codes, how)
        else:
            round_blocks_float32(words, carray(words32_at(out), (count,)), out_kind, codes, how)
    else:
        halves = carray(words16_at(source), (count,))
        if out_kind == CODES:
            round_blocks(halves, kind, carray(bytes_at(out), (count,)), out_kind, codes, how)
        else:
            round_blocks(halves, kind, carray(words32_at(out), (count,)), out_kind, codes, how)


@compiled
def range_counts_at(source, kind, count, counts):
    """Add one pass over `count` words at `source` to the array `counts`; return both ends of the range as numbers.

    The smallest is infinity where there is none but zeros; see `range_counts`.
    """
    if kind == FLOAT32:
        largest, smallest = range_counts(carray(words32_at(source), (count,)), kind, counts)
    else:
        largest, smallest = range_counts(carray(words16_at(source), (count,)), kind, counts)
    return float(as_float(largest)), float(as_float(smallest)) if smallest < _INFINITY else np.inf
