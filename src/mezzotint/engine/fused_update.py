"""The update in one pass over memory: AdamW, Adam and SGD on bfloat16 weights that a CPU holds.

A torch optimizer steps float32 copies, which then are rounded to the stored weights. Compiled loops do both for a
stretch of weights that fits the first cache, so that copies which nobody keeps are never made. The results are the
same, bit for bit: the loops follow torch's arithmetic, that of `fused=True` where a group asks for it. (But for the
last elements of a tensor, fewer than torch's vectors are long, which `fused=True` rounds in another order.)

State stays where torch's optimizers keep it, under their names, so that a run may change between both ways, and does:
what the loops do not serve (hooks, sparse gradients, `amsgrad`, other devices) goes through the optimizer's own step.
Global hooks that say `observes_only` are called around the loops as around a step, so that watching changes no bit.
"""

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torch.optim import SGD, Adam, AdamW, Optimizer

from mezzotint.kernels.constants import FLOAT32
from mezzotint.kernels.memory import is_plain
from mezzotint.policy.policy import Update
from mezzotint.torch_internals.optimizers import has_torch_step, hooks_after_steps, hooks_before_steps, note_step

# what changes the arithmetic, by the value at which it does not
_PLAIN = {"amsgrad": False, "maximize": False, "differentiable": False, "capturable": False}
_NUMBERS = ("lr", "weight_decay", "eps", "momentum", "dampening")
_STATES = {AdamW: ("exp_avg", "exp_avg_sq"), Adam: ("exp_avg", "exp_avg_sq"), SGD: ("momentum_buffer",)}
_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
_DIMS = {torch.channels_last: 4, torch.channels_last_3d: 5}


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored weight, its compensation if it has one, and its place among the weights of the optimizer."""

    stored: nn.Parameter
    dropped: Tensor | None
    index: int


def can_step(optimizer: Optimizer, update: Update, weights: Mapping[nn.Parameter, Weight]) -> bool:
    """Return whether the loops do what the optimizer's step would; `weights` is by the parameter that it holds."""
    num_threads = torch.get_num_threads()
    return (
        update in (Update.MASTER, Update.STOCHASTIC, Update.KAHAN)
        and _has_own_step(optimizer)
        and all(_is_plain(group) for group in optimizer.param_groups)
        and all(
            parameter in weights and _is_reachable(weights[parameter].stored, update, optimizer, parameter)
            for group in optimizer.param_groups
            for parameter in group["params"]
        )
        and not torch.compiler.is_compiling()
        and _multiplies_and_adds_at_once()
        and (num_threads == 1 or _team().has_team())
        and all(_roots(bool(group.get("fused"))) is not None for group in optimizer.param_groups)
    )


def _has_own_step(optimizer: Optimizer) -> bool:
    """Return whether the step is torch's own, observed by nobody but learning rate schedulers, which only count."""
    return (
        type(optimizer) in _STATES
        and has_torch_step(optimizer)
        and all(getattr(hook, "observes_only", False) for hook in (*hooks_before_steps(), *hooks_after_steps()))
        and getattr(optimizer, "grad_scale", None) is None
        and getattr(optimizer, "found_inf", None) is None
    )


def _is_plain(group: Mapping[str, Any]) -> bool:
    numbers = [*(group[name] for name in _NUMBERS if name in group), *group.get("betas", ())]
    return all(group.get(name, plain) == plain for name, plain in _PLAIN.items()) and all(
        isinstance(number, int | float) for number in numbers
    )


