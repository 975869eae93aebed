"""`torch.save` and `torch.load` with tensors that have no numbers: they are kept in memory, and no file is written."""

import copy
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from mezzotint.patches import Patches
from mezzotint.torch_internals.dispatch import disable_current_modes, disable_torch_function
from mezzotint.torch_internals.fake import FakeTensor
from mezzotint.torch_internals.tensors import storage_number

NOTE = "torch.save kept ghosts in memory and wrote no file: they have no numbers"


class Checkpoints:
    """What was saved, by path, or by the file object itself, which it keeps alive."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._saved: dict[Any, Any] = {}

    def patch(self, patches: Patches) -> None:
        """Replace both."""
        patches.wrap(torch, "save", self._save)
        patches.wrap(torch, "load", self._load)

    def _save(self, original: Any, value: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_ghost(value):
            return original(value, target, *args, **kwargs)
        self._saved[_key(target)] = copy.deepcopy(value)
        if NOTE not in self._notes:
            self._notes.append(NOTE)
        return None

    def _load(self, original: Any, source: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        key = _key(source)
        if key in self._saved:
            value = copy.deepcopy(self._saved[key])
            return _moved(value, lambda one: _place(map_location, str(one.device), None))
        # read it to the CPU as if there were no ghost, and move what belongs on the card
        places: dict[int, tuple[Any, str]] = {}

        def keep(storage: Any, location: str) -> Any:
            places[storage_number(storage)] = storage, location
            return storage

        with disable_current_modes(), disable_torch_function():
            value = original(source, keep, *args, **kwargs)

        def target(one: Tensor) -> Any:
            storage, location = places.get(storage_number(one.untyped_storage()), (None, "cpu"))
            return _place(map_location, location, storage)

        return _moved(value, target)


def _key(target: Any) -> Any:
    return str(target) if isinstance(target, (str, PathLike)) else target


def _place(map_location: Any, location: str, storage: Any) -> Any:
    """Return the device that `map_location` wants for something that was saved from `location`."""
    if map_location is None:
        return location
    if isinstance(map_location, Mapping):
        return map_location.get(location, location)
    if isinstance(map_location, int):
        return torch.device("cuda", map_location)
    if not callable(map_location):
        return map_location
    try:
        found = map_location(storage, location)
    except (RuntimeError, AssertionError, AttributeError):  # it asked for a GPU's storage
        return "cuda"
    return location if found is None else found.device


def _moved(value: Any, target: Callable[[Tensor], Any]) -> Any:
    """Return a value with its tensors where they belong."""
    if isinstance(value, torch.nn.Module):
        for one in (*value.parameters(), *value.buffers()):
            return value.to(target(one))
        return value
    if isinstance(value, Tensor):
        device = torch.device(target(value))
        return (
            value if value.device.type == device.type else value.detach().to(device).requires_grad_(value.requires_grad)
        )
    if isinstance(value, dict):
        for key in value:
            value[key] = _moved(value[key], target)
        return value
    if isinstance(value, list):
        return [_moved(one, target) for one in value]
    if type(value) is tuple:
        return tuple(_moved(one, target) for one in value)
    return value


def _has_ghost(value: Any) -> bool:
    """Whether there is a tensor without numbers in a checkpoint."""
    if isinstance(value, Tensor):
        return isinstance(value, FakeTensor)
    if isinstance(value, Mapping):
        return any(_has_ghost(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_ghost(one) for one in value)
    if isinstance(value, torch.nn.Module):
        return any(_has_ghost(one) for one in (*value.parameters(), *value.buffers()))
    return hasattr(value, "__dict__") and any(_has_ghost(one) for one in vars(value).values() if one is not value)
