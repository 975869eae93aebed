"""PyTorch's caching allocator, simulated: allocations and releases in, allocated and reserved bytes out.

Sizes are rounded to 512 bytes. Up to 1 MiB come from segments of 2 MiB, below 10 MiB from segments of 20 MiB, larger
ones from segments of their own, rounded to 2 MiB. The smallest free block that is large enough is taken, split if the
rest is worth keeping (512 bytes, or more than 1 MiB in a large block), and merged with free neighbours on release.
Segments are given back only where memory runs out. (c10/cuda/CUDACachingAllocator.cpp, torch 2.13, default settings.)
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

MIB = 1 << 20
_BLOCK = 512
_SMALL = MIB
_SMALL_SEGMENT = 2 * MIB
_LARGE = 10 * MIB
_LARGE_SEGMENT = 20 * MIB
_ROUND = 2 * MIB


class OutOfMemoryError(Exception):
    """The card has no room for an allocation, even with every unused segment given back."""


@dataclass(slots=True, eq=False)
class _Block:
    address: int
    size: int
    is_small: bool
    is_free: bool
    before: "_Block | None" = None
    after: "_Block | None" = None


class CachingAllocator:
    """The allocator of one card. `capacity` in bytes limits what is reserved; None is without limit.

    `allocated` and `reserved` are bytes now, `peak_allocated` and `peak_reserved` the most so far, as
    `torch.cuda.memory_allocated`, `memory_reserved` and their maxima would say.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.capacity = capacity
        self.allocated = 0
        self.reserved = 0
        self.peak_allocated = 0
        self.peak_reserved = 0
        self.num_retries = 0
        self._blocks: dict[int, _Block] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        self._at: dict[int, _Block] = {}  # free blocks by address
        self._next_address = 0

    def allocate(self, key: int, nbytes: int) -> None:
        """Allocate `nbytes` under a key of the caller's. Raises OutOfMemoryError."""
        size = max(_BLOCK, -(-nbytes // _BLOCK) * _BLOCK)
        is_small = size <= _SMALL
        block = self._best_fit(size, is_small) or self._new_segment(size, is_small)
        rest = block.size - size
        if rest >= _BLOCK if is_small else rest > _SMALL:
            self._split(block, size)
        block.is_free = False
        self._blocks[key] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def release(self, key: int) -> None:
        """Release what was allocated under a key."""
        block = self._blocks.pop(key)
        self.allocated -= block.size
        block.is_free = True
        for neighbour in (block.before, block.after):
            if neighbour is not None and neighbour.is_free:
                self._take(neighbour)
        before, after = block.before, block.after
        if before is not None and before.is_free:
            block.address, block.size, block.before = before.address, before.size + block.size, before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.is_free:
            block.size, block.after = block.size + after.size, after.after
            if block.after is not None:
                block.after.before = block
        self._put(block)

    def reset_peaks(self) -> None:
        """Start the maxima anew from what is in use now."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def empty_cache(self) -> None:
        """Give back every segment that nothing uses."""
        for block in [one for one in self._at.values() if one.before is None and one.after is None]:
            self._take(block)
            self.reserved -= block.size

    def size_of(self, key: int) -> int:
        """Return the bytes of the block that a key holds."""
        return self._blocks[key].size

    def _best_fit(self, size: int, is_small: bool) -> _Block | None:
        pool = self._free[is_small]
        place = bisect_left(pool, (size, -1))
        if place == len(pool):
            return None
        block = self._at[pool[place][1]]
        self._take(block)
        return block

    def _new_segment(self, size: int, is_small: bool) -> _Block:
        wanted = _SMALL_SEGMENT if is_small else _LARGE_SEGMENT if size < _LARGE else -(-size // _ROUND) * _ROUND
        if self.capacity is not None and self.reserved + wanted > self.capacity:
            self.num_retries += 1
            self.empty_cache()
            if self.reserved + wanted > self.capacity:
                raise OutOfMemoryError
        self.reserved += wanted
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        block = _Block(self._next_address, wanted, is_small, False)
        self._next_address += wanted
        return block

    def _split(self, block: _Block, size: int) -> None:
        rest = _Block(block.address + size, block.size - size, block.is_small, True, block, block.after)
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        self._put(rest)

    def _put(self, block: _Block) -> None:
        insort(self._free[block.is_small], (block.size, block.address))
        self._at[block.address] = block

    def _take(self, block: _Block) -> None:
        pool = self._free[block.is_small]
        del pool[bisect_left(pool, (block.size, block.address))]
        del self._at[block.address]
