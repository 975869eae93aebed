"""The card's L2 cache: which operands of an operation are still in it from the operations before.

A tensor is in the cache if what was moved since its last use, and itself, are less than a share of its size: memory
that is streamed through pushes out more than a perfect cache would lose.
"""

from mezzotint.hardware.devices import DeviceSpec
from mezzotint.trace.record import UNKNOWN, Operation

_SHARE = 0.6  # of the cache that a stream of tensors can use
_WRITTEN = 0.25  # results up to this share are taken to be written in the cache, their memory being used again at once


class Cache:
    """Follows the operations of a step in order."""

    def __init__(self, card: DeviceSpec) -> None:
        self._size = card.l2_bytes or 0
        self._moved = 0
        self._last: dict[int, int] = {}

    def hits(self, operation: Operation) -> int:
        """Return how many of an operation's bytes the cache serves, and remember its operands and results."""
        call = operation.call
        found = 0
        for meta, producer in zip(call.inputs, operation.producers, strict=False):
            if producer == UNKNOWN:
                self._moved += meta.nbytes
                continue
            last = self._last.get(producer)
            if last is not None and self._moved - last + meta.nbytes <= _SHARE * self._size:
                found += meta.nbytes
            else:
                self._moved += meta.nbytes
            self._last[producer] = self._moved
        for meta in call.outputs:
            if meta.nbytes <= _WRITTEN * self._size:
                found += meta.nbytes
        self._moved += sum(meta.nbytes for meta in call.outputs)
        self._last[operation.index] = self._moved
        return found
