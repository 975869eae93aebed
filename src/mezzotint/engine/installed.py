"""What an engine has put into models and optimizers, so that all of it can be taken out again."""

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mezzotint.engine.weights import ShadowedWeights
from mezzotint.errors import EngineError
from mezzotint.lowprec.rounded_linear import RoundedLinear, unround_products

if TYPE_CHECKING:
    from mezzotint.engine.engine import Engine

_live: "weakref.WeakSet[Engine]" = weakref.WeakSet()


@dataclass(slots=True)
class Installed:
    """Hooks, rounded layers and float32 copies of one engine."""

    handles: list[RemovableHandle] = field(default_factory=list)
    layers: list[RoundedLinear] = field(default_factory=list)
    shadowed: dict[str, ShadowedWeights] = field(default_factory=dict)
    originals: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    gradients: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    gradient_dtypes: list[nn.Parameter] = field(default_factory=list)

    def take_off(self, *, restore: bool = False) -> None:
        """Take out everything; with `restore`, give the parameters their float32 values back as well."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            unround_products(layer)
        for part in self.shadowed.values():
            part.give_back()
        for parameter in self.gradient_dtypes:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype
        if restore:
            for parameter, values in self.originals.items():
                parameter.data = values
                parameter.grad_dtype = values.dtype
                parameter.grad = self.gradients.get(parameter)
        for held in (self.handles, self.layers, self.gradient_dtypes):
            held.clear()
        self.shadowed.clear()
        self.keep()

    def keep(self) -> None:
        """Forget what the models were before: nothing is going to be restored."""
        self.originals.clear()
        self.gradients.clear()


def check_free(models: Mapping[str, nn.Module], parameters: Iterable[Tensor]) -> None:
    """Refuse models and parameters that another engine trains. Raises EngineError."""
    roots = {id(model) for model in models.values()}
    stepped = {id(parameter) for parameter in parameters}
    for engine in list(_live):
        is_shared = any(id(model) in roots for model in engine.models.values())
        if is_shared or any(id(parameter) in stepped for parameter in engine.trained_parameters()):
            raise EngineError(
                "another Engine trains this model; call close() of that engine before making the next, or give all "
                "optimizers to one Engine"
            )


def register(engine: "Engine", installed: Installed) -> None:
    """Remember an engine as long as it lives; take its hooks out of the model when it is collected."""
    _live.add(engine)
    weakref.finalize(engine, _remove, installed.handles).atexit = False


def forget(engine: "Engine") -> None:
    """Let another engine train the models of this one."""
    _live.discard(engine)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
