"""Products of matrices of 16 bits, or float32, summed in float32 and rounded once, that convert while they pack.

A fast product copies its operands into panels in the order in which the micro-kernel reads them (Goto and van de Geijn
2008, Anatomy of High-Performance Matrix Multiplication). Here the copy also widens 16-bit words to float32, and the
last step rounds a tile that is still in cache: no float32 copy of the larger operand or of the result ever exists.

    pack the right operand, the whole depth K, in strips of COLUMNS columns (the first task)
    for each block of rows and each block of columns:
        for each DEPTH of K: pack the rows; for each strip, for each ROWS of them: micro-kernel onto the block's sums
        multiply by the scales of rows and columns, add the bias, round, store

The caller makes the smaller operand the right one, swapping both where needed: left times right is then the transpose
of what is wanted, and each block of sums is transposed before it is stored. An operand has unit stride along one of its
axes. Where it is to be rounded to a narrower format, that happens to the packed numbers, blocks of MX formats lying
along K; its scale multiplies them before, and divides the result. Sums of at most DEPTH products are added up in
float32.
"""

import numpy as np
from numba import carray

from mezzotint.kernels.addresses import floats_at
from mezzotint.kernels.compiled import compiled
from mezzotint.kernels.constants import FLOAT16, FLOAT32
from mezzotint.kernels.runs import fill_zeros, narrow_run, number_at, size_of, widen_run
from mezzotint.kernels.snap import MX_BLOCK, snap_blocks_across, snap_blocks_along, snap_run
from mezzotint.kernels.team import counter, take_thread, take_unit, task
from mezzotint.kernels.tiles import (
    COLUMNS,
    LANES,
    ROWS,
    multiply_by_columns,
    multiply_by_rows,
    transpose_bfloat16,
    transpose_float16,
    transpose_float32,
)

DEPTH = 384
ROW_BLOCKS = (96, 48)  # multiples of ROWS and LANES whatever the processor
COLUMN_BLOCK = 512

# The places of a block's words: three counters, then what the product is of; strides are in elements. The scale of an
# operand multiplies the result and its inverse the numbers before they are rounded to the format of the target array;
# the top of an MX format, the exponent of its largest number, is 1000 where there are no blocks.
# fmt: off
(_UNIT, _THREAD, _PACK_UNIT,
 _BATCH, _M, _N, _K,
 _LEFT, _LEFT_KIND, _LEFT_BATCH, _LEFT_STRIDE, _LEFT_BY_ROWS,
 _LEFT_SCALE, _LEFT_SCALE_STEP, _LEFT_INVERSE, _LEFT_TARGET, _LEFT_TOP,
 _RIGHT, _RIGHT_KIND, _RIGHT_BATCH, _RIGHT_STRIDE, _RIGHT_BY_ROWS,
 _RIGHT_SCALE, _RIGHT_SCALE_STEP, _RIGHT_INVERSE, _RIGHT_TARGET, _RIGHT_TOP,
 _PACKED, _PACKED_DEPTH, _OUT, _OUT_KIND, _OUT_BATCH, _OUT_STRIDE, _IS_TRANSPOSED, _BIAS,
 _SCRATCH, _SCRATCH_BYTES, _ROW_BLOCK, _COLUMN_BLOCK) = range(39)
# fmt: on
_NUM_WORDS = 39
NO_BLOCKS = 1000
_take_pack_unit = counter(_PACK_UNIT)
_f32 = np.float32


