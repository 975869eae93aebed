"""Optimizer steps of bfloat16 weights in one pass over memory: AdamW, Adam and SGD with momentum.

Each takes float32 numbers for a chunk of weights, steps them and stores them again, in one of three ways:

- MASTER: the float32 weights are in memory too; the bfloat16 ones are their rounding;
- RANDOM: there are bfloat16 weights alone, rounded stochastically, with the bits that `round_words` draws;
- KAHAN: what rounding dropped is a second bfloat16 number, added to the first before a step.

A float32 copy of a chunk lives in the first cache only. The arithmetic is that of torch's operations, one by one and in
their order, where torch multiplies and adds with one rounding, as it does on all processors with AVX2.

A task takes a block of int64 words: a header, then a row for each parameter. Work is handed out in units of up to _UNIT
elements of one parameter, so many small parameters cost one call. All numbers of a step that are the same for many
parameters are float32 words of a table of settings.
"""

from array import array
from typing import Any

import numpy as np
from numba import carray

from mezzotint.kernels.adam_step import step_kahan, step_master, step_random
from mezzotint.kernels.addresses import floats_at, words16_at, words32_at
from mezzotint.kernels.arithmetic import multiply_add, quotient, square_roots
from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import BFLOAT16, BLOCK_WORDS, HALVES
from mezzotint.kernels.philox import fill_block, fill_words
from mezzotint.kernels.team import run, take_thread, take_unit, task
from mezzotint.kernels.words import as_bits, as_float, bfloat16_bits

_u16, _u32, _u64, _f32 = np.uint16, np.uint32, np.uint64, np.float32

MASTER, RANDOM, KAHAN = 0, 1, 2

# the header: counters of units and threads, then what all rows share
_NUM_UNITS, _NUM_ROWS, _KIND, _SETTINGS, _SEED, _SCRATCH = range(2, 8)
_HEADER_WORDS = 8
# a row: addresses of the bfloat16 weights, of what is held beside them (masters or compensations), of the gradient and
# of the two states; counts; the place of the settings in their table; the offset of the random bits; whether the first
# state is still empty; the address of a function that takes square roots
_WEIGHTS, _HELD, _GRADS, _GRAD_KIND, _FIRST, _SECOND, _COUNT, _FIRST_UNIT, _PLACE, _OFFSET = range(10)
_IS_NEW, _ROOTS = 10, 11
ROW_WORDS = 12

# settings of Adam: L2 decay, factor of decoupled decay, 1 - beta1, beta2, 1 - beta2, the root of the second bias
# correction, epsilon, and minus the step size
_ADAM_SETTINGS = 8
# settings of SGD: L2 decay, momentum, 1 - dampening, whether it is Nesterov's, and minus the learning rate
_SGD_SETTINGS = 5

# elements below which waking other threads takes longer than they save
_SMALLEST_SHARED = 1 << 15
_CHUNK = 2 * HALVES  # the stretch over which random halves are shared out
_UNIT = 32 * _CHUNK
_BUFFERS = 4
_SCRATCH_FLOATS = _BUFFERS * _CHUNK  # for each thread

_INF = _f32(np.inf)
_HALF, _ONE, _NEARLY_HALF = _u32(16), _u32(1), _u32(0x7FFF)
_SIGN, _MAGNITUDE, _INFINITY, _QUIET = _u32(0x80000000), _u32(0x7FFFFFFF), _u32(0x7F800000), _u32(0x00400000)


@compiled
def _widen(words, numbers):
    for i in range(words.size):
        numbers[i] = as_float(bfloat16_bits(_u32(words[i])))


@compiled
def _widen_sum(words, dropped, numbers):
    for i in range(words.size):
        numbers[i] = _f32(as_float(bfloat16_bits(_u32(words[i]))) + as_float(bfloat16_bits(_u32(dropped[i]))))


@compiled
def _near_word(bits):
    """Return the nearest bfloat16, ties to even, in the lower half."""
    near = _u32(_u32(bits + _u32(_NEARLY_HALF + _u32(_u32(bits >> _HALF) & _ONE))) >> _HALF)
    return _u32(_u32(bits | _QUIET) >> _HALF) if _u32(bits & _MAGNITUDE) > _INFINITY else near


