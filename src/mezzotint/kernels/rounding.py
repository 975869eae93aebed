"""Rounding a whole array of float32, bfloat16 or float16 words, chunk by chunk, in one pass over memory."""

import numpy as np

from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import (
    BFLOAT16,
    BLOCK_WORDS,
    CODES,
    FLOAT32,
    HALVES,
    NEAREST,
    STOCHASTIC,
    TOWARD_ZERO,
)
from mezzotint.kernels.loops import load, nearest, nearest_codes, stochastic_narrow, stochastic_wide, store, toward_zero
from mezzotint.kernels.philox import fill_words
from mezzotint.kernels.target import Target

_u64 = np.uint64
_CHUNK = 2 * HALVES
_IS_WIDE = Target._fields.index("is_wide")


@compiled
def round_words(source, kind, out, out_kind, target, rounding, seed, offset):
    """Round `source` into `out`, arrays of one length that do not overlap unless they are the same.

    `kind` says what the words of `source` are: FLOAT32 (uint32), BFLOAT16 or FLOAT16 (uint16); `out_kind` those of
    `out`, or CODES (uint8 or uint16). `target` is the format's array, `rounding` one of NEAREST, TOWARD_ZERO and
    STOCHASTIC, for which `seed` and `offset`, uint64, choose the random bits. A NaN stays NaN as a number; as a code
    it becomes the format's NaN, or 0 where it has none.
    """
    buffers = _buffers(rounding)
    bits = np.empty(_CHUNK, np.uint32)
    for start in range(0, source.size, _CHUNK):
        part = source[start : start + _CHUNK]
        loaded = bits[: part.size]
        load(part, kind, loaded)
        place = out[start : start + _CHUNK]
        _round_chunk(loaded, start, place, out_kind, target, rounding, buffers, seed, offset)


@compiled
def round_float32(source, out, out_kind, target, rounding, seed, offset):
    """Do what `round_words` does for `source` of FLOAT32 into `out` that is not `source`, with no copy between."""
    if out_kind == FLOAT32 and rounding == NEAREST:
        nearest(source, out, target)
        return
    if out_kind == CODES and rounding == NEAREST and target[_IS_WIDE] == 0:
        nearest_codes(source, out, target)
        return
    buffers = _buffers(rounding)
    for start in range(0, source.size, _CHUNK):
        part = source[start : start + _CHUNK]
        place = out[start : start + _CHUNK]
        _round_chunk(part, start, place, out_kind, target, rounding, buffers, seed, offset)


@compiled
def _buffers(rounding):
    words = np.empty(_CHUNK if rounding == STOCHASTIC else 0, np.uint32)
    return np.empty(_CHUNK, np.uint32), np.empty(_CHUNK, np.uint32), words


@compiled
def _round_chunk(bits, start, out, out_kind, target, rounding, buffers, seed, offset):
    rounded, codes, words = buffers
    rounded, codes = rounded[: bits.size], codes[: bits.size]
    if rounding == NEAREST:
        if out_kind == CODES and target[_IS_WIDE] == 0:
            nearest_codes(bits, rounded, target)
            store(rounded, FLOAT32, out)
            return
        nearest(bits, rounded, target)
    elif rounding == TOWARD_ZERO:
        toward_zero(bits, rounded, target)
    elif target[_IS_WIDE]:
        fill_words(words[:HALVES], _u64(start // _CHUNK * (HALVES // BLOCK_WORDS)), seed, offset)
        stochastic_wide(bits, rounded, target, words)
    else:
        fill_words(words, _u64(start // BLOCK_WORDS), seed, offset)
        stochastic_narrow(bits, rounded, target, words)
    if out_kind == CODES and target[_IS_WIDE] == 0:
        nearest_codes(rounded, codes, target)
        store(codes, FLOAT32, out)
    else:
        store(rounded, BFLOAT16 if out_kind == CODES else out_kind, out)
