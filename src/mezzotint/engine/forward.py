"""The context of part 1, and what makes the losses that leave it float32."""

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.engine.casting import Context, compute_contexts
from mezzotint.engine.saved import SavedActivations
from mezzotint.policy.policy import Policy
from mezzotint.torch_internals.tensors import is_compiled
from mezzotint.torch_internals.trees import tree_map


class ForwardContext:
    """What `Engine.forward` returns: one object for all steps, which may be entered while it is entered."""

    def __init__(self, policy: Policy, device: torch.device, models: Iterable[nn.Module]) -> None:
        self._policy = policy
        self._device = device
        self._models = tuple(models)
        self._ready = self._contexts() if policy.is_mixed else None
        self._entered: list[list[Context]] = []

    def _contexts(self) -> list[Context]:
        is_compiled = any(_is_compiled(module) for model in self._models for module in model.modules())
        contexts = compute_contexts(self._policy, self._device, is_compiled=is_compiled)
        return contexts if self._policy.saved == "float32" else [*contexts, SavedActivations(self._models)]

    @property
    def is_active(self) -> bool:
        """Whether a forward pass is under way."""
        return bool(self._entered)

    def __enter__(self) -> None:
        # making an autocast context takes longer than entering one, so the outermost pass uses the same every time;
        # a float32 policy has to look each time whether it stands below an autocast of the caller's
        is_reused = self._ready is not None and not self._entered
        contexts = self._ready if is_reused and self._ready else self._contexts()
        for context in contexts:
            context.__enter__()
        self._entered.append(contexts)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for context in reversed(self._entered.pop()):
            context.__exit__(kind, error, trace)


class Float32Losses:
    """A forward hook that turns every scalar a model returns into float32 while a forward pass is under way.

    A loss that the model computed in 16 bits has lost its digits by then; what this saves is the gradient, which would
    start from a 16-bit number and overflow under a loss scale of 65536 in float16. All other outputs stay as they are.
    Copies and pickles of the model carry the hook without its engine, and it does nothing there.
    """

    def __init__(self, context: ForwardContext | None = None) -> None:
        self._context = context

    def __reduce__(self) -> tuple[type["Float32Losses"], tuple[()]]:
        return Float32Losses, ()

    def __call__(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Return the output with float32 scalars, or None to leave it."""
        if self._context is None or not self._context.is_active:
            return None
        if isinstance(output, Tensor):
            return _to_float32(output)
        if type(output) is tuple:
            return tuple(_to_float32(item) for item in output)
        return tree_map(_to_float32, output)


def _is_compiled(module: nn.Module) -> bool:
    """Return whether torch.compile wraps a module, or has compiled it in place."""
    return is_compiled(module)


def _to_float32(item: Any) -> Any:
    if isinstance(item, Tensor) and item.dim() == 0 and item.dtype in (torch.bfloat16, torch.float16):
        return item.float()
    return item
