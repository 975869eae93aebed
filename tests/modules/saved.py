"""What autograd keeps for backward, as a memory profiler counts it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], Any], parameters: tuple[Tensor, ...] = ()) -> int:
    """Return the bytes of all storages that `run` saves for backward, each once, those of parameters not counted."""
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor.detach())  # so that no address is used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    for parameter in parameters:
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return sum(storages.values())
