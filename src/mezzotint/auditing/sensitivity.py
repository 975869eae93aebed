"""How far a training step is from float32, with some modules kept in it: what the bisect measures, on any program.

Each measurement runs the program anew, from the same seeds, until its first steps have ended; modules are made float32
islands from outside, by their paths. The reference is the same program with autocast switched off everywhere.
"""

import math
import random
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import autocast
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mezzotint.errors import AuditError
from mezzotint.modules.islands import widened
from mezzotint.patches import Patches
from mezzotint.torch_internals.autograd import current_graph_task, wrap_backward
from mezzotint.trace.gradients import weights_of
from mezzotint.trace.module_names import ModuleNames
from mezzotint.trace.recorder import Enough

METRICS = ("gradient", "loss")


class Probe:
    """Runs a program for `steps` updates and keeps its gradients (of the first update) and losses.

    `keep` are paths of modules, or patterns; `is_reference` switches autocast off everywhere.
    """

    def __init__(self, *, steps: int, keep: Sequence[str] = (), is_reference: bool = False) -> None:
        self._steps = steps
        self._keep = tuple(keep)
        self._is_reference = is_reference
        self._names = ModuleNames()
        self._stack: list[nn.Module] = []
        self._num_updates = 0
        self.gradients: list[Tensor] | None = None
        self.losses: list[float] = []
        self.called: dict[str, None] = {}  # in the order of the first call

    def run(self, program: Callable[[], object], seed: int) -> "Probe":
        """Run the program from this seed. Raises what it raises."""
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        patches = Patches()
        remove = register_optimizer_step_pre_hook(self._update).remove
        patches.wrap(nn.Module, "__call__", self._call)
        wrap_backward(patches, self._backward)
        patches.wrap(GradScaler, "scale", self._scale)
        if self._is_reference:
            patches.wrap(autocast, "__enter__", _switched_off)
        try:
            program()
        except Enough:
            pass
        finally:
            patches.undo()
            remove()
        return self

    def _call(self, original: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Call a module, as an island if it is to be kept."""
        name = self._names.find(module)
        if name is None:
            parent = self._stack[-1] if self._stack else None
            name = self._names.name(module, parent, sys._getframe(2) if parent is None else None)
        self.called.setdefault(name)
        self._stack.append(module)
        try:
            device = next((one for one in ("cpu", "cuda") if torch.is_autocast_enabled(one)), None)
            if device is None or not any(name == pattern or fnmatchcase(name, pattern) for pattern in self._keep):
                return original(module, *args, **kwargs)
            with torch.autocast(device, enabled=False):
                return original(module, *widened(args), **widened(kwargs))
        finally:
            self._stack.pop()

    def _backward(self, original: Callable[..., Any], roots: Any, *args: Any, **kwargs: Any) -> Any:
        is_nested = current_graph_task() != -1
        if not is_nested and self._num_updates >= self._steps:
            raise Enough
        root = roots[0] if isinstance(roots, (tuple, list)) and roots else roots
        if not is_nested and len(self.losses) <= self._num_updates and isinstance(root, Tensor) and root.numel() == 1:
            self.losses.append(float(root.detach()))
        return original(roots, *args, **kwargs)

    def _scale(self, original: Callable[..., Any], scaler: Any, outputs: Any) -> Any:
        """Note the loss before it is scaled."""
        if isinstance(outputs, Tensor) and outputs.numel() == 1 and len(self.losses) <= self._num_updates:
            self.losses.append(float(outputs.detach()))
        return original(scaler, outputs)

    def _update(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        if self.gradients is None:
            self.gradients = []
        if not self._num_updates:
            self.gradients += [w.grad.detach().double().flatten() for w in weights_of(optimizer) if w.grad is not None]
        self._num_updates += 1


def _switched_off(original: Callable[..., Any], region: Any) -> Any:
    entered = original(region)
    torch.set_autocast_enabled(region.device, False)
    return entered


def error_function(
    program: Callable[[], object], *, metric: str, steps: int, seed: int
) -> tuple[Callable[[Sequence[str]], float], list[str]]:
    """Return `error(keep)` of a program against its float32 self, and the paths of the modules that it calls.

    `metric` is "gradient" (2-norm of the difference over the 2-norm, all gradients of the first update as one vector)
    or "loss" (difference of the loss of the last of `steps` updates, relative to float32's). A program whose gradients
    never reach an optimizer has an infinite error. Raises AuditError where the float32 program does not train.
    """
    if metric not in METRICS:
        raise AuditError(f"metric {metric!r} is unknown; pass {' or '.join(METRICS)}")
    reference = Probe(steps=steps, is_reference=True).run(program, seed)
    if not reference.gradients:
        raise AuditError("the program does not train in float32: no optimizer stepped with a gradient")
    wanted = torch.cat(reference.gradients)
    norm = float(wanted.norm())
    if not norm > 0 or not torch.isfinite(wanted).all():
        raise AuditError("the float32 program has no finite gradient to compare with")

    def error(keep: Sequence[str]) -> float:
        probe = Probe(steps=steps, keep=keep).run(program, seed)
        if metric == "loss":
            if len(probe.losses) != len(reference.losses):
                return float("inf")
            last = reference.losses[-1]
            found = abs(probe.losses[-1] - last) / max(abs(last), 1e-12)
        else:
            if not probe.gradients or sum(one.numel() for one in probe.gradients) != wanted.numel():
                return float("inf")
            found = float((torch.cat(probe.gradients) - wanted).norm()) / norm
        return float("inf") if math.isnan(found) else found

    return error, list(reference.called)
