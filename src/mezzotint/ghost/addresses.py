"""Addresses of simulated tensors, for libraries that read the bytes of weights (safetensors, save_pretrained).

A simulated storage has no data. The first time somebody asks for its address it gets a private mapping of its size
that nothing backs: every byte reads as zero, addresses of different storages do not overlap, and no memory is used
until something is written.
"""

import ctypes
import mmap
import weakref
from typing import Any

import torch

from mezzotint.errors import GhostError
from mezzotint.ghost.values import Values, here
from mezzotint.patches import Patches
from mezzotint.torch_internals.dispatch import disable_torch_dispatch, disable_torch_function
from mezzotint.torch_internals.fake import FakeTensor
from mezzotint.torch_internals.tensors import storage_number

_NOTE = "the bytes of a tensor, taken for zeros"
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


class Addresses:
    """One mapping for each storage whose address was asked for."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._mapped: dict[int, tuple[int, int, Any]] = {}
        self._memory: list[mmap.mmap] = []  # pointers to it may outlive the storage

    def of_storage(self, storage: Any) -> int:
        """Return the address of a storage without data, 0 for an empty one. Raises GhostError where none is left."""
        nbytes = int(storage.nbytes())
        if not nbytes:
            return 0
        number = storage_number(storage)
        found = self._mapped.get(number)
        if found is None or found[0] < nbytes or found[2]() is None:
            try:
                memory = mmap.mmap(-1, nbytes, flags=_FLAGS)
            except (OSError, ValueError, OverflowError):
                raise GhostError(
                    f"{here()}the address of a simulated tensor of {nbytes:,} bytes was asked for, and no range "
                    "of addresses of that size is free; leave out the code that reads the bytes of tensors"
                ) from None
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            found = self._mapped[number] = nbytes, address, weakref.ref(storage)
            self._memory.append(memory)
            self._values.note(_NOTE)
        return found[1]

    def patch(self, patches: Patches) -> None:
        """Answer `data_ptr` of tensors and storages."""
        original = torch.UntypedStorage.data_ptr

        def of_any(storage: Any) -> int:
            return self.of_storage(storage) if storage.device.type == "meta" else int(original(storage))

        def of_tensor(tensor: Any) -> int:
            with disable_torch_dispatch(), disable_torch_function():
                if not tensor.numel():
                    return 0
                start = self.of_storage(tensor.untyped_storage())
                return start + int(tensor.storage_offset()) * int(tensor.element_size())

        patches.replace(torch.UntypedStorage, "data_ptr", of_any)
        patches.replace(FakeTensor, "data_ptr", of_tensor)