@compiled
def _store_nearest(numbers, words):
    for i in range(numbers.size):
        words[i] = _u16(_near_word(as_bits(numbers[i])))


@compiled
def _store_compensated(numbers, words, dropped):
    for i in range(numbers.size):
        number = numbers[i]
        word = _near_word(as_bits(number))
        words[i] = _u16(word)
        dropped[i] = _u16(_near_word(as_bits(_f32(number - as_float(bfloat16_bits(word))))))


@compiled
def _random_word(bits, noise):
    """Return the bfloat16 to which 16 random bits, added below its last place, carry."""
    magnitude = _u32(bits & _MAGNITUDE)
    near = _u32(magnitude + noise)
    near = _INFINITY if near > _INFINITY else near
    near = _u32(near | _u32(bits & _SIGN))
    near = _u32(bits | _QUIET) if magnitude > _INFINITY else near
    return _u16(near >> _HALF)


@compiled
def _store_at_random(numbers, words, random):
    lower, upper = numbers[:HALVES], numbers[HALVES:]
    lower_words, upper_words = words[:HALVES], words[HALVES:]
    for i in range(lower.size):
        lower_words[i] = _random_word(as_bits(lower[i]), _u32(random[i] & _u32(0xFFFF)))
    for i in range(upper.size):
        upper_words[i] = _random_word(as_bits(upper[i]), _u32(random[i] >> _HALF))


@compiled
def _row_of(table, unit):
    """Return where the row of a unit begins: the last one whose first unit is not beyond it."""
    low, high = 0, (table.size - _HEADER_WORDS) // ROW_WORDS
    while high - low > 1:
        middle = (low + high) // 2
        if table[_HEADER_WORDS + ROW_WORDS * middle + _FIRST_UNIT] <= unit:
            low = middle
        else:
            high = middle
    return _HEADER_WORDS + ROW_WORDS * low


@compiled
def _load_weights(kind, row, start, count, scratch):
    """Return a chunk of weights as float32: the masters themselves, or numbers made for the time of the step."""
    if kind == MASTER:
        return carray(floats_at(row[_HELD] + 4 * start), (count,))
    weights = carray(floats_at(scratch), (count,))
    words = carray(words16_at(row[_WEIGHTS] + 2 * start), (count,))
    if kind == KAHAN:
        _widen_sum(words, carray(words16_at(row[_HELD] + 2 * start), (count,)), weights)
    else:
        _widen(words, weights)
    return weights


