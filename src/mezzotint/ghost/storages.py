"""When memory of the ghost GPU is allocated and freed, told by the lifetimes of storages.

A storage's Python object lives exactly as long as the C++ storage, so a weak reference to it says when it is freed:
autograd's own release of saved tensors, the end of autocast's weight cache, checkpointing and hooks need no special
case. Views share their storage and allocate nothing.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from mezzotint.torch_internals.tensors import storage_number


class MemoryEvent(NamedTuple):
    """One allocation (`nbytes` > 0) or release (`nbytes` < 0) of storage `storage`, at operation `operation`."""

    storage: int
    nbytes: int
    operation: int


class Storages:
    """The storages on the ghost GPU. `clock` returns the index of the operation under way."""

    def __init__(self) -> None:
        self.events: list[MemoryEvent] = []
        self.clock: Callable[[], int] = lambda: len(self.events)
        self.on_event: Callable[[MemoryEvent], None] | None = None
        self._live: dict[int, tuple[Any, int, int]] = {}  # address -> (weak reference, number, bytes)
        self._num_made = 0

    def see(self, tensor: Tensor) -> None:
        """Note the storage of an output; a storage that was seen before is no allocation."""
        storage = tensor.untyped_storage()
        address = storage_number(storage)
        nbytes = storage.nbytes()
        live = self._live.get(address)
        if live is not None and live[0]() is not None:
            if nbytes > live[2]:  # resized
                self._add(MemoryEvent(live[1], -live[2], self.clock()))
                self._live[address] = (live[0], live[1], nbytes)
                self._add(MemoryEvent(live[1], nbytes, self.clock()))
            return
        if not nbytes:
            return
        number = self._num_made
        self._num_made += 1
        reference = weakref.ref(storage, lambda _: self._freed(address, number))
        self._live[address] = (reference, number, nbytes)
        self._add(MemoryEvent(number, nbytes, self.clock()))

    def add_workspace(self, nbytes: int) -> None:
        """Note memory that a library takes once and keeps; it has the number -1."""
        self._add(MemoryEvent(-1, nbytes, self.clock()))

    def number_of(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage, None if it is not on the ghost GPU."""
        live = self._live.get(storage_number(tensor.untyped_storage()))
        return live[1] if live is not None else None

    def _freed(self, address: int, number: int) -> None:
        live = self._live.get(address)
        if live is None or live[1] != number:
            return
        del self._live[address]
        self._add(MemoryEvent(number, -live[2], self.clock()))

    def _add(self, event: MemoryEvent) -> None:
        self.events.append(event)
        if self.on_event is not None:
            self.on_event(event)
