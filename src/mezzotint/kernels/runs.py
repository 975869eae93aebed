"""Runs of words of any kind as float32 and back, vector by vector, given by address."""

from numba import carray

from mezzotint.kernels.addresses import floats_at, words16_at
from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import FLOAT16, FLOAT32
from mezzotint.kernels.tiles import (
    LANES,
    narrow_bfloat16,
    narrow_float16,
    narrow_float32,
    widen_bfloat16,
    widen_float16,
    widen_float32,
)
from mezzotint.kernels.words import as_float, bfloat16_bits, float16_bits


@compiled
def size_of(kind):
    """Return the bytes of a word."""
    return 4 if kind == FLOAT32 else 2


@compiled
def _widen(kind, source, out):
    if kind == FLOAT16:
        widen_float16(source, out)
    elif kind == FLOAT32:
        widen_float32(source, out)
    else:
        widen_bfloat16(source, out)


@compiled
def _narrow(kind, source, out):
    if kind == FLOAT16:
        narrow_float16(source, out)
    elif kind == FLOAT32:
        narrow_float32(source, out)
    else:
        narrow_bfloat16(source, out)


@compiled
def number_at(kind, source, index):
    """Return one word as float32."""
    if kind == FLOAT32:
        return carray(floats_at(source), (index + 1,))[index]
    word = carray(words16_at(source), (index + 1,))[index]
    return as_float(float16_bits(word) if kind == FLOAT16 else bfloat16_bits(word))


@compiled
def widen_run(kind, source, out, count):
    """Write `count` words at `source` as float32 at `out`."""
    size = size_of(kind)
    last = count - count % LANES
    for i in range(0, last, LANES):
        _widen(kind, source + size * i, out + 4 * i)
    if last < count:
        if count >= LANES:  # the last vector overlaps the one before
            _widen(kind, source + size * (count - LANES), out + 4 * (count - LANES))
        else:
            numbers = carray(floats_at(out), (count,))
            for i in range(count):
                numbers[i] = number_at(kind, source, i)


@compiled
def narrow_run(kind, source, out, count, spare):
    """Write `count` float32 at `source`, rounded to nearest even, as words at `out`.

    Where there are less than a vector, a whole one is read all the same, and goes through the memory at `spare`.
    """
    size = size_of(kind)
    rest = count % LANES
    for i in range(0, count - rest, LANES):
        _narrow(kind, source + 4 * i, out + size * i)
    if rest:
        last = count - LANES
        _narrow(kind, source + 4 * max(last, 0), out + size * last if last >= 0 else spare)
        if count < LANES:
            halves = count * size // 2
            words, rounded = carray(words16_at(out), (halves,)), carray(words16_at(spare), (halves,))
            for i in range(halves):
                words[i] = rounded[i]


@compiled
def fill_zeros(out, count):
    """Write `count` zeros of float32."""
    numbers = carray(floats_at(out), (count,))
    for i in range(count):
        numbers[i] = 0
