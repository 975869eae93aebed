"""Moving modules to the ghost GPU: the tensor under a parameter changes, the parameter stays the same object.

`nn.Module._apply` cannot do it: it replaces parameters of another type by new objects, which unties what was tied and
leaves optimizers behind, or swaps them, which weak references forbid. A real parameter gets its own tensor back in the
end.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.torch_internals.fake import FakeTensor, swap_tensors
from mezzotint.torch_internals.tensors import apply_to, buffers_of, parameters_of


class MovedParameters:
    """Real parameters that hold a ghost for the time being."""

    def __init__(self) -> None:
        self._moved: list[tuple[Tensor, Tensor]] = []

    def apply(self, module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Do what `nn.Module._apply` does."""
        if recurse:
            for child in module.children():
                apply_to(child, change)
        for parameter in parameters_of(module).values():
            if parameter is None:
                continue
            with torch.no_grad():
                new = change(parameter)
                gradient = change(parameter.grad) if parameter.grad is not None else None
            if new is parameter:
                continue
            if isinstance(new, FakeTensor) or isinstance(parameter, FakeTensor):
                self._swap(parameter, new)
            else:
                parameter.data = new
            if gradient is not None:
                parameter.grad = gradient
        buffers = buffers_of(module)
        for key, buffer in buffers.items():
            if buffer is not None:
                buffers[key] = change(buffer)
        return module

    def _swap(self, parameter: Tensor, new: Tensor) -> None:
        was_real = not isinstance(parameter, FakeTensor)
        parameter.grad = None
        other = nn.Parameter(new, parameter.requires_grad)
        for name, value in vars(parameter).items():  # what the user hung on the parameter
            if name not in vars(other) and not (isinstance(parameter, FakeTensor) and name in _OWN):
                other.__dict__[name] = value
        other.__dict__.pop("_ghost_twin", None)  # a weight is trained: its numbers are of no use
        exchange(parameter, other)
        if was_real:
            self._moved.append((parameter, other))

    def restore(self) -> None:
        """Give every real parameter its tensor back."""
        while self._moved:
            parameter, other = self._moved.pop()
            parameter.grad = None
            exchange(parameter, other)


_OWN = frozenset(
    {"_fake_device", "fake_mode", "constant", "pytype", "dispatch_keys", "real_tensor", "_ghost_twin", "_ghost_guess"}
)


def exchange(one: Any, other: Any) -> None:
    """Exchange the contents of two tensors, as `torch.utils.swap_tensors` does, whatever refers to them weakly."""
    one.__class__, other.__class__ = other.__class__, one.__class__
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__
    swap_tensors(one, other)
