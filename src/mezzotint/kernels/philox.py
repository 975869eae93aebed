"""Philox4x32-7, a counter-based generator: random bits as a function of a key, an offset and an element's index.

Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011). No state is kept, so the bits of
an element depend neither on the number of threads nor on the order of computation, and any device can make them.

A counter gives four words. Sixteen consecutive counters make a block of 64 words, ordered by word and then by counter,
as vector instructions produce them. Element i of a tensor takes the i-th word. Where 16 bits are enough, 2048 elements
share 1024 words: the first 1024 of them take the lower halves, the others the upper halves.
"""

import numpy as np

from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import BLOCK_WORDS, COUNTERS, KEY_STEPS, MULTIPLIERS, ROUNDS

_u32, _u64 = np.uint32, np.uint64
_M0, _M1 = (np.uint64(number) for number in MULTIPLIERS)
_W0, _W1 = (np.uint64(number) for number in KEY_STEPS)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


@compiled
def fill_block(words, place, block, seed, offset):
    """Write the 64 words of one block into `words`, uint32, from `place` on; all other arguments are uint64."""
    for lane in range(COUNTERS):
        # a word in 64 bits, of which products use the lower 32: neither shuffles nor masks between rounds
        a = _u64(_u64(block * _u64(COUNTERS)) + _u64(lane))
        b = _u64(a >> _SHIFT)
        c, d = _u64(offset & _LOW), _u64(offset >> _SHIFT)
        x, y = _u64(seed & _LOW), _u64(seed >> _SHIFT)
        for _ in range(ROUNDS):
            p = _u64(_u64(a & _LOW) * _M0)
            q = _u64(_u64(c & _LOW) * _M1)
            a, b = _u64(_u64(_u64(q >> _SHIFT) ^ b) ^ x), q
            c, d = _u64(_u64(_u64(p >> _SHIFT) ^ d) ^ y), p
            x, y = _u64(x + _W0), _u64(y + _W1)
        index = _u64(place + _u64(lane))
        words[index] = _u32(a)
        words[_u64(index + _u64(COUNTERS))] = _u32(b)
        words[_u64(index + _u64(2 * COUNTERS))] = _u32(c)
        words[_u64(index + _u64(3 * COUNTERS))] = _u32(d)


@compiled
def fill_words(words, first_block, seed, offset):
    """Write consecutive blocks into `words`, whose length is a multiple of 64; the arguments are uint64."""
    for index in range(words.size // BLOCK_WORDS):
        fill_block(words, _u64(index * BLOCK_WORDS), _u64(first_block + _u64(index)), seed, offset)
