"""Products by the compiled kernel that converts while it packs (`mezzotint.kernels.gemm`).

Each Python thread keeps its scratch memory, on huge pages where the system has them, as MKL does: from malloc, on small
pages, a step took 1.07 of float32's time where it now takes 0.99 (two threads). What is too large to keep comes from
torch, so that memory profilers see it.
"""

import contextlib
import mmap
import threading
from array import array
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mezzotint.kernels.constants import BFLOAT16, FLOAT16, FLOAT32
from mezzotint.kernels.memory import is_plain

_KINDS = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}
# Below so many multiplications torch's own kernel on converted operands costs less than preparing the call here.
SMALLEST = 1 << 19
THINNEST = 8
# The packed operand is in float32 and whole; beyond this size upcasting holds no more.
LARGEST_PACKED_FLOATS = 1 << 26
LARGEST_KEPT_FLOATS = 1 << 23
HUGE_PAGE_BYTES = 1 << 21
# Transposing the result costs less than packing an operand so many times larger than the other.
SWAP_FROM = 4


@cache
def _gemm() -> Any:
    """Return the compiled kernel's module; importing it takes half a second, so it waits for the first call."""
    from mezzotint.kernels import gemm

    return gemm


@cache
def is_available(dtype: torch.dtype, num_threads: int) -> bool:
    """Return whether products of a dtype can be computed here on so many threads."""
    from mezzotint.kernels import team, tiles

    has_conversion = dtype is not torch.float16 or tiles.HAS_HALF
    return tiles.HAS_FMA and has_conversion and (num_threads == 1 or team.has_team())


