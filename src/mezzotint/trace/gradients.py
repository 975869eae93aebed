"""Which gradients carry a loss scale: known optimizers, what each backward pass wrote, and what unscaling took off."""

import gc
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import compress
from types import CellType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer

from mezzotint.torch_internals.autograd import version_of
from mezzotint.trace.addresses import address_of, is_fake
from mezzotint.trace.variables import variables_of

Fingerprint = tuple[int, int]
_WIDE = 4  # bytes of float32
_MAX_VISITED = 2000  # objects that are looked at near the callers of a backward pass
_NO_HOLDERS = (type, ModuleType, Tensor, str, bytes, int, float, complex, type(None))


class Gradients:
    """Follows `.grad` of every weight that an optimizer holds, by address and version."""

    def __init__(self) -> None:
        self.optimizers: WeakSet[Optimizer] = WeakSet()
        # by the id of a weight, the number of the scaler whose scale its gradient carries, 0 where it carries none;
        # absent where the gradient is 0 or not known
        self._scalers: dict[int, int] = {}
        self._mixed: set[int] = set()  # weights whose gradient is the sum of a scaled and an unscaled one
        self._open: list[dict[int, Fingerprint]] = []  # of the backward passes under way
        self.is_complete = False  # whether every optimizer that exists is known

    def meet(self, roots: Any, caller: FrameType | None) -> None:
        """Make known the optimizers of all weights that a backward pass from these roots can write.

        They are sought near the variables of the caller and of its callers. Only where these leave a weight without
        an optimizer, all objects of the process are looked through, once: that takes a tenth of a second.
        """
        if self.is_complete:
            return
        missing = {id(leaf) for leaf in _leaves(roots)} - {id(weight) for weight in self.weights()}
        if not missing:
            return
        known = set(self.optimizers)
        for optimizer in _optimizers_near(caller):
            self.optimizers.add(optimizer)
            missing -= {id(weight) for weight in weights_of(optimizer)}
            if not missing:
                break
        else:
            self.find_optimizers()
        for optimizer in set(self.optimizers) - known:
            for weight in weights_of(optimizer):
                if weight.grad is not None:
                    for before in self._open:
                        before.setdefault(id(weight), _fingerprint(weight.grad))

    def find_optimizers(self) -> None:
        """Add the optimizers that exist already."""
        self.is_complete = True
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
        """Return how each gradient looks now; `end_backward` takes it back."""
        before = {id(weight): _fingerprint(weight.grad) for weight in self.weights() if weight.grad is not None}
        self._open.append(before)
        return before

    def end_backward(self, before: dict[int, Fingerprint]) -> None:
        """Note that a backward pass has ended, with an error perhaps."""
        self._open = [one for one in self._open if one is not before]

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


def _leaves(roots: Any) -> Iterator[Tensor]:
    """Yield the leaves of the graph under tensors or edges of it."""
    nodes: list[Any] = []
    for root in roots if isinstance(roots, (tuple, list)) else (roots,):
        node = root.grad_fn if isinstance(root, Tensor) else getattr(root, "node", None)
        if node is None and isinstance(root, Tensor) and root.requires_grad:
            yield root
        nodes.append(node)
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        else:
            nodes.extend([following for following, _ in getattr(node, "next_functions", ())])


def _optimizers_near(frame: FrameType | None) -> Iterator[Optimizer]:
    """Yield the optimizers that the variables of a frame and of its callers hold, the nearest first."""
    waiting: deque[Any] = deque()
    while frame is not None:
        waiting.extend(variables_of(frame).values())
        frame = frame.f_back
    seen: set[int] = set()
    kept = []  # an id is another object's once its object is gone
    while waiting and len(seen) < _MAX_VISITED:
        one = waiting.popleft()
        if issubclass(type(one), _NO_HOLDERS) or id(one) in seen:
            continue
        seen.add(id(one))
        kept.append(one)
        if issubclass(type(one), Optimizer):
            yield one
        elif isinstance(one, FunctionType):
            waiting.extend(one.__closure__ or ())
        elif isinstance(one, MethodType):
            waiting.append(one.__self__)
        elif isinstance(one, CellType) or gc.is_tracked(one):
            waiting.extend(gc.get_referents(one))


def _fingerprint(grad: Tensor) -> Fingerprint:
    return _address(grad), version_of(grad)


def _address(grad: Tensor) -> int:
    if grad.is_meta and not is_fake(grad):
        return id(grad)
    try:
        return address_of(grad)
    except (RuntimeError, NotImplementedError):  # no memory of its own
        return id(grad)