@compiled
def _store_weights(kind, row, start, weights, scratch, seed):
    words = carray(words16_at(row[_WEIGHTS] + 2 * start), (weights.size,))
    if kind == MASTER:
        _store_nearest(weights, words)
    elif kind == KAHAN:
        _store_compensated(weights, words, carray(words16_at(row[_HELD] + 2 * start), (weights.size,)))
    else:
        random = carray(words32_at(scratch + 4 * _CHUNK), (HALVES,))
        fill_words(random, _u64(start // _CHUNK * (HALVES // BLOCK_WORDS)), _u64(seed), _u64(row[_OFFSET]))
        _store_at_random(weights, words, random)


@compiled
def _load_grads(row, start, count, scratch):
    if row[_GRAD_KIND] != BFLOAT16:
        return carray(floats_at(row[_GRADS] + 4 * start), (count,))
    grads = carray(floats_at(scratch + 8 * _CHUNK), (count,))
    _widen(carray(words16_at(row[_GRADS] + 2 * start), (count,)), grads)
    return grads


@compiled
def _decayed(weights, grads, decay, scratch):
    """Return gradients with those of an L2 penalty."""
    if decay == _f32(0):
        return grads
    out = carray(floats_at(scratch + 12 * _CHUNK), (grads.size,))
    for i in range(out.size):
        out[i] = multiply_add(weights[i], decay, grads[i])
    return out


@compiled
def _follow(average, grads, way):
    """Move an average toward the gradients; from the nearer end, as torch's lerp does."""
    if abs(way) < _f32(0.5):
        for i in range(average.size):
            average[i] = multiply_add(way, _f32(grads[i] - average[i]), average[i])
    else:
        rest = _f32(_f32(1) - way)
        for i in range(average.size):
            average[i] = multiply_add(_f32(average[i] - grads[i]), rest, grads[i])


@compiled
def _follow_squares(average, grads, kept, added):
    for i in range(average.size):
        grad = grads[i]
        average[i] = multiply_add(_f32(added * grad), grad, _f32(average[i] * kept))


@compiled
def _move(weights, average, roots, factor, correction, epsilon, step):
    for i in range(weights.size):
        below = _f32(quotient(roots[i], correction) + epsilon)
        weights[i] = _f32(_f32(weights[i] * factor) + quotient(_f32(step * average[i]), below))


@compiled
def _adam_chunk(row, start, weights, grads, settings, scratch):
    """Step a chunk by operations one after the other, as the function that takes square roots wants an array."""
    penalty, factor, way, kept, added, correction, epsilon, step = settings
    grads = _decayed(weights, grads, penalty, scratch)
    average = carray(floats_at(row[_FIRST] + 4 * start), (weights.size,))
    squares_at, roots_at = row[_SECOND] + 4 * start, scratch + 8 * _CHUNK
    squares = carray(floats_at(squares_at), (weights.size,))
    _follow(average, grads, way)
    _follow_squares(squares, grads, kept, added)
    # widened gradients lie where roots go now; they have served
    square_roots(squares_at, roots_at, weights.size, row[_ROOTS])
    _move(weights, average, carray(floats_at(roots_at), (weights.size,)), factor, correction, epsilon, step)


@compiled
def _places(kind, row, start, noise):
    held = row[_HELD] + (4 if kind == MASTER else 2) * start
    states = row[_FIRST] + 4 * start, row[_SECOND] + 4 * start
    return row[_WEIGHTS] + 2 * start, held, row[_GRADS] + 4 * start, states[0], states[1], noise


@compiled
def _adam_at_once(kind, row, first, count, settings, scratch, seed):
    """Step `count` elements from `first` on in one loop, with roots rounded to nearest."""
    if kind == MASTER:
        step_master(_places(kind, row, first, 0), count, _u32(0), settings)
    elif kind == KAHAN:
        step_kahan(_places(kind, row, first, 0), count, _u32(0), settings)
    else:
        _adam_at_random(row, first, count, settings, scratch, _u64(seed), _u64(row[_OFFSET]))


@compiled
def _adam_at_random(row, first, count, settings, scratch, seed, offset):
    """Make the random words of the next chunk between runs of this one: two sorts of work that overlap."""
    here, following = scratch, scratch + 4 * HALVES
    block = first // _CHUNK * (HALVES // BLOCK_WORDS)
    fill_words(carray(words32_at(here), (HALVES,)), _u64(block), seed, offset)
    for chunk in range(first, first + count, _CHUNK):
        block += HALVES // BLOCK_WORDS
        ahead = carray(words32_at(following), (HALVES,))
        for index in range(HALVES // BLOCK_WORDS):
            start = chunk + index * 2 * BLOCK_WORDS
            if start >= first + count:
                return
            fill_block(ahead, _u64(index * BLOCK_WORDS), _u64(block + index), seed, offset)
            place = index * 2 * BLOCK_WORDS
            shift = _HALF if place >= HALVES else _u32(0)
            noise = here + 4 * (place % HALVES)
            num = min(2 * BLOCK_WORDS, first + count - start)
            step_random(_places(RANDOM, row, start, noise), num, shift, settings)
        here, following = following, here


@compiled
def _add_scaled(weights, added, factor):
    for i in range(weights.size):
        weights[i] = multiply_add(factor, added[i], weights[i])


@compiled
def _sgd_chunk(row, start, weights, grads, settings, scratch):
    penalty, momentum, added, is_nesterov, step = settings
    grads = _decayed(weights, grads, penalty, scratch)
    if row[_FIRST] == 0:
        _add_scaled(weights, grads, step)
        return
    average = carray(floats_at(row[_FIRST] + 4 * start), (weights.size,))
    if row[_IS_NEW]:
        for i in range(average.size):
            average[i] = grads[i]
    else:
        for i in range(average.size):
            average[i] = multiply_add(added, grads[i], _f32(average[i] * momentum))
    if is_nesterov == _f32(0):
        _add_scaled(weights, average, step)
        return
    ahead = carray(floats_at(scratch + 4 * _CHUNK), (weights.size,))
    for i in range(ahead.size):
        ahead[i] = multiply_add(momentum, average[i], grads[i])
    _add_scaled(weights, ahead, step)


@compiled
def _settings_at(words, row, count):
    return carray(floats_at(words[_SETTINGS] + 4 * row[_PLACE]), (count,))


@task
def adam(block):
    """Step all rows by Adam, with L2 or decoupled decay."""
    words = carray(block, (_HEADER_WORDS,))
    table = carray(block, (_HEADER_WORDS + ROW_WORDS * words[_NUM_ROWS],))
    kind, scratch = words[_KIND], words[_SCRATCH] + 4 * _SCRATCH_FLOATS * take_thread(block)
    while True:
        unit = take_unit(block)
        if unit >= words[_NUM_UNITS]:
            break
        place = _row_of(table, unit)
        row = table[place : place + ROW_WORDS]
        numbers = _settings_at(words, row, _ADAM_SETTINGS)
        settings = (numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7])
        first = _UNIT * (unit - row[_FIRST_UNIT])
        if row[_ROOTS] == 0 and row[_GRAD_KIND] != BFLOAT16:
            _adam_at_once(kind, row, first, min(_UNIT, row[_COUNT] - first), settings, scratch, words[_SEED])
            continue
        for start in range(first, min(first + _UNIT, row[_COUNT]), _CHUNK):
            count = min(_CHUNK, row[_COUNT] - start)
            weights = _load_weights(kind, row, start, count, scratch)
            grads = _load_grads(row, start, count, scratch)
            _adam_chunk(row, start, weights, grads, settings, scratch)
            _store_weights(kind, row, start, weights, scratch, words[_SEED])


@task
def sgd(block):
    """Step all rows by gradient descent, with or without momentum."""
    words = carray(block, (_HEADER_WORDS,))
    table = carray(block, (_HEADER_WORDS + ROW_WORDS * words[_NUM_ROWS],))
    kind, scratch = words[_KIND], words[_SCRATCH] + 4 * _SCRATCH_FLOATS * take_thread(block)
    while True:
        unit = take_unit(block)
        if unit >= words[_NUM_UNITS]:
            break
        place = _row_of(table, unit)
        row = table[place : place + ROW_WORDS]
        numbers = _settings_at(words, row, _SGD_SETTINGS)
        settings = (numbers[0], numbers[1], numbers[2], numbers[3], numbers[4])
        first = _UNIT * (unit - row[_FIRST_UNIT])
        for start in range(first, min(first + _UNIT, row[_COUNT]), _CHUNK):
            count = min(_CHUNK, row[_COUNT] - start)
            weights = _load_weights(kind, row, start, count, scratch)
            grads = _load_grads(row, start, count, scratch)
            _sgd_chunk(row, start, weights, grads, settings, scratch)
            _store_weights(kind, row, start, weights, scratch, words[_SEED])


def step_rows(optimizer: Any, kind: int, rows: "array[int]", settings: "array[float]", *, seed: int, num_threads: int):
    """Run `adam` or `sgd` on rows that are joined in one array; their first units are filled in."""
    num_units = num_elements = 0
    for start in range(0, len(rows), ROW_WORDS):
        rows[start + _FIRST_UNIT] = num_units
        num_units += -(-rows[start + _COUNT] // _UNIT)
        num_elements += rows[start + _COUNT]
    if num_units == 0:
        return
    num_threads = min(num_threads, num_units) if num_elements >= _SMALLEST_SHARED else 1
    scratch = np.empty(num_threads * _SCRATCH_FLOATS, np.float32)
    numbers = settings.buffer_info()[0]
    header = (0, 0, num_units, len(rows) // ROW_WORDS, kind, numbers, seed, scratch.ctypes.data)
    block = array("q", header) + rows
    run(optimizer, block.buffer_info()[0], num_threads)
