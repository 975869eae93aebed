"""Everything a resume needs, as one value: nested dicts, lists, numbers, texts and tensors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from mezzotint.errors import CheckpointError, EngineError
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


def load_engine_state(engine: "Engine", state: Mapping[str, Any]) -> None:
    """Bring `engine` to `state`; raise CheckpointError, with the engine unchanged, where they do not fit."""
    if "_growth_tracker" in state or not state:
        lane = engine.lane_of(())
        lane.scale = LossScale.from_json(engine.policy.scaling, state)
        return
    if state.get("schema") != SCHEMA:
        raise CheckpointError(
            f"this state has schema {state.get('schema')!r}, not {SCHEMA!r}; pass what Engine.state_dict() or "
            "torch.amp.GradScaler.state_dict() returned"
        )
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
    for name, module in engine.models.items():
        _check_model(name, module, state["models"][name])
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
    for saved in state["lanes"]:
        lane = engine.lane_of(tuple(saved["optimizers"]))
        lane.scale = LossScale.from_json(engine.policy.scaling, saved["scale"])
        lane.num_steps = int(saved["num_steps"])
        lane.num_micro_batches = 0
    engine.set_counts(steps=int(state["steps"]), skipped_steps=int(state["skipped_steps"]))


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
