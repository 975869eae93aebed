"""What the engine checks before the first step: its models, optimizers and device, and the policy it was asked for."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mezzotint.errors import EngineError, echoed
from mezzotint.hardware.probe import probe
from mezzotint.policy.choose import check_policy, choose
from mezzotint.policy.decision import Decision
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.policy import Policy


def named(given: Any, kind: type[Any], what: str) -> dict[str, Any]:
    """Return one or several things by name: their keys in a mapping, their positions in a list, else `what`."""
    if isinstance(given, kind):
        return {what: given}
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise EngineError(f"{what} is a {type(given).__name__}; pass a {kind.__module__}.{kind.__name__}, or several")
    items = dict(given) if isinstance(given, Mapping) else {str(index): item for index, item in enumerate(given)}
    for name, item in items.items():
        if not isinstance(item, kind):
            raise EngineError(f"{what} {name!r} is a {type(item).__name__}; pass a {kind.__module__}.{kind.__name__}")
    if not items:
        raise EngineError(f"no {what} was given; pass at least one")
    return items


def model_device(models: Mapping[str, nn.Module]) -> torch.device:
    """Return where the models' parameters are; raise EngineError where they hold no numbers or there are none."""
    devices = [parameter.device for module in models.values() for parameter in module.parameters()]
    if not devices:
        raise EngineError("the model has no parameters, so there is nothing to train; pass a module that has some")
    if devices[0].type == "meta":
        raise EngineError("the model's parameters are on the meta device and hold no numbers; move it by to_empty()")
    return devices[0]


def decide_policy(policy: Policy | str, device: torch.device) -> Decision[Policy]:
    """Return the policy and the reasons: chosen for "auto", else granted as asked, or refused with PolicyError."""
    facts = probe(str(device))
    if policy == "auto":
        return choose(facts)
    asked = parse_policy(policy)
    check_policy(asked, facts)
    return Decision(asked, ("it was asked for by name",))


def check_numbers(max_grad_norm: Any, accumulate: Any, seed: Any) -> None:
    """Refuse numbers that the engine cannot use; raise EngineError."""
    is_norm = isinstance(max_grad_norm, int | float) and not isinstance(max_grad_norm, bool)
    if max_grad_norm is not None and not (is_norm and 0 < max_grad_norm <= sys.float_info.max):
        raise EngineError(
            f"max_grad_norm={echoed(max_grad_norm)} is refused; pass a positive finite number, or None not to clip"
        )
    if not _is_whole(accumulate) or not 1 <= accumulate < 2**31:
        raise EngineError(
            f"accumulate={echoed(accumulate)} is refused; pass the number of micro-batches, a whole number from 1 to "
            "2**31 - 1"
        )
    if not _is_whole(seed) or not -(2**63) <= seed < 2**64:
        raise EngineError(f"seed={echoed(seed)} is refused; pass a whole number of at most 64 bits")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_optimizers(optimizers: Mapping[str, Optimizer], names: Mapping[nn.Parameter, str]) -> None:
    """Refuse optimizers that evaluate the loss inside their step, that share parameters, or that train other models.

    Raises EngineError. A parameter outside the models, such as a learned temperature, may stand beside theirs.
    """
    owners: dict[int, str] = {}
    for name, optimizer in optimizers.items():
        if isinstance(optimizer, LBFGS):
            raise EngineError(
                f"optimizer {name!r} is LBFGS, which evaluates the loss inside its step; the engine's three parts "
                "cannot serve that, so pass an optimizer without a closure, such as AdamW"
            )
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise EngineError(
                    f"optimizers {other!r} and {name!r} both hold {names.get(parameter, 'one parameter')}, which would "
                    "be stepped twice; give each parameter to one optimizer"
                )
        if not any(parameter in names for parameter in parameters):
            raise EngineError(
                f"optimizer {name!r} holds no parameter of this model; make it from the parameters of the model that "
                "the Engine gets"
            )


def check_schedulers(schedulers: Mapping[str, LRScheduler], optimizers: Mapping[str, Optimizer]) -> None:
    """Refuse schedulers that need more than the news of a step, or drive another optimizer; raise EngineError."""
    driven = {id(given) for one in optimizers.values() for given in (one, getattr(one, "optimizer", None))}
    for name, scheduler in schedulers.items():
        if isinstance(scheduler, ReduceLROnPlateau):
            raise EngineError(
                f"scheduler {name!r} is ReduceLROnPlateau, which steps on a metric that the engine does not know; keep "
                "it out of the engine and call its step(metric) after each evaluation"
            )
        if id(getattr(scheduler, "optimizer", next(iter(optimizers.values())))) not in driven:
            raise EngineError(
                f"scheduler {name!r} changes the learning rate of an optimizer that this engine does not have; make it "
                "from an optimizer that the Engine gets"
            )
