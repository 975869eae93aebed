"""Which gradients carry a loss scale: known optimizers, what each backward pass wrote, and what unscaling took off."""

import gc
from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from mezzotint.torch_internals.autograd import version_of
from mezzotint.trace.addresses import address_of, is_fake

Fingerprint = tuple[int, int]
_WIDE = 4  # bytes of float32


class Gradients:
    """Follows `.grad` of every weight that an optimizer holds, by address and version."""

    def __init__(self) -> None:
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        # by the id of a weight, the number of the scaler whose scale its gradient carries, 0 where it carries none;
        # absent where the gradient is 0 or not known
        self._scalers: dict[int, int] = {}
        self._mixed: set[int] = set()  # weights whose gradient is the sum of a scaled and an unscaled one

    def find_optimizers(self) -> None:
        """Add the optimizers that exist already."""
        kinds, found = {Optimizer}, [Optimizer]
        while found:
            new = [one for one in found.pop().__subclasses__() if one not in kinds]
            kinds.update(new)
            found += new
        objects = gc.get_objects()
        # hundreds of thousands of objects: no Python code runs for each
        self.optimizers.update(compress(objects, map(kinds.__contains__, map(type, objects))))

    def weights(self) -> Iterator[Tensor]:
        """Yield the weights of all known optimizers."""
        for optimizer in list(self.optimizers):
            yield from weights_of(optimizer)

    def before_backward(self) -> dict[int, Fingerprint]:
        """Return how each gradient looks now."""
        return {id(weight): _fingerprint(weight.grad) for weight in self.weights() if weight.grad is not None}

    def after_backward(self, before: dict[int, Fingerprint], *, scaler: int) -> dict[str, int]:
        """Note the gradients that a backward pass wrote, of a loss scaled by `scaler` (0: by none).

        Returns how many were written, how many then mix scaled and unscaled, and how many compact ones were added to.
        """
        written = mixed = rounded = 0
        for weight in self.weights():
            if weight.grad is None:
                self._scalers.pop(id(weight), None)
                continue
            old = before.get(id(weight))
            if old == _fingerprint(weight.grad):
                continue
            written += 1
            known = self._scalers.get(id(weight))
            if old is not None and known is not None and known != scaler:
                mixed += 1
                self._mixed.add(id(weight))
            elif old is None:
                self._mixed.discard(id(weight))
            rounded += old is not None and known is not None and weight.grad.itemsize < _WIDE
            self._scalers[id(weight)] = scaler
        return {"num_written": written, "num_mixed": mixed, "num_rounded": rounded}

    def zeroed(self, weights: Iterable[Tensor]) -> None:
        """Note that these gradients are 0, or gone."""
        for weight in weights:
            self._scalers.pop(id(weight), None)
            self._mixed.discard(id(weight))

    def unscaled(self, weights: Iterable[Tensor]) -> None:
        """Note that these gradients carry no scale any more."""
        for weight in weights:
            self._scalers[id(weight)] = 0

    def num_mixed(self, weights: Iterable[Tensor]) -> int:
        """Return how many of these weights have a gradient that mixes scaled and unscaled ones."""
        return sum(weight.grad is not None and id(weight) in self._mixed for weight in weights)

    def num_scaled(self, weights: Iterable[Tensor]) -> int:
        """Return how many of these weights have a gradient that still carries a scale."""
        return sum(weight.grad is not None and self._scalers.get(id(weight), 0) > 0 for weight in weights)

    def num_unscaled(self, weights: Iterable[Tensor]) -> int:
        """Return how many of these weights have a gradient that is known to carry no scale."""
        return sum(weight.grad is not None and self._scalers.get(id(weight)) == 0 for weight in weights)

    def num_of_others(self, weights: Iterable[Tensor], scaler: int) -> int:
        """Return how many of these weights have a gradient that carries the scale of another scaler."""
        found = (self._scalers.get(id(weight), 0) for weight in weights if weight.grad is not None)
        return sum(one not in (0, scaler) for one in found)

    def scaled_addresses(self) -> set[int]:
        """Return where the scaled gradients lie."""
        if not any(self._scalers.values()):
            return set()
        return {
            _address(weight.grad)
            for weight in self.weights()
            if self._scalers.get(id(weight)) and weight.grad is not None
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
    return _address(grad), version_of(grad)


def _address(grad: Tensor) -> int:
    if grad.is_meta and not is_fake(grad):
        return id(grad)
    try:
        return address_of(grad)
    except (RuntimeError, NotImplementedError):  # no memory of its own
        return id(grad)
