"""Passes over rows: words become numbers and numbers words as torch's casts have it, and no number is left out."""

from typing import Any

import numba
import pytest
import torch
from inputs import all_sorts, critical, same
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from mezzotint.formats.catalog import find_format
from mezzotint.kernels.constants import BFLOAT16, FLOAT16, FLOAT32
from mezzotint.kernels.rows import Vectors, walk

KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}


def copying(source_kind: int, out_kind: int) -> Any:
    @intrinsic
    def step(_context: Any, source: Any, out: Any, count: Any) -> Any:
        """Copy a row, and return its sum and that of its squares, added."""

        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            def body(vectors: Vectors, sums: list[Any]) -> list[Any]:
                number = vectors.read(args[0], source_kind)
                vectors.write(args[1], out_kind, number)
                return [vectors.add(sums[0], number), vectors.multiply_add(number, number, sums[1])]

            return builder.fadd(*walk(builder, args[2], body, num_sums=2))

        return types.float32(types.int64, types.int64, types.int64), generate

    # not cached: the machine code follows from another file, too, of which numba's cache does not know
    def copy(source, out, count):
        return step(source, out, count)

    return numba.njit(copy)


COPY = {(one, other): copying(KINDS[one], KINDS[other]) for one in KINDS for other in KINDS}


def copied(source: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(source.shape, dtype=dtype)
    COPY[source.dtype, dtype](source.data_ptr(), out.data_ptr(), source.numel())
    return out


@pytest.mark.parametrize("dtype", KINDS)
def test_float32_is_rounded_as_torch_rounds_it(dtype: torch.dtype) -> None:
    """All ties, all ends of the range, and NaN of any bits."""
    numbers = torch.cat((critical(find_format(str(dtype).removeprefix("torch."))), all_sorts()))
    assert same(copied(numbers, dtype).float(), numbers.to(dtype).float())
    # one at a time, which is another body of code
    ones = torch.stack([copied(number[None], dtype)[0] for number in numbers[:: len(numbers) // 500]])
    assert same(ones.float(), numbers[:: len(numbers) // 500].to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_word_of_sixteen_bits_is_read_and_written_back(dtype: torch.dtype) -> None:
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert same(copied(words, torch.float32), words.float())
    assert same(copied(words, dtype).float(), words.float())


@pytest.mark.parametrize("dtype", KINDS)
def test_a_row_of_any_length_is_walked_once_and_no_further(dtype: torch.dtype) -> None:
    """Whole numbers up to 7, whose sums float32 holds exactly in any order."""
    numbers = torch.arange(1, 300).remainder(7).sub(3).to(dtype)
    for count in range(260):
        out = torch.full((300,), 99.0, dtype=dtype)
        total = COPY[dtype, dtype](numbers.data_ptr(), out.data_ptr(), count)
        assert torch.equal(out[:count], numbers[:count])
        assert bool((out[count:] == 99).all())
        exact = numbers[:count].double()
        assert total == exact.sum() + exact.square().sum()


def test_a_long_sum_of_equal_terms_keeps_the_digits_that_one_running_sum_loses() -> None:
    """n / 64 + 16 roundings of a term at most, and one of the two sums' sum."""
    count = 1 << 20
    tenths, out = torch.full((count,), 0.1), torch.empty(count)
    total = COPY[torch.float32, torch.float32](tenths.data_ptr(), out.data_ptr(), count)
    tenth, bound = float(tenths[0]), (count / 64 + 17) * 2**-24
    assert abs(total - count * (tenth + tenth**2)) <= bound * count * (tenth + tenth**2)
    running = tenths.numpy().cumsum(dtype="float32")[-1]
    assert abs(running - count * tenth) > bound * count * tenth