def packed_floats(batch: int, width: int, depth: int) -> int:
    """Return how many float32 the packed right operand takes; its depth is `packed_depth` of the true one."""
    return batch * -(-width // COLUMNS) * COLUMNS * depth


def packed_depth(depth: int) -> int:
    """Return the depth that is packed: whole blocks of MX formats."""
    return -(-depth // MX_BLOCK) * MX_BLOCK


def scratch_floats(row_block: int, column_block: int) -> int:
    """Return how many float32 a thread needs: packed rows, the sums of a block, rows of their transpose, a vector."""
    return row_block * (DEPTH + column_block) + LANES * (row_block + LANES) + LANES


@compiled
def _transpose(kind, source, source_bytes, out, out_bytes):
    if kind == FLOAT16:
        transpose_float16(source, source_bytes, out, out_bytes)
    elif kind == FLOAT32:
        transpose_float32(source, source_bytes, out, out_bytes)
    else:
        transpose_bfloat16(source, source_bytes, out, out_bytes)


@compiled
def _widen_across(kind, source, stride, out, out_stride, rows, columns):
    """Write the words at source[i * stride + j], i < rows, j < columns, as float32 at out[j * out_stride + i]."""
    size = size_of(kind)
    whole_rows, whole_columns = rows - rows % LANES, columns - columns % LANES
    for i in range(0, whole_rows, LANES):
        for j in range(0, whole_columns, LANES):
            place, target = source + size * (i * stride + j), out + 4 * (j * out_stride + i)
            _transpose(kind, place, size * stride, target, 4 * out_stride)
    for i in range(rows):
        first = whole_columns if i < whole_rows else 0
        if first < columns:
            numbers = carray(floats_at(out + 4 * i), ((columns - 1) * out_stride + 1,))
            for j in range(first, columns):
                numbers[j * out_stride] = number_at(kind, source + size * i * stride, j)


@compiled
def _pack_strip(words, unit):
    """Pack one strip of the right operand, out[k * COLUMNS + n], with zeros beyond the last column."""
    kind, width, depth, stride = words[_RIGHT_KIND], words[_N], words[_K], words[_RIGHT_STRIDE]
    size = size_of(kind)
    num_strips = (width + COLUMNS - 1) // COLUMNS
    out = words[_PACKED] + 4 * unit * words[_PACKED_DEPTH] * COLUMNS
    first = unit % num_strips * COLUMNS
    columns = min(COLUMNS, width - first)
    right = words[_RIGHT] + size * (unit // num_strips * words[_RIGHT_BATCH])
    if columns < COLUMNS:
        fill_zeros(out, depth * COLUMNS)
    fill_zeros(out + 4 * depth * COLUMNS, (words[_PACKED_DEPTH] - depth) * COLUMNS)
    if words[_RIGHT_BY_ROWS]:
        for k in range(depth):
            widen_run(kind, right + size * (k * stride + first), out + 4 * k * COLUMNS, columns)
    else:
        _widen_across(kind, right + size * first * stride, stride, out, COLUMNS, columns, depth)
    target, inverse = words[_RIGHT_TARGET], words[_RIGHT_INVERSE]
    if target and words[_RIGHT_TOP] != NO_BLOCKS:
        snap_blocks_across(out, 4 * COLUMNS, COLUMNS, depth, target, words[_RIGHT_TOP])
    elif target and inverse and words[_RIGHT_SCALE_STEP]:
        # scales are there for whole strips
        for k in range(depth):
            snap_run(out + 4 * k * COLUMNS, COLUMNS, target, _f32(1), inverse + 4 * first)
    elif target:
        snap_run(out, depth * COLUMNS, target, number_at(FLOAT32, inverse, 0) if inverse else _f32(1), 0)


@compiled
def _snap_rows(words, rows_at, first_row, rows, count):
    """Round the packed rows to the format of the left operand."""
    target, inverse, step = words[_LEFT_TARGET], words[_LEFT_INVERSE], words[_LEFT_SCALE_STEP]
    row_block, has_blocks = words[_ROW_BLOCK], words[_LEFT_TOP] != NO_BLOCKS
    whole = (count + MX_BLOCK - 1) // MX_BLOCK * MX_BLOCK
    if words[_LEFT_BY_ROWS]:
        for m in range(rows):
            run = rows_at + 4 * m * DEPTH
            if has_blocks:
                fill_zeros(run + 4 * count, whole - count)
                snap_blocks_along(run, count, target, words[_LEFT_TOP])
            else:
                scale = number_at(FLOAT32, inverse, (first_row + m) * step) if inverse else _f32(1)
                snap_run(run, count, target, scale, 0)
    elif has_blocks:
        fill_zeros(rows_at + 4 * count * row_block, (whole - count) * row_block)
        snap_blocks_across(rows_at, 4 * row_block, rows, count, target, words[_LEFT_TOP])
    else:
        scale = number_at(FLOAT32, inverse, 0) if inverse else _f32(1)
        for k in range(count):
            # scales are there for whole vectors
            snap_run(rows_at + 4 * k * row_block, rows, target, scale, inverse + 4 * first_row if step else 0)


@compiled
def _sum_block(words, left, packed, first_row, rows, columns, rows_at, sums_at):
    """Write left times right for one block, whose rows start at `left` and whose packed strips at `packed`."""
    kind, depth, stride, is_by_rows = words[_LEFT_KIND], words[_K], words[_LEFT_STRIDE], words[_LEFT_BY_ROWS]
    size = size_of(kind)
    row_block, column_block = words[_ROW_BLOCK], words[_COLUMN_BLOCK]
    num_panels, num_strips = (rows + ROWS - 1) // ROWS, (columns + COLUMNS - 1) // COLUMNS
    for start in range(0, depth, DEPTH):
        count = min(DEPTH, depth - start)
        # what a panel holds beyond the last row is multiplied and never stored, so it may be anything
        if is_by_rows:
            for m in range(rows):
                widen_run(kind, left + size * (m * stride + start), rows_at + 4 * m * DEPTH, count)
        else:
            for k in range(count):
                widen_run(kind, left + size * (start + k) * stride, rows_at + 4 * k * row_block, rows)
        if words[_LEFT_TARGET]:
            _snap_rows(words, rows_at, first_row, rows, count)
        for strip in range(num_strips):
            right = packed + 4 * COLUMNS * (strip * words[_PACKED_DEPTH] + start)
            for panel in range(num_panels):
                sums = sums_at + 4 * (panel * ROWS * column_block + strip * COLUMNS)
                if is_by_rows:
                    panel_at = rows_at + 4 * panel * ROWS * DEPTH
                    multiply_by_rows(panel_at, right, sums, count, DEPTH, column_block, start == 0)
                else:
                    panel_at = rows_at + 4 * panel * ROWS
                    multiply_by_columns(panel_at, right, sums, count, row_block, column_block, start == 0)


@compiled
def _finish(sums, count, scale, scale_step, other_scale, bias):
    """Turn sums into the result before it is rounded: times the scales of both operands, plus the bias."""
    numbers = carray(floats_at(sums), (count,))
    if scale and scale_step:
        factors = carray(floats_at(scale), (count,))
        for i in range(count):
            numbers[i] *= factors[i] * other_scale
    else:
        factor = _f32(number_at(FLOAT32, scale, 0) * other_scale) if scale else other_scale
        if factor != _f32(1):
            for i in range(count):
                numbers[i] *= factor
    if bias:
        added = carray(floats_at(bias), (count,))
        for i in range(count):
            numbers[i] += added[i]


@compiled
def _scale_of(words, place, index):
    """Return the scale of one row or column; 1 where there are none."""
    at = words[place]
    return carray(floats_at(at + 4 * index * words[place + 1]), (1,))[0] if at else _f32(1)


@compiled
def _store_rows(words, sums_at, spare_at, out, rows, columns, first_row, first_column):
    kind, column_block = words[_OUT_KIND], words[_COLUMN_BLOCK]
    size, step = size_of(kind), words[_RIGHT_SCALE_STEP]
    scale = words[_RIGHT_SCALE] + 4 * first_column * step if words[_RIGHT_SCALE] else 0
    bias = words[_BIAS] + 4 * first_column if words[_BIAS] else 0
    for m in range(rows):
        sums = sums_at + 4 * m * column_block
        _finish(sums, columns, scale, step, _scale_of(words, _LEFT_SCALE, first_row + m), bias)
        narrow_run(kind, sums, out + size * m * words[_OUT_STRIDE], columns, spare_at)


@compiled
def _store_columns(words, sums_at, turned_at, spare_at, out, rows, columns, first_row, first_column):
    """Store the transpose: a column of sums becomes a row of `out`."""
    kind, column_block = words[_OUT_KIND], words[_COLUMN_BLOCK]
    size, step = size_of(kind), words[_LEFT_SCALE_STEP]
    scale = words[_LEFT_SCALE] + 4 * first_row * step if words[_LEFT_SCALE] else 0
    bias = words[_BIAS] + 4 * first_row if words[_BIAS] else 0
    width = words[_ROW_BLOCK] + LANES
    for n in range(0, columns, LANES):
        for m in range(0, rows, LANES):  # sums beyond the last row and column are there, and worthless
            transpose_float32(sums_at + 4 * (m * column_block + n), 4 * column_block, turned_at + 4 * m, 4 * width)
        for i in range(min(LANES, columns - n)):
            turned = turned_at + 4 * i * width
            _finish(turned, rows, scale, step, _scale_of(words, _RIGHT_SCALE, first_column + n + i), bias)
            narrow_run(kind, turned, out + size * (n + i) * words[_OUT_STRIDE], rows, spare_at)


@task
def pack(block):
    """Pack the right operand, strip by strip."""
    words = carray(block, (_NUM_WORDS,))
    num_strips = words[_BATCH] * ((words[_N] + COLUMNS - 1) // COLUMNS)
    while True:
        unit = _take_pack_unit(block)
        if unit >= num_strips:
            break
        _pack_strip(words, unit)


@task
def product(block):
    """Compute block after block from the packed operand."""
    words = carray(block, (_NUM_WORDS,))
    batch, height, width = words[_BATCH], words[_M], words[_N]
    row_block, column_block = words[_ROW_BLOCK], words[_COLUMN_BLOCK]
    num_strips = (width + COLUMNS - 1) // COLUMNS
    rows_at = words[_SCRATCH] + take_thread(block) * words[_SCRATCH_BYTES]
    sums_at = rows_at + 4 * row_block * DEPTH
    turned_at = sums_at + 4 * row_block * column_block
    spare_at = turned_at + 4 * LANES * (row_block + LANES)
    num_row_blocks = (height + row_block - 1) // row_block
    num_blocks = num_row_blocks * ((width + column_block - 1) // column_block)
    row_words = 1 if words[_LEFT_BY_ROWS] == 0 else words[_LEFT_STRIDE]
    while True:
        unit = take_unit(block)
        if unit >= batch * num_blocks:
            break
        item, place = unit // num_blocks, unit % num_blocks
        first_row, first_column = place % num_row_blocks * row_block, place // num_row_blocks * column_block
        rows, columns = min(row_block, height - first_row), min(column_block, width - first_column)
        left = words[_LEFT] + size_of(words[_LEFT_KIND]) * (item * words[_LEFT_BATCH] + first_row * row_words)
        packed = words[_PACKED] + 4 * COLUMNS * words[_PACKED_DEPTH] * (item * num_strips + first_column // COLUMNS)
        _sum_block(words, left, packed, first_row, rows, columns, rows_at, sums_at)
        size = size_of(words[_OUT_KIND])
        out = words[_OUT] + size * item * words[_OUT_BATCH]
        if words[_IS_TRANSPOSED]:
            out += size * (first_column * words[_OUT_STRIDE] + first_row)
            _store_columns(words, sums_at, turned_at, spare_at, out, rows, columns, first_row, first_column)
        else:
            out += size * (first_row * words[_OUT_STRIDE] + first_column)
            _store_rows(words, sums_at, spare_at, out, rows, columns, first_row, first_column)
