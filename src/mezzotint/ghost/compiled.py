"""What a program asks `torch.compile` for: nothing is compiled on a ghost, but it is known what would be."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from mezzotint.torch_internals.autograd import current_graph_task


class CompiledRegions:
    """Calls of compiled functions and modules, and the share of the forward pass that is inside them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._depth = 0
        # operations outside of backward, without gradients and with them, and those of them inside
        self._num_seen = [0, 0]
        self._num_inside = [0, 0]
        self._removers: list[Callable[[], None]] = []
        self._modules: dict[int, nn.Module] = {}

    @property
    def is_inside(self) -> bool:
        """Whether something compiled is running."""
        return self._depth > 0

    @property
    def share(self) -> float:
        """The share of the forward pass' operations that ran inside, of those with gradients if any such did."""
        has_gradients = self._num_inside[True] > 0
        return self._num_inside[has_gradients] / max(1, self._num_seen[has_gradients])

    def see(self, *, is_view: bool) -> None:
        """Count an operation, outside of backward."""
        if not is_view and current_graph_task() == -1:  # backward computes checkpoints again
            has_gradients = torch.is_grad_enabled()
            self._num_seen[has_gradients] += 1
            self._num_inside[has_gradients] += self._depth > 0

    def compile(self, made: Any = None, *_args: Any, **kwargs: Any) -> Any:
        """Do as `torch.compile`: return the same module, or a function that does the same."""
        if made is None:
            return lambda function: self.compile(function, **kwargs)
        if isinstance(made, nn.Module):
            self._add(type(made).__name__)
            self._modules[id(made)] = made
            made.__dict__.setdefault("_orig_mod", made)  # not a child: programs ask the wrapper for it
            return made
        self._add(getattr(made, "__qualname__", "a function"))

        @wraps(made)
        def compiled(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return made(*args, **kwargs)
            finally:
                self._depth -= 1

        return compiled

    def install(self) -> None:
        """Listen to every module; a hook on the compiled one would be copied and saved with it."""
        self._removers.append(register_module_forward_pre_hook(self._enter).remove)
        self._removers.append(register_module_forward_hook(self._leave, always_call=True).remove)

    def remove(self) -> None:
        """Take the hooks back."""
        while self._removers:
            self._removers.pop()()
        while self._modules:
            self._modules.popitem()[1].__dict__.pop("_orig_mod", None)

    def _add(self, name: str) -> None:
        if name not in self.names:
            self.names.append(name)

    def _enter(self, module: Any, _args: Any) -> None:
        self._depth += id(module) in self._modules

    def _leave(self, module: Any, _args: Any, _output: Any) -> None:
        self._depth -= id(module) in self._modules
