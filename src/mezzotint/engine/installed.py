"""What an engine has put into models and optimizers, so that all of it can be taken out again."""

import gc
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mezzotint.engine.lane import Lane
from mezzotint.engine.weights import ShadowedWeights
from mezzotint.errors import EngineError
from mezzotint.lowprec.rounded_linear import RoundedLinear, unround_products

if TYPE_CHECKING:
    from mezzotint.engine.engine import Engine

_live: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@dataclass(slots=True)
class Installed:
    """Hooks, rounded layers, float32 copies and waiting gradients of one engine."""

    lanes: Mapping[tuple[str, ...], Lane]
    parameters: Sequence[Tensor]
    handles: list[RemovableHandle] = field(default_factory=list)
    layers: list[RoundedLinear] = field(default_factory=list)
    shadowed: dict[str, ShadowedWeights] = field(default_factory=dict)
    originals: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    states: list[tuple[dict[str, Any], str, Tensor]] = field(default_factory=list)
    gradient_dtypes: list[nn.Parameter] = field(default_factory=list)

    def take_off(self, *, restore: bool = False) -> None:
        """Take out everything; with `restore`, give the parameters their float32 values back as well."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            unround_products(layer)
        for part in self.shadowed.values():
            part.give_back()
        if any(lane.num_micro_batches for lane in self.lanes.values()):
            # scaled, or sums that only the update of this engine would have finished
            for each in self.parameters:
                each.grad = None
            for lane in self.lanes.values():
                lane.num_micro_batches = 0
        for parameter in self.gradient_dtypes:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
        if restore:
            for parameter, values in self.originals.items():
                parameter.data = values
                parameter.grad_dtype = values.dtype
                parameter.grad = self.gradients.get(parameter)
            for state, name, value in self.states:
                state[name] = value
        for held in (self.handles, self.layers, self.gradient_dtypes):
            held.clear()
        self.shadowed.clear()
        self.keep()

    def keep(self) -> None:
        """Forget what the models were before: nothing is going to be restored."""
        self.originals.clear()
        self.gradients.clear()
        self.states.clear()


def engines_to_replace(models: Mapping[str, nn.Module], parameters: Sequence[Tensor]) -> list["Engine"]:
    """Return the engines that train these models or parameters, for the next to replace.

    Raises EngineError where one of them holds what the next would need.
    """
    found = _training(models, parameters)
    if any(engine.why_irreplaceable() for engine in found):
        del found
        gc.collect()  # an engine that only a reference cycle holds is gone
        found = _training(models, parameters)
    for engine in found:
        why = engine.why_irreplaceable()
        if why:
            raise EngineError(
                f"another Engine trains this model and {why}; call close() of that engine before making the next, or "
                "give all optimizers to one Engine"
            )
    return found


def _training(models: Mapping[str, nn.Module], parameters: Sequence[Tensor]) -> list["Engine"]:
    roots = {id(model) for model in models.values()}
    stepped = {id(parameter) for parameter in parameters}
    return [
        engine
        for engine in list(_live)
        if any(id(model) in roots for model in engine.models.values())
        or any(id(parameter) in stepped for parameter in engine.trained_parameters())
    ]


def register(engine: "Engine", installed: Installed) -> None:
    """Remember an engine as long as it lives; take what it installed out of the models when it is collected."""
    _live.add(engine)
    weakref.finalize(engine, installed.take_off).atexit = False


def forget(engine: "Engine") -> None:
    """Let another engine train the models of this one."""
    _live.discard(engine)
