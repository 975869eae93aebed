"""Low-precision weights that still learn: the optimizer steps float32 copies of them.

A bfloat16 weight of 1.0 has neighbours at a distance of 2**-8 and 2**-7, so an update of 1e-3 rounds away and the
weight never moves. Three ways out, each for any torch optimizer, since the optimizer only ever sees float32:

- master copies: the float32 weight is kept, the stored one is its rounding (Micikevicius et al. 2018,
  arXiv 1710.03740);
- stochastic rounding: no copy is kept; the result is rounded up or down with the probability that makes it right on
  average (Gupta et al. 2015, arXiv 1502.02551);
- Kahan compensation: what rounding dropped is kept as a second bfloat16 number and added back before the next step
  (Zamirai et al. 2020, arXiv 2010.06192, algorithm 2, with the sum formed in float32).

The optimizer's parameter groups hold the float32 copies ("shadows"). Those of the last two exist only during an
update; between updates they are empty. Where one pass over memory can do the whole step, they are never made.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mezzotint.engine import fused_update
from mezzotint.engine.fused_update import Weight
from mezzotint.errors import CheckpointError
from mezzotint.formats.rounding import Rounding
from mezzotint.policy.policy import Update
from mezzotint.torch_internals.autograd import version_of

LOW_DTYPES = (torch.bfloat16, torch.float16)


def cast_parameters(
    modules: Iterable[nn.Module],
    dtype: torch.dtype,
    originals: dict[nn.Parameter, Tensor] | None = None,
    gradients: dict[nn.Parameter, Tensor] | None = None,
) -> dict[nn.Parameter, Tensor]:
    """Store all float32 parameters of `modules` in `dtype`; return `originals`, with their float32 values added.

    Their gradients are dropped, and added to `gradients`.

    Parameters stay the same objects, so that optimizers, tied layers and hooks keep their reference. Buffers keep
    their format: running statistics and position tables are not weights.
    """
    originals = {} if originals is None else originals
    for module in modules:
        for parameter in module.parameters():
            if parameter.dtype is torch.float32 and parameter not in originals:
                originals[parameter] = parameter.data
                parameter.data = parameter.data.to(dtype)
                if parameter.grad is not None:
                    if gradients is not None:
                        gradients[parameter] = parameter.grad
                    parameter.grad = None
    return originals


def keep_gradients_float32(parameters: Iterable[nn.Parameter], changed: list[nn.Parameter] | None = None) -> None:
    """Let low-precision parameters own float32 gradients, so that sums are float32; add them to `changed`."""
    for parameter in parameters:
        if parameter.dtype in LOW_DTYPES:
            parameter.grad = None
            parameter.grad_dtype = torch.float32
            if changed is not None:
                changed.append(parameter)


class ShadowedWeights:
    """The low-precision parameters of one optimizer and the float32 copies that it steps instead.

    One update is `open()`, then the caller unscales and clips, then `step()`, or not, and `close(stepped=...)`.
    """

    def __init__(self, optimizer: Optimizer, update: Update, originals: Mapping[nn.Parameter, Tensor], seed: int):
        self._optimizer = optimizer
        self._update = update
        self._seed = seed
        self._rounds = 0  # how many updates were rounded at random: the generator's counter
        self._stored: list[nn.Parameter] = []
        self._shadows: list[nn.Parameter] = []
        self._compensations: list[Tensor] = []
        self._versions: list[int] = []
        self._num_params_seen = 0
        self._shadow_of: dict[nn.Parameter, nn.Parameter] = {}
        self._weights: dict[nn.Parameter, Weight] = {}  # by shadow
        self._is_fused = False
        self.adopt(originals)

    @property
    def is_persistent(self) -> bool:
        """Whether the float32 copies are kept between updates."""
        return self._update is Update.MASTER

    def adopt(self, originals: Mapping[nn.Parameter, Tensor] | None = None) -> None:
        """Replace low-precision parameters in the optimizer's groups by shadows, those of new groups included."""
        num_params = sum(len(group["params"]) for group in self._optimizer.param_groups)
        if num_params == self._num_params_seen:
            return
        for group in self._optimizer.param_groups:
            for position, parameter in enumerate(group["params"]):
                if parameter.dtype in LOW_DTYPES and parameter.requires_grad:
                    group["params"][position] = self._shadow(parameter, (originals or {}).get(parameter))
        self._num_params_seen = num_params

    def _shadow(self, stored: nn.Parameter, original: Tensor | None) -> nn.Parameter:
        values = stored.data.float() if original is None else original
        shadow = nn.Parameter(values if self.is_persistent else values.new_empty(0))
        self._stored.append(stored)
        self._shadows.append(shadow)
        self._shadow_of[stored] = shadow
        self._versions.append(version_of(stored))
        kept = None
        if self._update is Update.KAHAN:
            dropped = torch.zeros_like(stored.data) if original is None else original - stored.data.float()
            kept = dropped.to(stored.dtype)
            self._compensations.append(kept)
        self._weights[shadow] = Weight(stored, kept, len(self._stored) - 1)
        if stored in self._optimizer.state:
            self._optimizer.state[shadow] = self._optimizer.state.pop(stored)
        return shadow

    def give_back(self) -> None:
        """Put the stored parameters back into the optimizer's groups, with their states."""
        stored_of = {id(shadow): stored for stored, shadow in zip(self._stored, self._shadows, strict=True)}
        for group in self._optimizer.param_groups:
            group["params"][:] = [stored_of.get(id(parameter), parameter) for parameter in group["params"]]
        for stored, shadow in zip(self._stored, self._shadows, strict=True):
            if shadow in self._optimizer.state:
                self._optimizer.state[stored] = self._optimizer.state.pop(shadow)

    def stored_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the model's parameter that the optimizer steps as `parameter`."""
        weight = self._weights.get(parameter)
        return parameter if weight is None else weight.stored

    def restore_counters(self, state: Mapping[str, Any]) -> None:
        """Take back the counter and seed of `state_dict`, for weights that are again what they were then."""
        self._rounds, self._seed = state["rounds"], state["seed"]
        self.note_versions()

    def note_versions(self) -> None:
        """Take the stored weights for those that the copies belong to: nobody else wrote them."""
        self._versions = [version_of(stored) for stored in self._stored]

    def compensations(self) -> list[tuple[nn.Parameter, str, Tensor]]:
        """Return the compensations of the weights that have a gradient, as states of the update."""
        kept = zip(self._shadows, self._compensations, strict=True) if self._compensations else ()
        return [(shadow, "compensation", tensor) for shadow, tensor in kept if shadow.grad is not None]

    def tensors(self) -> list[Tensor]:
        """Return everything that a step writes beside the optimizer's states: copies and compensations."""
        return [*self._stored, *self._compensations, *(s for s in self._shadows if self.is_persistent)]

    def shadow_of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return what the optimizer steps in place of `parameter`: its shadow, or itself where it has none."""
        return self._shadow_of.get(parameter, parameter)

    @torch.no_grad()
    def open(self) -> None:
        """Bring the shadows up to date and hand them the gradients, in float32."""
        self._follow_outside_changes()
        self._is_fused = fused_update.can_step(self._optimizer, self._update, self._weights)
        for index, (stored, shadow) in enumerate(zip(self._stored, self._shadows, strict=True)):
            if stored.grad is None:
                shadow.grad = None
                continue
            if self._is_fused and not self.is_persistent:
                # one number that stands for all, as a gradient wants a parameter of its shape
                shadow.data = torch.zeros(()).expand(stored.shape)
            elif not self.is_persistent:
                values = stored.data.float()
                if self._compensations:
                    values.add_(self._compensations[index])
                shadow.data = values
            shadow.grad = stored.grad.float()

    def step(self) -> None:
        """Step the optimizer; in one pass, with the stored weights written too, where that gives the same."""
        if self._is_fused:
            offset = self._offset(0)
            fused_update.step(self._optimizer, self._update, self._weights, seed=self._seed, first_offset=offset)
        else:
            self._optimizer.step()

    def _offset(self, index: int) -> int:
        # every weight tensor of every update draws its own stretch of the counter-based stream
        return (self._rounds << 20) + index

    @torch.no_grad()
    def close(self, *, stepped: bool) -> None:
        """Write the stepped shadows back as stored weights, or forget them after a skipped update."""
        for index, (stored, shadow) in enumerate(zip(self._stored, self._shadows, strict=True)):
            if shadow.grad is None:
                continue
            if stepped:
                if not self._is_fused:
                    self._write(index, stored, shadow)
                self._versions[index] = version_of(stored)
            shadow.grad = None
            if not self.is_persistent:
                shadow.data = shadow.data.new_empty(0)
        if stepped:
            self._rounds += 1

    def _write(self, index: int, stored: nn.Parameter, shadow: nn.Parameter) -> None:
        if self._update is Update.STOCHASTIC:
            from mezzotint.kernels.tensors import round_to

            mode, offset = Rounding.STOCHASTIC, self._offset(index)
            round_to(shadow.data, "bfloat16", out=stored.data, rounding=mode, seed=self._seed, offset=offset)
        else:
            stored.copy_(shadow)
        if self._update is Update.KAHAN:
            self._compensations[index].copy_(shadow.data.sub_(stored.data))

    def _follow_outside_changes(self) -> None:
        """Take over weights that somebody else wrote (load_state_dict, weight surgery) since the last update."""
        for index, stored in enumerate(self._stored):
            if version_of(stored) != self._versions[index]:
                self._reread(index)

    def reread(self) -> None:
        """Take the stored weights as they are now; needed after a write through `.data`, which leaves no trace."""
        with torch.no_grad():
            for index in range(len(self._stored)):
                self._reread(index)

    def _reread(self, index: int) -> None:
        stored = self._stored[index]
        if self.is_persistent:
            self._shadows[index].data.copy_(stored.data)
        if self._compensations:
            self._compensations[index].zero_()
        self._versions[index] = version_of(stored)

    def state_dict(self) -> dict[str, Any]:
        """Return what the stored weights do not hold: master copies, or compensations, and the rounding counter."""
        kept = self._kept()
        return {"update": str(self._update), "rounds": self._rounds, "seed": self._seed, "tensors": kept}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; load the model's own weights before. Raises CheckpointError."""
        self.check_state(state)
        for ours, theirs in zip(self._kept(), state["tensors"], strict=True):
            ours.copy_(theirs)
        self._rounds, self._seed = int(state["rounds"]), int(state["seed"])
        self.note_versions()

    def _kept(self) -> list[Tensor]:
        return [shadow.data for shadow in self._shadows] if self.is_persistent else list(self._compensations)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError where `state` does not fit these weights."""
        if not isinstance(state, Mapping) or not {"update", "rounds", "seed", "tensors"} <= state.keys():
            raise CheckpointError(
                "the saved weights lack update, rounds, seed or tensors; pass what Engine.state_dict() returned"
            )
        kept = self._kept()
        saved = state["tensors"]
        if state["update"] != str(self._update) or [t.shape for t in saved] != [t.shape for t in kept]:
            raise CheckpointError(
                f"the saved weights were kept with update={state['update']} for {len(saved)} tensors, this engine has "
                f"update={self._update} and {len(kept)}; resume with the policy and model of the checkpoint"
            )
        int(state["rounds"]), int(state["seed"])


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[nn.Parameter, str]:
    """Return the name of each parameter, with the module's key in front where there are several modules."""
    names: dict[nn.Parameter, str] = {}
    for key, module in modules.items():
        prefix = f"{key}." if len(modules) > 1 else ""
        for name, parameter in module.named_parameters():
            names.setdefault(parameter, prefix + name.replace("_orig_mod.", ""))
    return names
