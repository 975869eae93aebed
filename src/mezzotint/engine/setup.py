"""What the engine checks before the first step: its models, optimizers and device, and the policy it was asked for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from mezzotint.errors import EngineError
from mezzotint.hardware.probe import probe
from mezzotint.policy.choose import check_policy, choose
from mezzotint.policy.decision import Decision
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.policy import Policy


def named(given: Any, kind: type[Any], what: str) -> dict[str, Any]:
    """Return one or several things by name: their keys in a mapping, their positions in a list, else `what`."""
    if isinstance(given, kind):
        return {what: given}
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
        raise EngineError("the model has no parameters, so there is nothing to train")
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


def check_optimizers(optimizers: Mapping[str, Optimizer]) -> None:
    """Refuse optimizers that evaluate the loss inside their step; raise EngineError."""
    for name, optimizer in optimizers.items():
        if isinstance(optimizer, LBFGS):
            raise EngineError(
                f"optimizer {name!r} is LBFGS, which evaluates the loss inside its step; the engine's three parts "
                "cannot serve that, so pass an optimizer without a closure, such as AdamW"
            )


def check_schedulers(schedulers: Mapping[str, LRScheduler]) -> None:
    """Refuse schedulers that need more than the news of a step; raise EngineError."""
    for name, scheduler in schedulers.items():
        if isinstance(scheduler, ReduceLROnPlateau):
            raise EngineError(
                f"scheduler {name!r} is ReduceLROnPlateau, which steps on a metric that the engine does not know; keep "
                "it out of the engine and call its step(metric) after each evaluation"
            )
