"""What a script's run owns, as far as it can be seen from outside: models, engines, optimizers, one step's memory.

Models and engines are looked for among the local variables of the generator; optimizers are those that step during its
turns. What is not found is left out, never guessed.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from mezzotint.engine.engine import Engine
from mezzotint.proving.weights import weights_digest
from mezzotint.training.memory import measure_call, state_memory
from mezzotint.training.step_profile import StepProfile

MEASURED_STEP = 2  # counted from 0: optimizer states exist, and it is a step that no timing counts


class Belongings:
    """The models, engines and optimizers of one run, collected turn by turn."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._engines: dict[int, Engine] = {}
        self._optimizers: dict[int, Optimizer] = {}
        self._step_bytes: int | None = None
        self.profile: StepProfile | None = None

    @contextmanager
    def watching(self, steps: Any, num_steps: int) -> Iterator[None]:
        """Collect what the step inside shows; the third step's memory is measured."""
        handle = torch_optimizer.register_optimizer_step_post_hook(self._hook()) if num_steps <= MEASURED_STEP else None
        try:
            if num_steps == MEASURED_STEP and hasattr(steps, "gi_frame"):
                with measure_call() as measured:
                    yield
                self._step_bytes, self.profile = measured.peak_bytes, measured.profile
            else:
                yield
        finally:
            if handle is not None:
                handle.remove()
                for frame in _frames(steps):
                    self._look_into(frame)

    def _hook(self) -> Any:
        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._optimizers[id(optimizer)] = optimizer

        stepped.observes_only = True  # type: ignore[attr-defined]  # the engine's fused update runs on under it
        return stepped

    def _look_into(self, variables: Mapping[str, Any]) -> None:
        for value in variables.values():
            if isinstance(value, Engine):
                self._engines[id(value)] = value
            elif isinstance(value, nn.Module):
                self._modules[id(value)] = value

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters and buffers of what was found, each once, in a fixed order."""
        roots: list[nn.Module] = [module for engine in self._engines.values() for module in engine.models.values()]
        roots += self._modules.values()
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for index, root in enumerate(roots):
            for name, tensor in (*root.named_parameters(), *root.named_buffers()):
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{index}.{name}"] = tensor
        if not found:
            for index, optimizer in enumerate(self._optimizers.values()):
                for group, settings in enumerate(optimizer.param_groups):
                    for place, parameter in enumerate(settings["params"]):
                        found[f"optimizer{index}.{group}.{place}"] = parameter
        return found

    def weights_digest(self) -> str:
        """Return a hash of the weights that were found, "" where none were."""
        found = self._parameters()
        return weights_digest(found) if found else ""

    def num_parameters(self) -> int | None:
        """Return the number of parameters, None where none were found."""
        found = [tensor for tensor in self._parameters().values() if isinstance(tensor, nn.Parameter)]
        return sum(tensor.numel() for tensor in found) or None

    def skipped_steps(self) -> int:
        """Return how many steps the engines skipped."""
        return sum(engine.skipped_steps for engine in self._engines.values())

    def memory_bytes(self) -> dict[str, int]:
        """Return weights, masters and states as far as they were found, and the peak of one step with them."""
        parts = [state_memory(engine) for engine in self._engines.values()]
        known = {id(optimizer) for engine in self._engines.values() for optimizer in engine.optimizers.values()}
        states = sum(part.optimizer_bytes for part in parts) + sum(
            value.numel() * value.element_size()
            for key, optimizer in self._optimizers.items()
            if key not in known
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self._parameters().values())
        if not weights:
            return {}
        masters = sum(part.masters_bytes for part in parts)
        found = {"weights": weights, "masters": masters, "states": states}
        if self._step_bytes is not None:
            found["peak"] = weights + masters + states + self._step_bytes
        return found

    def forget(self) -> None:
        """Let go of everything."""
        self._modules.clear()
        self._engines.clear()
        self._optimizers.clear()


def _frames(steps: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the local variables of a generator, and of those that it yields from."""
    while steps is not None:
        frame = getattr(steps, "gi_frame", None)
        if frame is None:
            return
        yield frame.f_locals
        steps = getattr(steps, "gi_yieldfrom", None)
