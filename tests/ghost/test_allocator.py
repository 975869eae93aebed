"""The simulated caching allocator: its own laws, and sizes known from torch's documentation and source."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.ghost.allocator import MIB, CachingAllocator, OutOfMemoryError


def test_sizes_are_those_of_torch() -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, 1)
    assert (allocator.allocated, allocator.reserved) == (512, 2 * MIB)
    allocator.allocate(1, 2 * MIB)  # from a segment of 20 MiB
    assert (allocator.allocated, allocator.reserved) == (2 * MIB + 512, 22 * MIB)
    allocator.allocate(2, 19 * MIB + 1)  # a segment of its own, rounded to 2 MiB, and not worth splitting
    assert allocator.reserved == 42 * MIB
    assert allocator.size_of(2) == 20 * MIB
    allocator.allocate(3, 11 * MIB)  # what is left of the segment of 20 MiB serves
    assert allocator.reserved == 42 * MIB


def test_neighbours_merge_and_are_used_again() -> None:
    allocator = CachingAllocator()
    for key in range(4):
        allocator.allocate(key, 4 * MIB)
    for key in (1, 2):
        allocator.release(key)
    allocator.allocate(9, 8 * MIB)
    assert allocator.reserved == 20 * MIB
    assert allocator.allocated == 16 * MIB


def test_the_smallest_block_that_fits_is_taken() -> None:
    allocator = CachingAllocator()
    for key, size in enumerate((30, 12, 50)):
        allocator.allocate(key, size * MIB)
    for key in range(3):
        allocator.release(key)
    allocator.allocate(3, 12 * MIB)
    allocator.allocate(4, 50 * MIB)
    assert allocator.reserved == 92 * MIB


def test_unused_segments_are_given_back_before_memory_is_out() -> None:
    allocator = CachingAllocator(capacity=100 * MIB)
    allocator.allocate(0, 60 * MIB)
    allocator.release(0)
    allocator.allocate(1, 80 * MIB)
    assert (allocator.reserved, allocator.num_retries) == (80 * MIB, 1)
    with pytest.raises(OutOfMemoryError):
        allocator.allocate(2, 40 * MIB)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 64 * MIB)), max_size=120))
def test_laws(steps: list[tuple[bool, int]]) -> None:
    allocator = CachingAllocator()
    live: dict[int, int] = {}
    for key, (is_release, size) in enumerate(steps):
        if is_release and live:
            oldest = next(iter(live))
            allocator.release(oldest)
            del live[oldest]
        else:
            allocator.allocate(key, size)
            live[key] = size
        assert allocator.allocated == sum(allocator.size_of(one) for one in live)
        assert sum(live.values()) <= allocator.allocated <= allocator.reserved
        assert all(0 <= allocator.size_of(one) - size < 512 + MIB for one, size in live.items())
        assert allocator.peak_allocated >= allocator.allocated
    for one in list(live):
        allocator.release(one)
    assert allocator.allocated == 0
    allocator.empty_cache()
    assert allocator.reserved == 0