def _is_reachable(stored: nn.Parameter, update: Update, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Return whether a weight, its gradient and its state lie alike in CPU memory; without a gradient, nothing does."""
    grad = stored.grad
    if grad is None:
        return True
    if not (stored.dtype is torch.bfloat16 and type(stored) is nn.Parameter and is_plain(stored)):
        return False
    # random bits go by an element's index, which is its place in memory in this format alone
    formats = _FORMATS[:1] if update is Update.STOCHASTIC else _FORMATS
    layout = next((f for f in formats if _DIMS.get(f, stored.dim()) == stored.dim() and _lies(stored, f)), None)
    if layout is None or not _lies_beside(grad, stored, layout) or grad.dtype not in (torch.float32, torch.bfloat16):
        return False
    if update is Update.MASTER and not (is_plain(parameter) and _lies(parameter, layout)):
        return False
    state = optimizer.state.get(parameter, {})
    names = _STATES[type(optimizer)]
    if len(names) > 1 and state and not {"step", *names} <= state.keys():
        return False
    tensors = [state[name] for name in names if state.get(name) is not None]
    return all(t.dtype is torch.float32 and _lies_beside(t, stored, layout) for t in tensors)


def _lies(tensor: Tensor, layout: torch.memory_format) -> bool:
    return tensor.is_contiguous(memory_format=layout)


def _lies_beside(tensor: Tensor, stored: Tensor, layout: torch.memory_format) -> bool:
    return type(tensor) is Tensor and is_plain(tensor) and tensor.shape == stored.shape and _lies(tensor, layout)


@torch.no_grad()
def step(
    optimizer: Optimizer, update: Update, weights: Mapping[nn.Parameter, Weight], *, seed: int, first_offset: int
) -> None:
    """Step the optimizer's parameters that have a gradient, float32, and store the weights, where `can_step` allows.

    For STOCHASTIC the random bits of a weight follow from `seed` and `first_offset` plus its index.
    """
    note_step(optimizer)  # schedulers warn where no step was taken
    for hook in hooks_before_steps():  # observers: `can_step` has seen to that
        hook(optimizer, (optimizer,), {})
    updates = _updates()
    prepare, task = (_prepare_sgd, updates.sgd) if type(optimizer) is SGD else (_prepare_adam, updates.adam)
    rows, settings = array("q"), array("f")
    changed: list[Tensor] = []
    for group in optimizer.param_groups:
        stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
        stored = [weights[parameter].stored for parameter in stepped]
        prepared = prepare(optimizer, group, stepped, stored, settings)
        changed += stored
        if update is Update.MASTER:
            changed += stepped
        for parameter, (place, first, second, is_new) in zip(stepped, prepared, strict=True):
            weight = weights[parameter]
            held = parameter if update is Update.MASTER else weight.dropped
            rows.extend(
                (
                    *(weight.stored.data_ptr(), 0 if held is None else held.data_ptr()),
                    *(parameter.grad.data_ptr(), FLOAT32, first, second, weight.stored.numel(), 0, place),
                    *(first_offset + weight.index, is_new, _roots(bool(group["fused"])) or 0),
                )
            )
    kind = {Update.MASTER: updates.MASTER, Update.STOCHASTIC: updates.RANDOM, Update.KAHAN: updates.KAHAN}[update]
    with record_function(f"Optimizer.step#{type(optimizer).__name__}.step"):
        updates.step_rows(task, kind, rows, settings, seed=_signed(seed), num_threads=torch.get_num_threads())
    torch.autograd.graph.increment_version(changed)
    for hook in hooks_after_steps():
        hook(optimizer, (optimizer,), {})


# what a row says of a parameter's state: the place of its settings, the addresses of two states, whether they are new
_Prepared = tuple[int, int, int, bool]


def _prepare_adam(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameters: Sequence[nn.Parameter],
    stored: Sequence[Tensor],
    settings: "array[float]",
) -> list[_Prepared]:
    """Make the states that are missing, count the step, and append the settings of this group to the others."""
    states = []
    for parameter, weight in zip(parameters, stored, strict=True):
        state = optimizer.state[parameter]
        if not state:
            dtype = torch.float32 if group["fused"] else torch.get_default_dtype()
            state["step"] = torch.zeros((), dtype=torch.float64 if dtype is torch.float64 else torch.float32)
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
        states.append(state)
    places: dict[float, int] = {}
    prepared = []
    beta1, beta2 = group["betas"]
    lr, decay = group["lr"], group["weight_decay"]
    is_decoupled = group["decoupled_weight_decay"]
    for state in states:
        state["step"] += 1
        num_steps = float(state["step"])
        if num_steps not in places:
            places[num_steps] = len(settings)
            settings.extend(
                (
                    *((0.0, 1 - lr * decay) if is_decoupled else (decay, 1.0)),
                    *(1 - beta1, beta2, 1 - beta2, (1 - beta2**num_steps) ** 0.5, group["eps"]),
                    -(lr / (1 - beta1**num_steps)),
                )
            )
        first, second = state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr()
        prepared.append((places[num_steps], first, second, False))
    return prepared


def _prepare_sgd(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameters: Sequence[nn.Parameter],
    stored: Sequence[Tensor],
    settings: "array[float]",
) -> list[_Prepared]:
    """Do for SGD what `_prepare_adam` does; without momentum there is no state."""
    momentum = group["momentum"]
    place = len(settings)
    settings.extend((group["weight_decay"], momentum, 1 - group["dampening"], group["nesterov"], -group["lr"]))
    if momentum == 0:
        return [(place, 0, 0, False)] * len(parameters)
    prepared = []
    for parameter, weight in zip(parameters, stored, strict=True):
        state = optimizer.state[parameter]
        is_new = state.get("momentum_buffer") is None
        if is_new:
            state["momentum_buffer"] = torch.empty_like(weight, dtype=torch.float32)
        prepared.append((place, state["momentum_buffer"].data_ptr(), 0, is_new))
    return prepared


@cache
def _multiplies_and_adds_at_once() -> bool:
    """Return whether torch rounds a product and sum once, as the loops do: not where it was built without AVX2."""
    near_one = torch.full((64,), 1 + 2.0**-12)
    # rounded twice, 2^-24 is lost
    return bool((torch.full((64,), -1.0).add_(near_one, alpha=1 + 2.0**-12) == 2.0**-11 + 2.0**-24).all())


@cache
def _roots(is_fused: bool) -> int | None:
    """Return by which function torch takes square roots: an address, 0 if they are rounded to nearest, else None.

    Torch's fused kernels take the processor's, its operations those of MKL where it is built with it.
    """
    if is_fused:
        return 0
    numbers = torch.arange(1.0, 4.0, 2.0**-10)
    roots = numbers.sqrt()
    if torch.equal(roots, numbers.double().sqrt().float()):
        return 0
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(library.vmsSqrt, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
    if not address:
        return None
    found = torch.empty_like(numbers)
    _updates().square_roots(numbers.data_ptr(), found.data_ptr(), numbers.numel(), address)
    return address if torch.equal(found, roots) else None


def _signed(number: int) -> int:
    """Return the int64 of a number's last 64 bits."""
    return ctypes.c_int64(number).value


@cache
def _updates() -> Any:
    """Return the compiled loops; importing them takes half a second, so it waits for the first update."""
    from mezzotint.kernels import updates

    return updates


@cache
def _team() -> Any:
    from mezzotint.kernels import team

    return team
