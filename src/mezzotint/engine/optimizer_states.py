"""Optimizer states that are NaN or infinite, found before they reach a weight.

A moment that is not finite never recovers: NaN spreads to its weight at the next step, and an infinite second moment
divides every later update to zero. So the states of an update are read before its step, all with one reduction. A
finite gradient whose square leaves float32 would make such a state, and a huge finite state an infinite weight; a step
on gradients or states that large is tried, and taken back where it leaves a state or a weight that is not finite.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Adafactor, Optimizer

# Above this norm a step is tried first. Squares of smaller gradients stay 8 digits below the end of float32, so that
# sums of squares over 10^8 steps, as Adagrad keeps them, stay within it too.
LARGEST_SAFE_NORM = 1e15

_CAST = (torch.float32, torch.bfloat16, torch.float16)
_COUNTS = ("step", "eta", "mu", "mu_product")  # single numbers in any optimizer of torch

# a state: its parameter, its name in the optimizer, its numbers
State = tuple[nn.Parameter, str, Tensor]


def states_of(optimizer: Optimizer) -> list[State]:
    """Return the floating-point states of the parameters that have a gradient."""
    return [
        (parameter, name, tensor)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and parameter in optimizer.state
        for name, value in optimizer.state[parameter].items()
        for tensor in _tensors(value)
    ]


def cast_states(optimizer: Optimizer, dtype: torch.dtype, changed: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    """Store in `dtype` what an optimizer keeps for its parameters already; add what it was to `changed`.

    Adagrad makes its sums when it is made, in the parameters' dtype of then. Single numbers that count stay.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            is_count = not isinstance(value, Tensor) or (value.dim() == 0 and (parameter.dim() > 0 or name in _COUNTS))
            if not is_count and value.is_floating_point() and value.dtype in _CAST and value.dtype is not dtype:
                changed.append((state, name, value))
                state[name] = value.to(dtype)


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Return the largest 2-norm of the tensors of a device, the fastest reduction that NaN and infinity survive.

    NaN counts as infinity. One number is read per device.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        by_device.setdefault(tensor.device, []).append(tensor)
    norms = [float(get_total_norm(of_device)) for of_device in by_device.values()]
    return max((math.inf if math.isnan(norm) else norm for norm in norms), default=0.0)


def find_nonfinite(states: Sequence[State]) -> State | None:
    """Return the first state that holds NaN or infinity; None where all are finite."""
    if norm_of(tensor for _, _, tensor in states) < math.inf:
        return None
    # a norm may overflow by itself
    return next((state for state in states if not bool(state[2].isfinite().all())), None)


def scales_by_weights(optimizer: Optimizer) -> bool:
    """Return whether a step may be proportional to a norm of the weights, so that one huge weight ruins the others."""
    return isinstance(optimizer, Adafactor) or not type(optimizer).__module__.startswith("torch.optim")


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of floating-point numbers in a state; of a quantised or sharded one, what it is made of."""
    if isinstance(value, Tensor):
        if hasattr(value, "to_local"):
            yield from _tensors(value.to_local())
        elif type(value) not in (Tensor, nn.Parameter) and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from _tensors(getattr(value, name))
        elif value.is_complex():
            yield torch.view_as_real(value)
        elif value.is_floating_point() and value.layout is torch.strided and value.dtype.itemsize > 1 and value.numel():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def takes_root_of_difference(optimizer: Optimizer) -> bool:
    """Return whether a step takes the root of a difference, which rounding makes negative: centered RMSprop's."""
    return any(group.get("centered", False) for group in optimizer.param_groups)


class Trial:
    """What a step on very large numbers would change, copied before it, so that the step can be taken back."""

    def __init__(self, optimizers: Sequence[Optimizer], weights: Sequence[Tensor]) -> None:
        self._optimizers = optimizers
        # a placeholder that repeats one number holds no weight
        self._weights = [(t, t.detach().clone()) for t in weights if t.numel() == 1 or 0 not in t.stride()]
        self._groups = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
        self._states = [
            {parameter: (state, _copied(state)) for parameter, state in optimizer.state.items()}
            for optimizer in optimizers
        ]

    def find_damage(self) -> tuple[nn.Parameter | None, str] | None:
        """Return the parameter and the state ("" for its weight) that the step made NaN or infinite, or None."""
        for optimizer in self._optimizers:
            found = find_nonfinite(states_of(optimizer))
            if found is not None:
                return found[0], found[1]
        for tensor, before in self._weights:
            if bool((before.isfinite() & ~tensor.isfinite()).any()):
                return (tensor if isinstance(tensor, nn.Parameter) else None), ""
        return None

    @torch.no_grad()
    def undo(self) -> None:
        """Bring weights, states and settings back to what they were."""
        for tensor, before in self._weights:
            tensor.copy_(before)
        for optimizer, groups, states in zip(self._optimizers, self._groups, self._states, strict=True):
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
            for parameter in list(optimizer.state):
                if parameter not in states:
                    del optimizer.state[parameter]
            for parameter, (state, before) in states.items():
                optimizer.state[parameter] = state
                _restore(state, before)


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value


def _restore(state: dict[Any, Any], before: Mapping[Any, Any]) -> None:
    """Give `state` the entries and values of `before`, in the tensors that it holds where they still fit."""
    for key in [key for key in state if key not in before]:
        del state[key]
    for key, value in before.items():
        now = state.get(key)
        if isinstance(now, Tensor) and isinstance(value, Tensor) and now.shape == value.shape:
            now.copy_(value)
        elif isinstance(now, dict) and isinstance(value, Mapping):
            _restore(now, value)
        else:
            state[key] = value
