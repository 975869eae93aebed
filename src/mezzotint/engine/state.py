"""Everything a resume needs, as one value: nested dicts, lists, numbers, texts and tensors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mezzotint.errors import CheckpointError, EngineError, MezzotintError, PolicyError
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.scaling import LossScale
from mezzotint.torch_internals.tensors import uncompiled

if TYPE_CHECKING:
    from mezzotint.engine.engine import Engine

SCHEMA = "mezzotint.engine/1"


def engine_state(engine: "Engine") -> dict[str, Any]:
    """Return the state of `engine`; tensors are the live ones, not copies. Raises EngineError mid-accumulation."""
    waiting = [lane for lane in engine.lanes().values() if lane.num_micro_batches]
    if waiting:
        raise EngineError(
            f"state_dict() was called with {waiting[0].num_micro_batches} micro-batches waiting for update(), whose "
            "gradients it would lose; call it after update(), or update(flush=True) first"
        )
    return {
        "schema": SCHEMA,
        "policy": str(engine.policy),
        "models": {name: _inner(module).state_dict() for name, module in engine.models.items()},
        "optimizers": {name: optimizer.state_dict() for name, optimizer in engine.optimizers.items()},
        "schedulers": {name: _plain(scheduler.state_dict()) for name, scheduler in engine.schedulers.items()},
        "weights": {name: part.state_dict() for name, part in engine.shadowed_weights().items()},
        "lanes": [
            {"optimizers": list(lane.optimizers), "num_steps": lane.num_steps, "scale": lane.scale.to_json()}
            for lane in engine.lanes().values()
        ],
        "products": products.state_dict() if (products := engine.rounded_products()) is not None else {},
        "steps": engine.steps,
        "skipped_steps": engine.skipped_steps,
    }


_KEYS = ("policy", "models", "optimizers", "schedulers", "weights", "lanes", "steps", "skipped_steps")
# states that have the shape of their parameter in every optimizer of torch
_SHAPED = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "acc_delta", "exp_inf", "sum")


def load_engine_state(engine: "Engine", state: Mapping[str, Any]) -> None:
    """Bring `engine` to `state`; raise CheckpointError, with the engine unchanged, where they do not fit.

    Everything is checked first. The old weights are copied for as long as the new ones are being written, so that a
    failure in the middle is undone.
    """
    if not isinstance(state, Mapping) or not state:
        what = "empty" if isinstance(state, Mapping) else f"a {type(state).__name__}"
        raise CheckpointError(f"the state is {what}; {_PASS}")
    if "_growth_tracker" in state:
        engine.lane_of(()).scale = _scale(engine, state)
        return
    try:
        scales = _check(engine, state)
    except CheckpointError:
        raise
    except (MezzotintError, KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise CheckpointError(f"the state is damaged ({type(error).__name__}: {str(error)[:200]}); {_PASS}") from error
    before = _Before(engine)
    try:
        _copy(engine, state)
    except Exception as error:
        before.restore()
        raise CheckpointError(
            f"the state could not be copied ({type(error).__name__}: {str(error)[:200]}), and the engine is as it was "
            "before; build model, optimizer and policy as the checkpoint's were"
        ) from error
    for lane in engine.lanes().values():
        lane.num_micro_batches = 0
    for saved, scale in zip(state["lanes"], scales, strict=True):
        lane = engine.lane_of(tuple(saved["optimizers"]))
        lane.scale, lane.num_steps = scale, int(saved["num_steps"])
    engine.set_counts(steps=int(state["steps"]), skipped_steps=int(state["skipped_steps"]))


_PASS = "pass what Engine.state_dict() or torch.amp.GradScaler.state_dict() returned"


def _scale(engine: "Engine", state: Mapping[str, Any]) -> LossScale:
    try:
        return LossScale.from_json(engine.policy.scaling, state)
    except PolicyError as error:
        raise CheckpointError(str(error)) from None


def _check(engine: "Engine", state: Mapping[str, Any]) -> list[LossScale]:
    """Check every part of `state` and change nothing; return the loss scales of its lanes."""
    if state.get("schema") != SCHEMA:
        raise CheckpointError(f"this state has schema {str(state.get('schema'))[:200]!r}, not {SCHEMA!r}; {_PASS}")
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise CheckpointError(f"the state lacks {', '.join(missing)}; {_PASS}")
    saved_policy = parse_policy(state["policy"])
    if saved_policy != engine.policy:
        raise CheckpointError(
            f"the checkpoint was trained with policy {saved_policy}, this engine has {engine.policy}; resume with the "
            "checkpoint's policy"
        )
    for kind, ours in (
        ("models", engine.models),
        ("optimizers", engine.optimizers),
        ("schedulers", engine.schedulers),
        ("weights", engine.shadowed_weights()),
    ):
        if set(state[kind]) != set(ours):
            raise CheckpointError(
                f"the checkpoint has {kind} {sorted(state[kind])}, this engine has {sorted(ours)}; build the engine as "
                "the checkpoint's was"
            )
    _check_parts(engine, state)
    for number in (state["steps"], state["skipped_steps"], *(saved["num_steps"] for saved in state["lanes"])):
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise CheckpointError(f"the state counts {str(number)[:200]!r} steps; {_PASS}")
    for saved in state["lanes"]:
        if not set(saved["optimizers"]) <= set(engine.optimizers):
            raise CheckpointError(f"the state has a loss scale for {saved['optimizers']}, which this engine lacks")
    return [_scale(engine, saved["scale"]) for saved in state["lanes"]]


def _check_parts(engine: "Engine", state: Mapping[str, Any]) -> None:
    for name, module in engine.models.items():
        _check_model(name, module, state["models"][name])
    for name in engine.optimizers:
        _check_optimizer(name, engine, state["optimizers"][name])
    for name, scheduler in engine.schedulers.items():
        ours, theirs = set(_plain(scheduler.state_dict())), set(state["schedulers"][name])
        if ours != theirs:
            raise CheckpointError(
                f"the checkpoint's scheduler {name!r} has {sorted(theirs)[:20]}, this one has {sorted(ours)[:20]}; "
                "make the scheduler of the checkpoint"
            )
    for name, part in engine.shadowed_weights().items():
        part.check_state(state["weights"][name])
    products = engine.rounded_products()
    if products is not None:
        products.check_state(state.get("products", {}))


def _check_optimizer(name: str, engine: "Engine", state: Mapping[str, Any]) -> None:
    """Refuse a state of other parameter groups, or with tensors of other shapes than the parameters."""
    groups = engine.optimizers[name].param_groups
    ours, theirs = [len(g["params"]) for g in groups], [len(g["params"]) for g in state["param_groups"]]
    if ours != theirs:
        raise CheckpointError(
            f"the checkpoint's optimizer {name!r} has parameter groups of {theirs} parameters, this one of {ours}; "
            "make the optimizer of the checkpoint"
        )
    lacking = sorted(set(groups[0]) - set(state["param_groups"][0]) - {"params"}) if groups else []
    if lacking:
        raise CheckpointError(
            f"the checkpoint's optimizer {name!r} has no setting {lacking[0]!r}; make the optimizer of the checkpoint"
        )
    part = engine.shadowed_weights().get(name)
    parameters = [part.stored_of(p) if part is not None else p for group in groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    shapes = dict(zip(indices, (tuple(p.shape) for p in parameters), strict=True))
    for index, values in state["state"].items():
        if index not in shapes:
            raise CheckpointError(
                f"the checkpoint's optimizer {name!r} has a state of no parameter, {index!r}; {_PASS}"
            )
        for key, value in values.items():
            if key in _SHAPED and isinstance(value, Tensor) and tuple(value.shape) != shapes[index]:
                raise CheckpointError(
                    f"the checkpoint's optimizer {name!r} holds {key} of shape {tuple(value.shape)} for a parameter of "
                    f"shape {shapes[index]}; build the model with the configuration of the checkpoint"
                )


def _copy(engine: "Engine", state: Mapping[str, Any]) -> None:
    for name, module in engine.models.items():
        _inner(module).load_state_dict(state["models"][name])
    for name, optimizer in engine.optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    for name, scheduler in engine.schedulers.items():
        scheduler.load_state_dict(dict(state["schedulers"][name]))
    for name, part in engine.shadowed_weights().items():
        part.load_state_dict(state["weights"][name])
    products = engine.rounded_products()
    if products is not None:
        products.load_state_dict(state.get("products", {}))


class _Before:
    """What loading overwrites: copies of tensors that are written in place, and the objects that are replaced."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        held: list[Tensor] = []
        for module in engine.models.values():
            held += [t for t in _inner(module).state_dict().values() if isinstance(t, Tensor)]
        self._parts = list(engine.shadowed_weights().values())
        self._settings = [part.state_dict() for part in self._parts]
        for settings in self._settings:
            held += settings["tensors"]
        products = engine.rounded_products()
        held += products.state_dict().values() if products is not None else ()
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in held]
        # torch's optimizers replace their groups and states and write into neither
        self._optimizers = [
            (o, o.param_groups, [dict(g) for g in o.param_groups], o.state, dict(o.state))
            for o in engine.optimizers.values()
        ]
        self._schedulers = [(s, dict(vars(s))) for s in engine.schedulers.values()]

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for tensor, values in self._tensors:
                tensor.copy_(values)
        for optimizer, groups, settings, state, entries in self._optimizers:
            for group, entry in zip(groups, settings, strict=True):
                group.clear()
                group.update(entry)
            state.clear()
            state.update(entries)
            optimizer.param_groups, optimizer.state = groups, state
        for scheduler, attributes in self._schedulers:
            vars(scheduler).clear()
            vars(scheduler).update(attributes)
        for part, counters in zip(self._parts, self._settings, strict=True):
            part.restore_counters(counters)


def _check_model(name: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a state whose tensors are not those of `module`, before anything is loaded."""
    ours = {key: tuple(value.shape) for key, value in _inner(module).state_dict().items() if hasattr(value, "shape")}
    theirs = {key: tuple(value.shape) for key, value in state.items() if hasattr(value, "shape")}
    for key in [*ours, *theirs]:
        if ours.get(key) != theirs.get(key):
            raise CheckpointError(
                f"the checkpoint's {name} does not fit this one: {key} has shape {theirs.get(key, 'none')} there and "
                f"{ours.get(key, 'none')} here; build the model with the configuration of the checkpoint"
            )


def _inner(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile wrapped, so that a checkpoint does not depend on compilation."""
    return uncompiled(module)


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's state without the functions that LambdaLR leaves in it as None or objects."""
    return {key: value for key, value in state.items() if not callable(value)}
