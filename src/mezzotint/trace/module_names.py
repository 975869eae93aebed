"""The path of each module, as the user would write it: the variable that holds the model, then attribute names.

A wrapper that only passes calls on (DistributedDataParallel, torch.compile's) adds no segment of its own.
"""

from collections.abc import Mapping
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from mezzotint.torch_internals import tensors
from mezzotint.trace.variables import variables_of

_WRAPPED_BY = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}
_ANONYMOUS = frozenset({"self", "module", "mod", "input", "args", "_"})


class ModuleNames:
    """Names given so far; a module keeps its first one."""

    def __init__(self) -> None:
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
        self._taken: set[str] = set()
        self._classes: dict[str, str] = {}
        self._replicated: dict[type, str] = {}
        self.parameters: dict[int, str] = {}

    def find(self, module: nn.Module) -> str | None:
        """Return the name of a module that has one."""
        return self._names.get(module)

    def name(self, module: nn.Module, parent: nn.Module | None, frame: FrameType | None) -> str:
        """Return the path of `module`, which `parent` calls, or, if nobody does, code at `frame`."""
        known = self._names.get(module)
        if known is not None:
            return known
        if tensors.is_replica(module) and type(module) in self._replicated:
            return self._add_tree(module, self._replicated[type(module)])
        if parent is not None:
            owner = self._names.get(parent, type(parent).__name__)
            key = next(
                (key for key, child in tensors.children_of(parent).items() if child is module), type(module).__name__
            )
            return self._add_tree(module, f"{owner}.{key}")
        variable = _variable(module, frame)
        return self._add_tree(module, self._free(variable or type(_inner(module)).__name__))

    def modules(self) -> list[nn.Module]:
        """Return the modules that have a name."""
        return list(self._names)

    def classes(self) -> dict[str, str]:
        """Return the class name of each module that was named, those that are gone by now too."""
        return dict(sorted(self._classes.items()))

    def _add_tree(self, module: nn.Module, name: str) -> str:
        if module in self._names:
            return self._names[module]
        self._names[module] = name
        self._classes[name] = type(module).__name__
        attribute = _WRAPPED_BY.get(type(module).__name__)
        for key, weight in tensors.parameters_of(module).items():
            if weight is not None:
                self.parameters.setdefault(id(weight), f"{name}.{key}")
        for key, child in tensors.children_of(module).items():
            if child is None:
                continue
            if key == attribute:
                self._replicated[type(child)] = name
            self._add_tree(child, name if key == attribute else f"{name}.{key}")
        return name

    def _free(self, name: str) -> str:
        free, number = name, 2
        while free in self._taken:
            free = f"{name}#{number}"
            number += 1
        self._taken.add(free)
        return free


def _inner(module: nn.Module) -> nn.Module:
    """Return what a wrapper wraps."""
    attribute = _WRAPPED_BY.get(type(module).__name__)
    child = tensors.children_of(module).get(attribute) if attribute else None
    return module if child is None else _inner(child)


def _variable(module: nn.Module, frame: FrameType | None) -> str | None:
    """Return the name of the variable that holds `module`: the outermost, as that is the one it lives in."""
    found: str | None = None
    while frame is not None:
        if "/torch/" not in frame.f_code.co_filename:
            found = _holder(module, frame) or found
        frame = frame.f_back
    return found


def _holder(module: nn.Module, frame: FrameType) -> str | None:
    return _holder_among(module, frame.f_globals, variables_of(frame))


def _holder_among(module: nn.Module, *scopes: Mapping[str, Any]) -> str | None:
    for variables in scopes:
        for name, value in list(variables.items()):
            if value is module and name not in _ANONYMOUS:
                return str(name)
    owner = scopes[-1].get("self")
    if isinstance(owner, nn.Module):  # a method that is not forward calls one of its modules, as Lightning's steps do
        return next((key for key, child in owner.named_modules() if child is module and key), None)
    if owner is not None:
        for name, value in list(getattr(owner, "__dict__", {}).items()):
            if value is module:
                return str(name)
    return None
