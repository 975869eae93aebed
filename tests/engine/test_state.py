"""Saving and resuming the engine: the continued run has the bits of the uninterrupted one."""

import copy

import pytest
import torch
from loops import batch, same_bits, toy, values
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils._pytree import tree_leaves

import mezzotint as mz
from mezzotint.errors import CheckpointError

POLICIES = ["float32", "bf16-mixed", "fp16-mixed", "bf16-master", "bf16-kahan", "bf16-stochastic", "bf16-pure"]


def build(policy, seed=0):
    model, optimizer = toy(seed)
    model.drop.p = 0.0
    engine = mz.Engine(
        model, optimizer, policy=policy, max_grad_norm=1.0, scheduler=CosineAnnealingLR(optimizer, 40), seed=5
    )
    return model, engine


def run(model, engine, steps):
    losses = []
    for index in steps:
        with engine.forward():
            _, loss = model(*batch(index))
        engine.backward(loss)
        if engine.policy.scaling.kind != "none" and index in (3, 4, 15):
            next(model.parameters()).grad.fill_(float("inf"))
        engine.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("policy", POLICIES)
def test_resume_is_bit_exact(policy):
    model, engine = build(policy)
    expected = run(model, engine, range(20))
    expected_scale = engine.loss_scale

    model, engine = build(policy)
    losses = run(model, engine, range(10))
    saved = copy.deepcopy(engine.state_dict())
    other, resumed = build(policy, seed=9)
    run(other, resumed, range(3))  # a used engine, to be overwritten in full
    resumed.load_state_dict(saved)
    losses += run(other, resumed, range(10, 20))
    assert losses == expected
    assert resumed.loss_scale == expected_scale
    one_overflow_more = engine.policy.scaling.kind != "none"
    assert resumed.steps == engine.steps + 10 - one_overflow_more
    assert resumed.skipped_steps == engine.skipped_steps + one_overflow_more
    run(model, engine, range(10, 20))
    assert same_bits(values(other), values(model))


def test_a_gradscaler_state_is_accepted():
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    state = scaler.state_dict() | {"_growth_tracker": 7, "scale": 256.0}
    _, engine = build("fp16-mixed")
    engine.load_state_dict(state)
    assert engine.loss_scale == 256.0
    assert engine.lane_of(()).scale.growth_tracker == 7


def test_an_empty_state_is_refused():
    _, engine = build("fp16-mixed")
    with pytest.raises(CheckpointError, match="the state is empty"):
        engine.load_state_dict(torch.amp.GradScaler("cpu", enabled=False).state_dict())


def damaged(state):
    """Yield states that each differ from a good one in one part."""
    for key in state:
        if key not in ("products",):
            yield {name: value for name, value in state.items() if name != key}
            yield {**state, key: None}
    optimizer = state["optimizers"]["optimizer"]
    groups = optimizer["param_groups"]
    yield {**state, "optimizers": {"optimizer": {**optimizer, "param_groups": groups * 2}}}
    yield {**state, "optimizers": {"optimizer": {**optimizer, "param_groups": [{"params": groups[0]["params"]}]}}}
    odd = {0: {**optimizer["state"][0], "exp_avg": torch.zeros(3)}}
    yield {**state, "optimizers": {"optimizer": {**optimizer, "state": {**optimizer["state"], **odd}}}}
    yield {**state, "schedulers": {"scheduler": {"last_epoch": 3}}}
    yield {**state, "steps": -1}
    yield {**state, "lanes": [{"optimizers": ["x"], "num_steps": 0, "scale": {"scale": 1.0}}]}
    yield {**state, "lanes": [{"optimizers": ["optimizer"], "num_steps": 0, "scale": {"scale": float("nan")}}]}
    for name, part in state["weights"].items():
        yield {**state, "weights": {name: {**part, "update": "other"}}}
        if part["tensors"]:
            yield {**state, "weights": {name: {**part, "tensors": part["tensors"][:-1]}}}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_refused_state_changes_nothing(policy, monkeypatch):
    model, engine = build(policy)
    run(model, engine, range(4))
    foreign, other = build(policy, seed=3)
    run(foreign, other, range(2))
    good = copy.deepcopy(other.state_dict())
    before = copy.deepcopy(engine.state_dict())

    def check(state):
        with pytest.raises(CheckpointError):
            engine.load_state_dict(state)
        now = engine.state_dict()
        for ours, theirs in zip(tree_leaves(now), tree_leaves(before), strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs

    for state in damaged(good):
        check(state)
    scheduler = engine.schedulers["scheduler"]
    with monkeypatch.context() as patch:  # models and optimizers are written by then
        patch.setattr(type(scheduler), "load_state_dict", lambda *_: 1 / 0)
        check(good)
    engine.load_state_dict(before)
    fresh, same = build(policy)
    run(fresh, same, range(4))
    run(model, engine, range(4, 6))
    run(fresh, same, range(4, 6))
    assert same_bits(values(model), values(fresh))


def test_another_policy_is_refused():
    _, engine = build("bf16-mixed")
    _, other = build("fp16-mixed")
    with pytest.raises(CheckpointError, match="trained with policy"):
        other.load_state_dict(engine.state_dict())


def test_another_model_is_refused_before_anything_is_loaded():
    _, engine = build("bf16-mixed")
    state = copy.deepcopy(engine.state_dict())
    state["models"]["model"]["last.bias"] = torch.zeros(5)
    model, other = build("bf16-mixed", seed=4)
    before = values(model)
    with pytest.raises(CheckpointError, match=r"last\.bias has shape \(5,\) there and \(4,\) here"):
        other.load_state_dict(state)
    assert same_bits(values(model), before)


@pytest.mark.parametrize("state", [{"schema": "mezzotint.engine/99"}, {"weights": 1}])
def test_something_else_is_refused(state):
    _, engine = build("float32")
    with pytest.raises(CheckpointError, match="schema"):
        engine.load_state_dict(state)


def test_a_dead_scale_is_refused():
    _, engine = build("fp16-mixed")
    state = torch.amp.GradScaler("cpu").state_dict() | {"scale": 0.0}
    with pytest.raises(CheckpointError, match=r"0\.0 cannot be resumed"):
        engine.load_state_dict(state)
