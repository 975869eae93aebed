"""Data-parallel wrappers: which of them a policy can train under, and whether all processes train the same weights.

A wrapper reduces gradients over the processes by hooks on the parameters it found. A policy that changes the dtype of
these parameters takes the hooks away, and then each process trains alone without an error. So such a policy refuses
wrappers, and the first update compares the gradients of all processes before any weight changes.
"""

import gc
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mezzotint.errors import EngineError, PolicyError
from mezzotint.policy.policy import Policy

_TOLERANCE = 1e-5  # relative; reduced gradients have the same bits in all processes
_FIX = "pass policy='bf16-mixed', whose float32 parameters and gradients it reduces"


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all processes found at an update; the same value in each of them."""

    is_same: bool
    smallest: float
    largest: float
    is_loss_finite: bool


def num_processes() -> int:
    """Return the size of the initialised process group, 1 where there is none."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def check_wrappers(models: Mapping[str, nn.Module], policy: Policy) -> None:
    """Refuse wrappers that cannot reduce the gradients of this policy. Raises EngineError and PolicyError."""
    wrappers = set(_wrappers(models.values()))
    if "FullyShardedDataParallel" in wrappers:
        raise EngineError(
            "the model is wrapped in FullyShardedDataParallel, whose gradients are shards that each process would "
            "measure and clip by itself; wrap it with torch.distributed.fsdp.fully_shard"
        )
    if policy.params == "float32":
        return
    wrappers.update(_around(models.values()))
    if wrappers:
        wrapper = sorted(wrappers)[0]
        raise PolicyError(
            f"params={policy.params} is refused under {wrapper} (policy {policy}): the parameters would change their "
            f"dtype after {wrapper} took hold of them, and their gradients would not be reduced correctly over the "
            f"processes; {_FIX}"
        )


def check_later_wrapper(models: Mapping[str, nn.Module], policy: Policy) -> None:
    """Refuse a wrapper made after the engine where it cannot reduce float32 gradients of low-precision weights."""
    if policy.params in ("float32", policy.reduce) or num_processes() == 1:
        return
    wrapper = next(_around(models.values()), None)
    if wrapper is not None:
        raise PolicyError(
            f"the model was wrapped in {wrapper} after the Engine was made, and {wrapper} cannot reduce the float32 "
            f"gradients of params={policy.params} (policy {policy}); {_FIX}, and wrap the model first"
        )


def are_replaced(models: Mapping[str, nn.Module], known: Iterable[nn.Parameter]) -> bool:
    """Return whether a model has trainable parameters that it did not have when the engine was made."""
    ids = {id(parameter) for parameter in known}
    return any(id(p) not in ids for model in models.values() for p in model.parameters() if p.requires_grad)


def is_data_parallel(models: Mapping[str, nn.Module]) -> bool:
    """Return whether a wrapper reduces the gradients of these models."""
    return any(True for _ in _wrappers(models.values())) or any(True for _ in _around(models.values()))


def agree(norm: float, device: torch.device, *, are_finite: bool, is_loss_finite: bool) -> Agreement:
    """Compare the gradient norm and the outcome over all processes; one all_reduce."""
    number = norm if are_finite else 0.0
    bad, bad_loss = float(not are_finite), float(not is_loss_finite)
    numbers = torch.tensor([number, -number, bad, -bad, bad_loss], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
    largest, smallest, most, least, any_bad_loss = numbers.tolist()
    return Agreement(
        is_same=most == -least and math.isclose(largest, -smallest, rel_tol=_TOLERANCE),
        smallest=-smallest,
        largest=largest,
        is_loss_finite=not any_bad_loss,
    )


def tell_unwrapped(policy: Policy) -> None:
    """Warn that nothing reduces the gradients of a model in a group of several processes."""
    warnings.warn(
        f"the process group has {num_processes()} processes, and no DistributedDataParallel or fully_shard reduces the "
        f"gradients of this model: each process trains a model of its own, unless your code averages the gradients "
        f"(policy {policy}); wrap the model before making the Engine",
        stacklevel=3,
    )


def _wrappers(models: Iterable[nn.Module]) -> Iterator[str]:
    """Yield the names of the wrappers that the models are or contain."""
    # what was never imported wraps nothing
    fsdp = sys.modules.get("torch.distributed.fsdp")
    tensor = sys.modules.get("torch.distributed.tensor")
    for model in models:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                yield "DistributedDataParallel"
            elif fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
                yield "FullyShardedDataParallel"
            elif fsdp is not None and isinstance(module, fsdp.FSDPModule):
                yield "fully_shard"
        if tensor is not None and any(isinstance(p, tensor.DTensor) for p in model.parameters()):
            yield "DTensor parameters"


def _around(models: Iterable[nn.Module]) -> Iterator[str]:
    """Yield the names of the wrappers around the models; a module does not know them, so they are searched for."""
    if num_processes() == 1:
        return
    ids = {id(parameter) for model in models for parameter in model.parameters()}
    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel) and any(id(p) in ids for p in found.parameters()):
            yield "DistributedDataParallel"