def product(
    left: Tensor,
    right: Tensor,
    bias: Tensor | None = None,
    *,
    left_how: "Snap | None" = None,
    right_how: "Snap | None" = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor | None:
    """Return left @ right, plus bias, summed in float32 and rounded once; None where it is not for us.

    `left` is (M, K) or (B, M, K), `right` (K, N) or (B, K, N), each dense along one of the last two axes, of bfloat16,
    float16 or float32; `bias` has N. `left_how` and `right_how` round the numbers of an operand before they are
    multiplied. The result is of `out_dtype`, or the operands' where that is left out.
    """
    *batch, height, depth = left.shape
    width = right.shape[-1]
    count = batch[0] if batch else 1
    if count * height * width * depth < SMALLEST or min(height, width) < THINNEST:
        return None
    num_threads = torch.get_num_threads()
    dtype = out_dtype or left.dtype
    if not (is_available(left.dtype, num_threads) and is_available(dtype, num_threads)):
        return None
    if not (is_plain(left) and is_plain(right)):
        return None
    layouts = _layout(left), _layout(right)
    if layouts[0] is None or layouts[1] is None:
        return None
    gemm = _gemm()
    out = torch.empty((*batch, height, width), dtype=dtype)
    is_swapped = height * SWAP_FROM <= width
    # the tensors behind the addresses have to live until the product is done
    bias = None if bias is None else bias.float().contiguous()
    kept: list[Tensor] = []
    first: tuple[int, ...] = (left.data_ptr(), _KINDS[left.dtype], *layouts[0], *_snapped(gemm, left_how, kept))
    second: tuple[int, ...] = (right.data_ptr(), _KINDS[right.dtype], *layouts[1], *_snapped(gemm, right_how, kept))
    if is_swapped:
        # out^T = right^T left^T: what was stored by rows is now by columns
        height, width = width, height
        first, second = _turned(second), _turned(first)
    packed_depth = depth if left_how is None is right_how else gemm.packed_depth(depth)
    packed_floats = gemm.packed_floats(count, width, packed_depth)
    if packed_floats > LARGEST_PACKED_FLOATS:
        return None
    row_block, column_block = _blocks(gemm, count, height, width, num_threads)
    scratch_floats = gemm.scratch_floats(row_block, column_block)
    scratch = _workspace(packed_floats + num_threads * scratch_floats)
    packed = scratch.data_ptr()
    block = array(
        "q",
        (
            *(0, 0, 0, count, height, width, depth, *first, *second, packed, packed_depth),
            *(out.data_ptr(), _KINDS[dtype], out.stride(0) if batch else 0, out.shape[-1], is_swapped),
            *(0 if bias is None else bias.data_ptr(), packed + 4 * packed_floats, 4 * scratch_floats),
            *(row_block, column_block),
        ),
    )
    address = block.buffer_info()[0]
    # two regions, as a team that waits inside one spins on its cores, also beside a busy neighbour
    _run(gemm.pack, address, num_threads)
    _run(gemm.product, address, num_threads)
    return out


class Snap(NamedTuple):
    """How the numbers of an operand are rounded while they are packed, to nearest even.

    `target` is the address of the format's array, or 0 for no rounding; `top` the exponent of the largest number of an
    MX format, whose blocks lie along the summed axis. `scale`, float32, multiplies the numbers before, and divides the
    result: one for all, or one for each row of a left operand or column of a right one.
    """

    target: int
    top: int | None = None
    scale: Tensor | None = None


def _snapped(gemm: Any, how: Snap | None, kept: list[Tensor]) -> tuple[int, ...]:
    """Return the words of an operand's rounding; tensors behind addresses go into `kept`."""
    if how is None:
        return 0, 0, 0, 0, gemm.NO_BLOCKS
    top = gemm.NO_BLOCKS if how.top is None else how.top
    if how.scale is None:
        return 0, 0, 0, how.target, top
    before, after = how.scale, how.scale.reciprocal()
    if how.target and before.numel() > 1:
        before = torch.nn.functional.pad(before, (0, gemm.COLUMNS))  # read in whole vectors
    kept += (before, after)
    return after.data_ptr(), int(after.numel() > 1), before.data_ptr(), how.target, top


def _turned(operand: tuple[int, ...]) -> tuple[int, ...]:
    """Return an operand's words for its transpose."""
    address, kind, batch, stride, is_by_rows, *how = operand
    return address, kind, batch, stride, 1 - is_by_rows, *how


_kept = threading.local()


def _workspace(num_floats: int) -> Tensor:
    """Return at least so many float32 of scratch memory; what was in it before is lost."""
    if num_floats > LARGEST_KEPT_FLOATS:
        return torch.empty(num_floats, dtype=torch.float32)
    kept: Tensor | None = getattr(_kept, "workspace", None)
    if kept is None or kept.numel() < num_floats:
        num_bytes = -(-4 * num_floats // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        # private, as Python's default would share it with forked processes that compute at the same time
        is_posix = hasattr(mmap, "MAP_PRIVATE")
        pages = (
            mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if is_posix else mmap.mmap(-1, num_bytes)
        )
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                pages.madvise(mmap.MADV_HUGEPAGE)
        kept = _kept.workspace = torch.frombuffer(pages, dtype=torch.float32)
    return kept


def _blocks(gemm: Any, count: int, height: int, width: int, num_threads: int) -> tuple[int, int]:
    """Return the sizes of a block: large ones read less often, small ones keep all threads busy."""
    column_block = min(gemm.COLUMN_BLOCK, -(-width // gemm.COLUMNS) * gemm.COLUMNS)
    largest, smallest = gemm.ROW_BLOCKS
    num_blocks = count * -(-height // largest) * -(-width // column_block)
    return (largest if num_threads == 1 or num_blocks >= 4 * num_threads else smallest), column_block


def _layout(matrix: Tensor) -> tuple[int, int, int] | None:
    """Return strides of batch and lines, and whether lines are rows; None where neither axis is dense.

    Lines may overlap or be one and the same, as in expanded tensors: they are only read.
    """
    stride = matrix.stride()
    rows, columns = stride[-2:]
    batch = stride[0] if len(stride) == 3 else 0
    if columns == 1 or matrix.shape[-1] == 1:
        return batch, rows, 1
    if rows == 1 or matrix.shape[-2] == 1:
        return batch, columns, 0
    return None


def _run(task: Any, block: int, num_threads: int) -> None:
    from mezzotint.kernels.team import run

    run(task, block, num_threads)
