"""Engine: the three parts of a mixed precision training step, in the only order in which they are right.

    with engine.forward():            # part 1: compute format where it is safe, float32 where it matters
        logits, loss = model(inputs, targets)
    engine.backward(loss)             # part 2: float32 loss; scaled when the format needs it
    result = engine.update()          # part 3: unscale, check, clip, step the float32 weights, adapt the scale

What the engine owns, so that no loop can get it wrong: backward runs outside autocast; the loss is float32 before it
is scaled; it is divided by the number of micro-batches; gradients are unscaled once, before they are measured and
clipped; a NaN or infinity skips the step; the scale adapts once per update; the scheduler follows real steps only;
gradients are dropped after the update; low-precision weights are stepped in float32.

A *lane* is a loss and the optimizers it drives. There is one, unless `backward` names optimizers, as a GAN does; then
each set so named has its own loss scale and its own count of micro-batches.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mezzotint.engine import casting, ranks
from mezzotint.engine.forward import Float32Losses, ForwardContext
from mezzotint.engine.gradients import GradientReport, nonfinite_parameters, prepare_gradients
from mezzotint.engine.installed import Installed, engines_to_replace, forget, register
from mezzotint.engine.lane import Lane
from mezzotint.engine.optimizer_states import (
    LARGEST_SAFE_NORM,
    Trial,
    cast_states,
    find_nonfinite,
    norm_of,
    scales_by_weights,
    states_of,
    takes_root_of_difference,
)
from mezzotint.engine.products import RoundedProducts
from mezzotint.engine.result import Outcome, StepResult
from mezzotint.engine.setup import check_numbers, check_optimizers, check_schedulers, decide_policy, model_device, named
from mezzotint.engine.state import engine_state, load_engine_state
from mezzotint.engine.weights import (
    LOW_DTYPES,
    ShadowedWeights,
    cast_parameters,
    keep_gradients_float32,
    parameter_names,
)
from mezzotint.errors import EngineError, NonFiniteError, PolicyError
from mezzotint.modules.islands import find_modules, make_islands
from mezzotint.policy.decision import Decision
from mezzotint.policy.policy import Policy, Update
from mezzotint.policy.scaling import ScalingKind
from mezzotint.torch_internals.registry import Feature, require

Modules = nn.Module | Mapping[str, nn.Module] | Sequence[nn.Module]
Optimizers = Optimizer | Mapping[str, Optimizer] | Sequence[Optimizer]
Schedulers = LRScheduler | Mapping[str, LRScheduler] | Sequence[LRScheduler]


class Engine:
    """Trains any torch model under a precision policy.

    `model` is a module or several, by name or in a list; `optimizer` likewise (two for a GAN). `policy` is a Policy, a
    preset name, a policy text, or "auto": the fastest that this device runs natively, `decision` says why. A policy
    asked for by name is granted or refused, never changed. `max_grad_norm` clips the 2-norm of the unscaled gradients.
    `accumulate` is the number of micro-batches of one update. `scheduler` is stepped after every real step. `seed`
    seeds stochastic rounding.

    With `params=bfloat16` the model's float32 parameters become bfloat16 in place, and the optimizer's groups hold
    float32 copies; learning rates and other group settings are used as they are.

    A new engine for a model replaces the old one where the policy of that one stores float32 and rounds no products;
    otherwise call `close()` of the old one first, or drop it: an engine that is collected closes itself.

    Raises PolicyError where the device, the model's parameters or the engine cannot follow the policy, EngineError
    where optimizers and models do not fit together.
    """

    def __init__(
        self,
        model: Modules,
        optimizer: Optimizers,
        *,
        policy: Policy | str = "auto",
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        scheduler: Schedulers | None = None,
        seed: int = 0,
    ) -> None:
        require(Feature.ENGINE, EngineError)
        check_numbers(max_grad_norm, accumulate, seed)
        self.models = named(model, nn.Module, "model")
        self.optimizers: dict[str, Optimizer] = named(optimizer, Optimizer, "optimizer")
        self.schedulers: dict[str, LRScheduler] = named(scheduler, LRScheduler, "scheduler") if scheduler else {}
        self.max_grad_norm = max_grad_norm
        self.accumulate = accumulate
        self.device = model_device(self.models)
        self.decision = decide_policy(policy, self.device)
        self.policy = self.decision.value
        casting.check_engine_policy(self.policy)
        self._names = parameter_names(self.models)
        parameters = [*self._names, *(p for name in self.optimizers for p in self._group_parameters(name))]
        older = engines_to_replace(self.models, parameters)
        check_optimizers(self.optimizers, self._names)
        check_schedulers(self.schedulers, self.optimizers)
        ranks.check_wrappers(self.models, self.policy)
        self._check_stored_dtypes()
        kept = find_modules(self.models, self.policy.keep) if self.policy.keep else {}
        self._products = self._find_products(kept.values())
        self._kernels = casting.kernel_contexts(self.policy, self.device)
        self._forward = ForwardContext(self.policy, self.device, self.models.values())
        self._is_late_loss_told = False
        self._why_closed = ""
        self._lanes: dict[tuple[str, ...], Lane] = {}
        self._steps = self._skipped_steps = 0
        # nothing of the model or the optimizer has changed so far; what fails from here on is taken back
        self._installed = Installed(lanes=self._lanes, parameters=parameters)
        self._shadowed: dict[str, ShadowedWeights] = self._installed.shadowed
        try:
            self._install(kept.values(), seed)
        except BaseException:
            self._installed.take_off(restore=True)
            raise
        self._installed.keep()
        for engine in older:
            engine.replace()
        register(self, self._installed)

    def _install(self, kept: Iterable[nn.Module], seed: int) -> None:
        """Change models and optimizers as the policy says, and note each change."""
        installed = self._installed
        installed.handles += make_islands(kept, self.device.type)
        if self._products is not None:
            self._products.install(installed.layers)
        self._store_weights(seed)
        if self.policy.is_mixed:
            for module in self.models.values():
                installed.handles.append(module.register_forward_hook(Float32Losses(self._forward)))

    def _find_products(self, kept: Iterable[nn.Module]) -> RoundedProducts | None:
        """Find the linear layers where the policy rounds the inputs of products, and say how as a reason."""
        if self.policy.products is None:
            return None
        products = RoundedProducts(self.models, self.policy.products, self.device, kept)
        self.decision = Decision(self.policy, (*self.decision.reasons, products.reason))
        return products

    def _check_stored_dtypes(self) -> None:
        """Refuse low-precision parameters under a policy that stores float32."""
        for parameter, name in self._names.items() if self.policy.params == "float32" else ():
            if parameter.dtype in LOW_DTYPES and parameter.requires_grad:
                raise PolicyError(
                    f"parameter {name} is {_short(parameter.dtype)}, but the policy says params=float32: its "
                    "small updates would be lost; load the model in float32 (model.float()), or ask for bf16-master"
                )

    def _store_weights(self, seed: int) -> None:
        """Bring the parameters into the policy's format, and make the float32 side of each optimizer."""
        if self.policy.params == "float32":
            return
        installed = self._installed
        originals = installed.originals
        cast_parameters(self.models.values(), casting.torch_dtype(self.policy.params), originals, installed.gradients)
        for optimizer in self.optimizers.values():
            cast_states(optimizer, casting.torch_dtype(self.policy.state), installed.states)
        if self.policy.reduce == "float32":
            keep_gradients_float32(self._names, installed.gradient_dtypes)
        if self.policy.update is Update.PLAIN:
            return
        for position, (name, optimizer) in enumerate(self.optimizers.items()):
            self._shadowed[name] = ShadowedWeights(optimizer, self.policy.update, originals, seed + position)

    def close(self) -> None:
        """Give models and optimizers back: take off hooks and rounded layers, put stored weights into the optimizers.

        The weights keep their values and their dtype. Closing twice is allowed; other calls raise EngineError then.
        """
        if self._why_closed:
            return
        if self._forward.is_active:
            raise EngineError("close() was called inside forward(); leave the with-block first")
        for lane in self.lanes().values():
            self._drop_gradients(lane)
        self._take_off("this engine was closed; make a new Engine to go on training")

    def replace(self) -> None:
        """Close this engine because a newer one trains its models; gradients that wait for an update are dropped."""
        self._take_off(
            "a newer Engine trains this model, so this one was closed; call the newer one, or give all optimizers to "
            "one Engine"
        )

    def why_irreplaceable(self) -> str:
        """Return what a newer engine cannot take over from this one; nothing where it can."""
        if self._forward.is_active:
            return "is inside forward()"
        if self.policy.params != "float32":
            return f"keeps the weights of policy params={self.policy.params}, update={self.policy.update}"
        return "rounds the inputs of its linear layers" if self._products is not None else ""

    def _take_off(self, why: str) -> None:
        self._why_closed = why
        self._installed.take_off()
        forget(self)

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimizers step, those of the model in place of their float32 copies."""
        stepped = {id(p) for name in self.optimizers for p in self._group_parameters(name)}
        shadows = {id(part.shadow_of(p)): p for part in self._shadowed.values() for p in self._names}
        own = [p for name in self.optimizers for p in self._group_parameters(name)]
        return [*own, *(p for key, p in shadows.items() if key in stepped)]

    def _group_parameters(self, name: str) -> list[nn.Parameter]:
        return [parameter for group in self.optimizers[name].param_groups for parameter in group["params"]]

    def _check_open(self) -> None:
        if self._why_closed:
            raise EngineError(self._why_closed)

    # Part 1

    def forward(self) -> ForwardContext:
        """Return the context of part 1: inside it, operations run as the policy says.

        Compute the loss inside too: autocast keeps the losses it knows in float32. Nests; evaluation uses it as well,
        under torch.no_grad(). Leave it before `backward`.
        """
        self._check_open()
        return self._forward

    # Part 2

    def backward(
        self, loss: Tensor, *optimizers: str, retain_graph: bool | None = None, create_graph: bool = False
    ) -> None:
        """Add the gradients of `loss`, a scalar, to the parameters: in float32, scaled, divided by `accumulate`.

        With several optimizers, naming some makes this the loss of those alone: only their parameters receive
        gradients, and they have a loss scale of their own. Without names it is the loss of all.

        Raises EngineError inside `forward()`, for a loss that is not a scalar or has no graph, and when a complete
        set of micro-batches waits for `update()`.
        """
        self._check_open()
        if self._forward.is_active:
            raise EngineError(
                "backward() was called inside forward(), where autocast would choose the dtypes of the gradients too; "
                "leave the with-block first"
            )
        lane = self._lane(optimizers)
        self._check_scales(lane)
        if lane.num_micro_batches >= self.accumulate:
            raise EngineError(
                f"{lane.num_micro_batches} backward() calls wait for update(), and accumulate={self.accumulate}; call "
                "update() after every backward(), or pass the number of micro-batches as accumulate"
            )
        if not isinstance(loss, Tensor):
            raise EngineError(f"the loss is a {type(loss).__name__}; pass the scalar tensor that the model returned")
        if loss.dim() != 0:
            raise EngineError(f"the loss has shape {tuple(loss.shape)}; reduce it to a scalar, for example by .mean()")
        if not loss.requires_grad:
            raise EngineError(
                "the loss depends on no parameter that requires a gradient; was it computed under no_grad?"
            )
        if not lane.is_compared:
            ranks.check_later_wrapper(self.models, self.policy)
        lane.remember_loss(loss)
        if loss.dtype in LOW_DTYPES:
            self._tell_late_loss(loss)
            loss = loss.float()
        if lane.scale.settings.kind is not ScalingKind.NONE:
            loss = loss * lane.scale.scale
        if self.accumulate > 1:
            loss = loss / self.accumulate
        inputs = None if lane.is_everything else self._stored_parameters(lane)
        with _entered(self._kernels):
            torch.autograd.backward(loss, retain_graph=retain_graph, create_graph=create_graph, inputs=inputs)
        lane.num_micro_batches += 1

    # Part 3

    def update(self, *optimizers: str, flush: bool = False) -> StepResult:
        """Finish the update: unscale, check, clip, step, write weights back, step the scheduler, adapt the scale.

        While micro-batches are missing it does nothing but say so; `flush=True` updates with those there are (the
        last, shorter group of an epoch), averaged over their number.

        Raises EngineError without a backward() since the last update, and NonFiniteError, with the weights untouched,
        when NaN or infinity persists: at the scale's floor, beyond its skip budget, or in the very first loss.
        """
        self._check_open()
        lane = self._lane(optimizers)
        scale = lane.scale.scale
        if lane.num_micro_batches == 0:
            raise EngineError("update() without a backward() since the last one; call backward(loss) first")
        if lane.num_micro_batches < self.accumulate and not flush:
            return self._result(
                Outcome.ACCUMULATING, scale, reason=f"micro-batch {lane.num_micro_batches} of {self.accumulate}"
            )
        self._check_overlap(lane)
        parts = [self._shadowed[name] for name in lane.optimizers if name in self._shadowed]
        for part in parts:
            part.adopt()
            part.open()
        parameters = self._stepped_parameters(lane)
        if not parameters:
            for part in parts:
                part.close(stepped=False)
            raise EngineError(self._why_unreached())
        poisoned, states_norm = self._find_poisoned(lane, parts)
        if poisoned:
            self._end_update(lane, parts, stepped=False)
            raise NonFiniteError(poisoned, tensors=())
        report = prepare_gradients(
            parameters,
            multiplier=1.0 / scale * (self.accumulate / lane.num_micro_batches),
            is_scaled=lane.scale.settings.kind is not ScalingKind.NONE,
            max_norm=self.max_grad_norm,
        )
        difference = self._compare(lane, report)
        damage = None
        if report.are_finite and not difference:
            norm = report.norm if self.max_grad_norm is None else min(report.norm, self.max_grad_norm)
            damage = self._step_optimizers(lane, parts, max(norm, states_norm))
        nonfinite = () if report.are_finite else self._blame(parameters)
        stepped = report.are_finite and not difference and damage is None
        self._end_update(lane, parts, stepped=stepped)
        if difference:
            raise EngineError(difference)
        if damage is not None:
            return self._skip(lane, report.norm, damage[:1], where=damage[1])
        if not report.are_finite:
            return self._skip(lane, report.norm, nonfinite)
        self._steps += 1
        lane.num_steps += 1
        lane.scale = lane.scale.after(gradients_finite=True)
        self._step_schedulers(lane)
        return self._result(Outcome.STEPPED, scale, norm=report.norm)

    def discard(self, *optimizers: str) -> None:
        """Forget the micro-batches since the last update and their gradients, as if backward() had not been called."""
        self._check_open()
        lane = self._lane(optimizers)
        self._check_overlap(lane)
        self._drop_gradients(lane)

    def _find_poisoned(self, lane: Lane, parts: Sequence[ShadowedWeights]) -> tuple[str, float]:
        """Look for NaN and infinity in the states that the step is about to use.

        Returns what to say, or nothing, and the norm of the states (of the weights too, where the step scales by it).
        """
        states = [state for name in lane.optimizers for state in states_of(self.optimizers[name])]
        states += [state for part in parts for state in part.compensations()]
        norm = norm_of(tensor for _, _, tensor in states)
        found = find_nonfinite(states) if norm == math.inf else None
        if found is None:
            if any(scales_by_weights(self.optimizers[name]) for name in lane.optimizers):
                norm = max(norm, norm_of(parameter.detach() for parameter in self._stepped_parameters(lane)))
            if any(takes_root_of_difference(self.optimizers[name]) for name in lane.optimizers):
                norm = math.inf  # no size of its states is safe
            return "", norm
        name = self._name_of(found[0])
        return (
            f"the optimizer state {found[1]} of {name} holds NaN or infinity before step {self._steps + 1}, and the "
            f"step would write it into the weights, which are as they were after step {self._steps}; load a checkpoint "
            "or delete this parameter's entry from the optimizer's state to start it anew"
        ), norm

    def _step_optimizers(self, lane: Lane, parts: Sequence[ShadowedWeights], norm: float) -> tuple[str, str] | None:
        """Step; return a parameter and what its state would have become, where the step had to be taken back.

        `norm` is the largest of the norms of what the step reads.
        """
        optimizers = [self.optimizers[name] for name in lane.optimizers]
        trial = None
        if norm > LARGEST_SAFE_NORM:
            trial = Trial(optimizers, [*self._stepped_parameters(lane), *(t for part in parts for t in part.tensors())])
        for name in lane.optimizers:
            self._shadowed.get(name, self.optimizers[name]).step()
        damage = trial.find_damage() if trial is not None else None
        if trial is None or damage is None:
            return None
        trial.undo()
        for part in parts:
            part.note_versions()
        name = "a parameter" if damage[0] is None else self._name_of(damage[0])
        what = f"its optimizer state {damage[1]}" if damage[1] else "the weight itself"
        return name, (
            f"the gradient, optimizer state or weight of {name} is finite, but so large that {what} would become "
            "infinite or NaN"
        )

    def _end_update(self, lane: Lane, parts: Sequence[ShadowedWeights], *, stepped: bool) -> None:
        for part in parts:
            part.close(stepped=stepped)
        self._drop_gradients(lane)
        if self._products is not None:
            self._products.end_step()

    def _name_of(self, parameter: nn.Parameter) -> str:
        for known, name in self._names.items():
            if known is parameter or any(part.shadow_of(known) is parameter for part in self._shadowed.values()):
                return name
        return f"a parameter of shape {tuple(parameter.shape)}"

    def _compare(self, lane: Lane, report: GradientReport) -> str:
        """Compare the first update of a lane over the processes; return what differs, nothing where all agree."""
        if lane.is_compared or ranks.num_processes() == 1:
            return ""
        lane.is_compared = True
        if not ranks.is_data_parallel(self.models):
            ranks.tell_unwrapped(self.policy)
            return ""
        lane.is_loss_finite = report.are_finite or math.isfinite(lane.last_loss())
        found = ranks.agree(report.norm, self.device, are_finite=report.are_finite, is_loss_finite=lane.is_loss_finite)
        lane.is_loss_finite = found.is_loss_finite
        if found.is_same:
            return ""
        return (
            f"the processes disagree at the first update: gradient norms from {found.smallest:.6g} to "
            f"{found.largest:.6g} under policy {self.policy}, so their gradients were not reduced and each process "
            "would train alone; wrap the model in DistributedDataParallel before making the optimizer and the Engine"
        )

    def _why_unreached(self) -> str:
        if ranks.are_replaced(self.models, self._names):
            return (
                "the model's parameters were replaced after the Engine was made, as fully_shard does; wrap the model "
                "first, then make the optimizer, then the Engine"
            )
        return "backward() reached no parameter of the optimizer; does it hold the parameters of this model?"

    def _skip(self, lane: Lane, norm: float, nonfinite: tuple[str, ...], *, where: str = "") -> StepResult:
        """Adapt the scale to an overflow, or end the run when no scale can help."""
        scale = lane.scale
        loss = lane.last_loss()
        is_loss_finite = math.isfinite(loss)
        found = "not finite in another process" if is_loss_finite else str(loss)
        if not (is_loss_finite and lane.is_loss_finite) and lane.num_steps == 0 and scale.skips_in_a_row == 0:
            raise NonFiniteError(
                f"the first loss is {found}, before any weight has changed and before any scaling; check the inputs "
                "for NaN, and the model for a division by zero or a logarithm of zero",
                tensors=("loss", *nonfinite),
            )
        if not where:
            where = f"the gradient of {_some(nonfinite)} is not finite" if is_loss_finite else f"the loss is {loss}"
        exhausted = scale.exhausted_by(gradients_finite=False)
        lane.scale = scale.after(gradients_finite=False)
        self._skipped_steps += 1
        if exhausted is not None:
            raise NonFiniteError(
                f"{where} at step {self._steps + 1} and {exhausted}; the weights are as they were after step "
                f"{self._steps}: lower the learning rate, clip gradients, or run this part of the model in float32",
                tensors=nonfinite if is_loss_finite else ("loss", *nonfinite),
            )
        return self._result(Outcome.SKIPPED, scale.scale, norm=norm, nonfinite=nonfinite, reason=where)

    def _result(
        self,
        outcome: Outcome,
        loss_scale: float,
        *,
        norm: float | None = None,
        nonfinite: tuple[str, ...] = (),
        reason: str = "",
    ) -> StepResult:
        return StepResult(
            outcome=outcome,
            loss_scale=loss_scale,
            grad_norm=norm,
            step=self._steps,
            skipped_steps=self._skipped_steps,
            nonfinite=nonfinite,
            reason=reason,
        )

    def _step_schedulers(self, lane: Lane) -> None:
        for name, scheduler in self.schedulers.items():
            if lane.is_everything or name in lane.optimizers:
                scheduler.step()

    # State

    @property
    def loss_scale(self) -> float:
        """The scale that the next backward() of the lane of all optimizers will use."""
        return self._lane(()).scale.scale

    @property
    def steps(self) -> int:
        """How many real steps were taken, all lanes together."""
        return self._steps

    @property
    def skipped_steps(self) -> int:
        """How many updates were skipped for a NaN or infinity, all lanes together."""
        return self._skipped_steps

    def reread_weights(self) -> None:
        """Take over weights that were written through `.data`; other writes to weights are noticed by themselves."""
        self._check_open()
        for part in self._shadowed.values():
            part.reread()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the continued run needs: models, optimizers, schedulers, scales, float32 weights.

        Call it between updates: gradients of an incomplete accumulation are not part of it (EngineError).
        """
        self._check_open()
        return engine_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, or the state of a torch.amp.GradScaler (its scale and tracker only).

        Raises CheckpointError where the state belongs to another policy or model.
        """
        self._check_open()
        load_engine_state(self, state)

    # Lanes

    def _lane(self, optimizers: tuple[str, ...]) -> Lane:
        lane = self._lanes.get(optimizers)
        if lane is not None:
            return lane
        unknown = [name for name in optimizers if name not in self.optimizers]
        if unknown:
            raise EngineError(
                f"unknown optimizer {unknown[0]!r}; this engine has {', '.join(map(repr, self.optimizers))}"
            )
        chosen = tuple(name for name in self.optimizers if not optimizers or name in optimizers)
        lane = next((known for known in self._lanes.values() if known.optimizers == chosen), None) or Lane.start(
            chosen, self.policy.scaling, is_everything=len(chosen) == len(self.optimizers)
        )
        self._lanes[optimizers] = lane
        return lane

    def lanes(self) -> dict[tuple[str, ...], Lane]:
        """Return the lanes used so far, by the names of their optimizers."""
        return {lane.optimizers: lane for lane in self._lanes.values()}

    def lane_of(self, optimizers: tuple[str, ...]) -> Lane:
        """Return the lane of these optimizers, made on first use."""
        return self._lane(optimizers)

    def shadowed_weights(self) -> dict[str, ShadowedWeights]:
        """Return the float32 side of low-precision weights by optimizer; empty where the policy keeps none."""
        return self._shadowed

    def rounded_products(self) -> RoundedProducts | None:
        """Return the layers that round the inputs of their products; None where the policy names no format."""
        return self._products

    def set_counts(self, *, steps: int, skipped_steps: int) -> None:
        """Go on counting from a saved state."""
        self._steps, self._skipped_steps = steps, skipped_steps

    def _stepped_parameters(self, lane: Lane) -> list[nn.Parameter]:
        """Return what the lane's optimizers step and what has a gradient."""
        return [
            parameter
            for name in lane.optimizers
            for group in self.optimizers[name].param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]

    def _stored_parameters(self, lane: Lane) -> list[nn.Parameter]:
        """Return the model's parameters that the lane's optimizers train."""
        stepped = {
            id(parameter)
            for name in lane.optimizers
            for group in self.optimizers[name].param_groups
            for parameter in group["params"]
        }
        parts = [self._shadowed[name] for name in lane.optimizers if name in self._shadowed]
        return [
            parameter
            for parameter in self._names
            if parameter.requires_grad
            and (id(parameter) in stepped or any(id(part.shadow_of(parameter)) in stepped for part in parts))
        ]

    def _overlapping(self, lane: Lane) -> list[Lane]:
        """Return the other lanes with gradients in parameters of this one."""
        return [
            other
            for other in self.lanes().values()
            if other is not lane and other.num_micro_batches and not set(other.optimizers).isdisjoint(lane.optimizers)
        ]

    def _check_scales(self, lane: Lane) -> None:
        for other in self._overlapping(lane):
            if other.scale.scale != lane.scale.scale:
                raise EngineError(
                    f"gradients of {', '.join(other.optimizers)} wait at loss scale {other.scale.scale:g}, "
                    f"and this loss would be added at {lane.scale.scale:g}; call update() or discard() of those first"
                )

    def _check_overlap(self, lane: Lane) -> None:
        for other in self._overlapping(lane):
            if not set(other.optimizers) <= set(lane.optimizers):
                names = ", ".join(other.optimizers)
                raise EngineError(
                    f"gradients of {names} wait together, and this call would drop a part of them; call update() or "
                    f"discard() for {names} first"
                )

    def _drop_gradients(self, lane: Lane) -> None:
        for each in (lane, *self._overlapping(lane)):
            each.num_micro_batches = 0
        for name in lane.optimizers:
            for group in self.optimizers[name].param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        if self._shadowed or lane.is_everything:
            # the stored weights behind shadows, and parameters that no optimizer trains
            for parameter in self._names if lane.is_everything else self._stored_parameters(lane):
                parameter.grad = None

    def _blame(self, parameters: list[nn.Parameter]) -> tuple[str, ...]:
        """Return the names of the parameters whose gradient is not finite, in the model's order."""
        bad = {id(parameter) for parameter in nonfinite_parameters(parameters)}
        names = []
        for parameter, name in self._names.items():
            shadows = (part.shadow_of(parameter) for part in self._shadowed.values())
            if id(parameter) in bad or any(id(shadow) in bad for shadow in shadows):
                names.append(name)
        return tuple(names) or tuple(f"a parameter of shape {tuple(p.shape)}" for p in parameters if id(p) in bad)

    def _tell_late_loss(self, loss: Tensor) -> None:
        if not self._is_late_loss_told:
            self._is_late_loss_told = True
            warnings.warn(
                f"the loss reached backward() in {_short(loss.dtype)}: its value was rounded to 16 bits before float32 "
                "could help; compute it from logits.float()",
                stacklevel=3,
            )


def _entered(contexts: list[casting.Context]) -> ExitStack:
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _some(names: tuple[str, ...]) -> str:
    return (
        names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters" if names else "a parameter"
    )
