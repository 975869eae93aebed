"""Linear layers whose products round their inputs, as the policy's `products` field says.

Where the device has the format, torchao's float8 layers multiply it for real; everywhere else the inputs are rounded to
it and multiplied in float32 sums. Either way only `torch.nn.Linear` itself is changed, and only where float8 hardware
could follow: both sizes are multiples of 16, and the weight is not shared with another kind of layer, as that of an
embedding is with a tied head.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.errors import CheckpointError, PolicyError
from mezzotint.formats.catalog import FLOAT8_E4M3FN, FLOAT8_E5M2
from mezzotint.formats.inputs import InputRounding, ScaleGroup
from mezzotint.hardware.probe import probe
from mezzotint.hardware.support import DeviceFacts, Support, format_support
from mezzotint.lowprec.rounded_linear import RoundedLinear, round_products
from mezzotint.process import quiet_imports

MULTIPLE = 16  # of both sizes: what torch._scaled_mm takes
_RECIPES = {
    (ScaleGroup.TENSOR, FLOAT8_E5M2.name): "tensorwise",
    (ScaleGroup.ROW, FLOAT8_E4M3FN.name): "rowwise",
}


class RoundedProducts:
    """The layers of an engine's models that round their products, and what they keep between steps."""

    def __init__(
        self, modules: Mapping[str, nn.Module], how: InputRounding, device: torch.device, kept: Iterable[nn.Module] = ()
    ) -> None:
        """Find the layers to change, but for those within `kept`. Raises PolicyError where the models have none."""
        spared = {id(layer) for module in kept for layer in module.modules()}
        layers = {name: layer for name, layer in _eligible(modules).items() if id(layer) not in spared}
        if not layers:
            raise PolicyError(
                f"products={how} is refused: the model has no torch.nn.Linear whose sizes are multiples of {MULTIPLE} "
                "and whose weight is its own; leave products out"
            )
        self.num_layers = len(layers)
        self.is_emulated, why = _is_emulated(how, probe(str(device)))
        what = "round the inputs of their products" if self.is_emulated else "multiply float8"
        self.reason = f"{len(layers)} linear layers {what}: {why}"
        self._how = how
        self._modules = modules
        self._found = layers
        self._layers: dict[str, RoundedLinear] = {}

    def install(self, layers: list[RoundedLinear]) -> None:
        """Change the layers in place, and add those that can be changed back to `layers`."""
        if not self.is_emulated:
            _convert_by_torchao(self._modules, set(map(id, self._found.values())), self._how)
            return
        for name, layer in self._found.items():
            round_products(layer, self._how)
            assert isinstance(layer, RoundedLinear)
            layers.append(layer)
            self._layers[name] = layer

    def end_step(self) -> None:
        """Make the magnitudes of this step past ones."""
        for layer in self._layers.values():
            layer.roll_magnitudes()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the magnitudes that delayed scales are made of, by layer."""
        return {name: layer.magnitudes for name, layer in self._layers.items() if layer.magnitudes is not None}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError where `state` is that of other layers."""
        ours = self.state_dict()
        if {name: tuple(t.shape) for name, t in ours.items()} != {name: tuple(t.shape) for name, t in state.items()}:
            raise CheckpointError(
                f"the checkpoint holds magnitudes of {len(state)} linear layers and this engine has {len(ours)}, or "
                "other ones; resume with the policy and model of the checkpoint"
            )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` returned. Raises CheckpointError where the layers are others."""
        self.check_state(state)
        for name, magnitudes in self.state_dict().items():
            magnitudes.copy_(state[name])


def _eligible(modules: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """Return the layers to change by name."""
    owners: dict[int, set[type[nn.Module]]] = {}
    found: dict[str, nn.Linear] = {}
    for key, root in modules.items():
        for name, module in root.named_modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), set()).add(type(module))
            if type(module) is nn.Linear:
                found.setdefault(f"{key}.{name}", module)
    return {
        name: layer
        for name, layer in found.items()
        if owners[id(layer.weight)] == {nn.Linear}
        and layer.in_features % MULTIPLE == 0 == layer.out_features % MULTIPLE
    }


def _is_emulated(how: InputRounding, facts: DeviceFacts) -> tuple[bool, str]:
    """Return whether rounding is all that is done here, and why."""
    if how.inputs != FLOAT8_E4M3FN.name:
        return True, f"no training kernel multiplies {how.inputs} here"
    support = format_support(facts, how.inputs)
    if facts.kind != "cuda" or support.support is not Support.NATIVE:
        return True, f"{facts.device} does not multiply {how.inputs} natively ({support.reason})"
    if _RECIPES.get((how.scale, how.gradients)) is None or how.history or how.is_stochastic:
        return True, "torchao scales whole tensors with E5M2 gradients, or rows with E4M3, by their own magnitude only"
    if find_spec("torchao") is None:
        return True, f"{facts.device} multiplies {how.inputs} by torchao; pip install 'mezzotint[fp8]'"
    return False, f"{support.reason}, by torchao"


def _convert_by_torchao(modules: Mapping[str, nn.Module], chosen: set[int], how: InputRounding) -> None:
    with quiet_imports():
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # its rows have scales that are powers of two, which this policy does not ask for
    recipe: Any = Float8LinearConfig.from_recipe_name(_RECIPES[how.scale, how.gradients])
    config = replace(recipe, round_scales_to_power_of_2=False)
    for root in modules.values():
        convert_to_float8_training(root, config=config, module_filter_fn=lambda module, _: id(module) in chosen)
