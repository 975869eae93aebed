"""What a storage on the ghost GPU is for: a weight, its gradient, an optimizer's state; told when optimizers step."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mezzotint.ghost.storages import Storages
from mezzotint.torch_internals.fake import FakeTensor

WEIGHTS, GRADIENTS, STATES = "weights", "gradients", "optimizer states"


class Owners:
    """Classes of storages by number. The first word on a storage counts."""

    def __init__(self, storages: Storages) -> None:
        self._storages = storages
        self._removers: list[Callable[[], None]] = []
        self.classes: dict[int, str] = {}

    def install(self) -> None:
        """Begin to listen to every optimizer."""
        self._removers.append(register_optimizer_step_pre_hook(self._before).remove)
        self._removers.append(register_optimizer_step_post_hook(self._after).remove)

    def remove(self) -> None:
        """Stop listening."""
        while self._removers:
            self._removers.pop()()

    def name(self, tensor: Any, role: str) -> None:
        """Say what a tensor is for."""
        if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda":
            number = self._storages.number_of(tensor)
            if number is not None:
                self.classes.setdefault(number, role)

    def _before(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                self.name(weight, WEIGHTS)
                if isinstance(weight, Tensor) and weight.grad is not None:
                    self.name(weight.grad, GRADIENTS)

    def _after(self, optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for states in optimizer.state.values():
            for value in states.values() if isinstance(states, dict) else ():
                self.name(value, STATES)
