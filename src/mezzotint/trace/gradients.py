"""Which gradients carry a loss scale: known optimizers, what each backward pass wrote, and what unscaling took off."""

import gc
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from mezzotint.trace.addresses import address_of

Fingerprint = tuple[int, int]


class Gradients:
    """Follows `.grad` of every weight that an optimizer holds, by address and version."""

    def __init__(self) -> None:
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        # by the id of a weight, whether its gradient carries the scale; absent where it is 0 or not known
        self._is_scaled: dict[int, bool] = {}

    def find_optimizers(self) -> None:
        """Add the optimizers that exist already."""
        is_optimizer: dict[type, bool] = {}  # hundreds of thousands of objects are of a few thousand types
        for one in gc.get_objects():
            kind = type(one)
            if kind not in is_optimizer:
                is_optimizer[kind] = issubclass(kind, Optimizer)
            if is_optimizer[kind]:
                self.optimizers.add(one)

    def weights(self) -> Iterator[Tensor]:
        """Yield the weights of all known optimizers."""
        for optimizer in list(self.optimizers):
            yield from weights_of(optimizer)

    def before_backward(self) -> dict[int, Fingerprint]:
        """Return how each gradient looks now."""
        return {id(weight): _fingerprint(weight.grad) for weight in self.weights() if weight.grad is not None}

    def after_backward(self, before: dict[int, Fingerprint], *, is_scaled: bool) -> tuple[int, int]:
        """Note the gradients that a backward pass wrote; return how many, and how many then mix scaled and unscaled."""
        written = mixed = 0
        for weight in self.weights():
            if weight.grad is None:
                self._is_scaled.pop(id(weight), None)
                continue
            old = before.get(id(weight))
            if old == _fingerprint(weight.grad):
                continue
            written += 1
            was_scaled = self._is_scaled.get(id(weight))
            mixed += old is not None and was_scaled is not None and was_scaled != is_scaled
            self._is_scaled[id(weight)] = is_scaled
        return written, mixed

    def zeroed(self, weights: Iterable[Tensor]) -> None:
        """Note that these gradients are 0, or gone."""
        for weight in weights:
            self._is_scaled.pop(id(weight), None)

    def unscaled(self, weights: Iterable[Tensor]) -> None:
        """Note that these gradients carry no scale any more."""
        for weight in weights:
            self._is_scaled[id(weight)] = False

    def num_scaled(self, weights: Iterable[Tensor]) -> int:
        """Return how many of these weights have a gradient that still carries the scale."""
        return sum(weight.grad is not None and self._is_scaled.get(id(weight), False) for weight in weights)

    def num_unscaled(self, weights: Iterable[Tensor]) -> int:
        """Return how many of these weights have a gradient that is known to carry no scale."""
        return sum(weight.grad is not None and self._is_scaled.get(id(weight)) is False for weight in weights)

    def scaled_addresses(self) -> set[int]:
        """Return where the scaled gradients lie."""
        if not any(self._is_scaled.values()):
            return set()
        return {
            address_of(weight.grad)
            for weight in self.weights()
            if self._is_scaled.get(id(weight)) and weight.grad is not None and weight.grad.layout is torch.strided
        }

    def owners_of(self, grads: Iterable[Tensor]) -> list[Tensor]:
        """Return the weights whose `.grad` these tensors are."""
        sought = {id(grad) for grad in grads}
        return [weight for weight in self.weights() if weight.grad is not None and id(weight.grad) in sought]


def weights_of(optimizer: Any) -> Iterator[Tensor]:
    """Yield an optimizer's weights."""
    for group in getattr(optimizer, "param_groups", ()):
        yield from (weight for weight in group["params"] if isinstance(weight, Tensor))


def _fingerprint(grad: Tensor) -> Fingerprint:
    address = address_of(grad) if grad.layout is torch.strided and not grad.is_meta else id(grad)
    return address, grad._version
