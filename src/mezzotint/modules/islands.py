"""Float32 islands: modules that autocast leaves alone, with everything below them.

An island's call runs with autocast off and takes its low-precision inputs as float32; its output stays float32, as that
of an operation on autocast's own float32 list does. It is a pair of hooks, so that the module stays what it is: it is
copied, pickled and checkpointed as before, and a recomputation in backward enters the island again.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mezzotint.errors import PolicyError

_LOW = (torch.bfloat16, torch.float16)


def find_modules(models: Mapping[str, nn.Module], patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules that the patterns name, by path, the outermost where one lies in another.

    With one model, paths are relative to it; with several, they begin with the model's name. Raises PolicyError for a
    pattern that names nothing.
    """
    paths = dict(_paths(models))
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        named = {path: module for path, module in paths.items() if fnmatchcase(path, pattern)}
        if not named:
            near = get_close_matches(pattern, paths, n=3, cutoff=0.3) or list(paths)[:3]
            raise PolicyError(f"keep={pattern} names no module of the model; did you mean {' or '.join(near)}?")
        found.update(named)
    return {path: module for path, module in found.items() if not any(path.startswith(f"{other}.") for other in found)}


def _paths(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, model in models.items():
        for path, module in model.named_modules():
            if path:
                yield (path if len(models) == 1 else f"{name}.{path}"), module


class Island:
    """The hooks of one module; copies and pickles of the module carry them along."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._local = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle without the state of calls under way."""
        return Island, (self._device_type,)

    def enter(self, _module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Switch autocast off and widen what goes in; leave calls outside autocast alone."""
        region = None
        if torch.is_autocast_enabled(self._device_type):
            region = torch.autocast(self._device_type, enabled=False)
            region.__enter__()  # type: ignore[no-untyped-call]
        self._regions().append(region)
        return None if region is None else (widened(args), widened(kwargs))

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Let autocast go on."""
        regions = self._regions()
        region = regions.pop() if regions else None
        if region is not None:
            region.__exit__(None, None, None)

    def _regions(self) -> list[Any]:
        regions: list[Any] | None = getattr(self._local, "regions", None)
        if regions is None:
            regions = self._local.regions = []
        return regions


def make_islands(modules: Iterable[nn.Module], device_type: str) -> list[RemovableHandle]:
    """Make islands of these modules, and return the handles that end them."""
    handles = []
    for module in modules:
        island = Island(device_type)
        handles.append(module.register_forward_pre_hook(island.enter, with_kwargs=True))
        handles.append(module.register_forward_hook(island.leave, always_call=True))
    return handles


def widened(value: Any) -> Any:
    """Return `value` with low-precision tensors in float32, in tuples, lists and mappings too."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _LOW else value
    if isinstance(value, tuple):
        items = [widened(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [widened(item) for item in value]
    if isinstance(value, dict):
        return {key: widened(item) for key, item in value.items()}
    return value
