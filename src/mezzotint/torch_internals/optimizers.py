"""Torch's optimizers: their hooks, and how their step is wrapped."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as module

from mezzotint.torch_internals.registry import Internal, declare, exists

_NAMES = {
    "torch.optim.optimizer._global_optimizer_pre_hooks": "hooks before the step of any optimizer",
    "torch.optim.optimizer._global_optimizer_post_hooks": "hooks after the step of any optimizer",
    "torch.optim.Optimizer.profile_hook_step": "whether an optimizer's step is torch's own",
}
for _path, _purpose in _NAMES.items():
    declare(Internal(_path, f"{_purpose}; without it, optimizers step by themselves, to the same bits"))
declare(
    Internal(
        "torch.optim.Optimizer._optimizer_step_pre_hooks",
        "hooks of one optimizer before its step; without them, optimizers step by themselves, to the same bits",
        check=lambda: _has_hooks(_an_optimizer()),
    )
)
declare(
    Internal(
        "torch.optim.Optimizer._optimizer_step_post_hooks",
        "hooks of one optimizer after its step; without them, optimizers step by themselves, to the same bits",
        check=lambda: _has_hooks(_an_optimizer()),
    )
)
declare(
    Internal(
        "torch.optim.Optimizer._opt_called",
        "telling schedulers that a step was taken; without it, they warn that none was",
        check=lambda: hasattr(_a_scheduled_optimizer(), "_opt_called"),
    )
)
declare(
    Internal(
        "torch.optim.lr_scheduler.LRScheduler._wrapped_by_lr_sched",
        "whether a learning rate scheduler wrapped the step; otherwise optimizers step by themselves, to the same bits",
        check=lambda: hasattr(_a_scheduled_optimizer().step, "_wrapped_by_lr_sched"),
    )
)
_UNSCALE = "torch._amp_foreach_non_finite_check_and_unscale_"
declare(Internal(_UNSCALE, "dividing gradients by the loss scale; without it, public functions do"))


def _an_optimizer() -> Optimizer:
    return torch.optim.SGD([torch.zeros(1, device="cpu", requires_grad=True)], lr=0.0)


def _a_scheduled_optimizer() -> Optimizer:
    """Return an optimizer that has stepped once under a learning rate scheduler."""
    optimizer = _an_optimizer()
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _epoch: 1.0)
    optimizer.step()
    return optimizer


def _has_hooks(optimizer: Any) -> bool:
    return hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "_optimizer_step_post_hooks")


def _code_around_steps() -> Any:
    """Return the code that torch wraps the step of each class in, None where it does not."""
    wrap = getattr(Optimizer, "profile_hook_step", None)
    return None if wrap is None else getattr(wrap(lambda optimizer: None), "__code__", None)


_AROUND_STEPS = _code_around_steps()


def has_torch_step(optimizer: Optimizer) -> bool:
    """Return whether the step is torch's own, wrapped by nobody but learning rate schedulers, which only count.

    False where torch does not tell: then the optimizer's own step has to be called.
    """
    step = type(optimizer).step
    replaced = vars(optimizer).get("step")
    return (
        _AROUND_STEPS is not None
        and all(exists(path) for path in _NAMES)
        and getattr(step, "__code__", None) is _AROUND_STEPS
        and (
            replaced is None
            or (hasattr(replaced, "_wrapped_by_lr_sched") and getattr(replaced, "__wrapped__", None) is step)
        )
        and _has_hooks(optimizer)
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
    )


def hooks_before_steps() -> list[Callable[..., Any]]:
    """Return the hooks that run before the step of any optimizer."""
    return list(getattr(module, "_global_optimizer_pre_hooks", {}).values())


def hooks_after_steps() -> list[Callable[..., Any]]:
    """Return the hooks that run after the step of any optimizer."""
    return list(getattr(module, "_global_optimizer_post_hooks", {}).values())


def note_step(optimizer: Any) -> None:
    """Tell learning rate schedulers that a step was taken: they warn otherwise."""
    optimizer._opt_called = True


def unscale_in_place(grads: Sequence[Tensor], flag: Tensor, factor: Tensor) -> None:
    """Multiply by a factor in place, and set `flag` to 1 where anything is not finite."""
    unscale = getattr(torch, "_amp_foreach_non_finite_check_and_unscale_", None)
    if unscale is not None:
        unscale(grads, flag, factor)
        return
    for grad in grads:
        if not bool(torch.isfinite(grad).all()):
            flag.fill_(1.0)
        grad.mul_(factor.to(grad.dtype) if grad.dtype is torch.float64 else factor)
