"""Overflows: the scale's floor, the skip budget, and the names of what was not finite."""

import math

import pytest
import torch
from loops import batch, same_bits, spoil, toy, values
from torch import nn

import mezzotint as mz
from mezzotint.errors import NonFiniteError


def one_step(engine, model, step, spoiled=frozenset()):
    with engine.forward():
        _, loss = model(*batch(step))
    engine.backward(loss)
    spoil(model, set(spoiled), step)
    return engine.update()


def test_torch_scaler_reaches_zero_and_writes_nan_where_we_stop():
    """200 overflows take torch's scale to 0.0 and the next good step writes NaN; ours ends at the floor, by name."""
    model, optimizer = toy()
    scaler = torch.amp.GradScaler("cpu")
    for step in range(201):
        scaler.scale(model(*batch(step))[1]).backward()
        spoil(model, set(range(200)), step)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 0.0
    assert any(bool(torch.isnan(p).any()) for p in model.parameters())

    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="fp16-mixed")
    before = values(model)
    scales = []
    for step in range(16):
        scales.append(one_step(engine, model, step, range(200)).loss_scale)
    with pytest.raises(NonFiniteError, match=r"first\.weight.*floor, 1") as caught:
        one_step(engine, model, 16, range(200))
    assert scales == [65536.0 / 2**k for k in range(16)]
    assert caught.value.tensors == ("first.weight",)
    assert same_bits(values(model), before)


def test_skip_budget_ends_the_run():
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="fp16-mixed, scaling=dynamic(floor=1e-30, skip_budget=5)")
    assert one_step(engine, model, 0).stepped
    for step in range(1, 5):
        assert one_step(engine, model, step, range(1, 99)).skipped
    with pytest.raises(NonFiniteError, match="5 updates in a row were skipped"):
        one_step(engine, model, 5, range(1, 99))


def test_a_good_step_renews_the_budget():
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="fp16-mixed, scaling=dynamic(floor=1e-30, skip_budget=3)")
    bad = {1, 2, 4, 5, 7, 8}
    outcomes = [one_step(engine, model, step, bad).stepped for step in range(10)]
    assert outcomes == [step not in bad for step in range(10)]
    assert engine.skipped_steps == len(bad)


@pytest.mark.parametrize("policy", ["float32", "bf16-mixed", "bf16-master"])
def test_without_scaling_a_bad_gradient_is_skipped_not_stepped(policy):
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy=policy)
    assert one_step(engine, model, 0).stepped
    before = values(model)
    result = one_step(engine, model, 1, {1})
    assert result.skipped
    assert result.nonfinite == ("first.weight",)
    assert "first.weight" in result.reason
    assert not math.isfinite(result.grad_norm)
    assert same_bits(values(model), before)
    assert one_step(engine, model, 2).stepped


@pytest.mark.parametrize("policy", ["float32", "fp16-mixed"])
def test_nan_in_the_first_batch_stops_at_once(policy):
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy=policy)
    x, y = batch(0)
    x[0, 0] = math.nan
    with engine.forward():
        _, loss = model(x, y)
    engine.backward(loss)
    with pytest.raises(NonFiniteError, match="the first loss is nan"):
        engine.update()


def test_finite_gradients_whose_norm_leaves_float32_are_clipped_not_skipped():
    weight = nn.Linear(4, 1, bias=False)
    engine = mz.Engine(weight, torch.optim.SGD(weight.parameters(), lr=1.0), policy="float32", max_grad_norm=1.0)
    before = weight.weight.detach().clone()
    with engine.forward():
        loss = (weight(torch.ones(1, 4)) * 1e30).sum()
    engine.backward(loss)
    result = engine.update()
    assert result.stepped
    assert result.grad_norm == pytest.approx(2e30)
    torch.testing.assert_close(before - weight.weight.detach(), torch.full((1, 4), 0.5))


def test_grad_norm_is_that_of_unscaled_unclipped_gradients():
    norms = {}
    for policy in ("float32", "scaling=dynamic"):
        model, optimizer = toy()
        engine = mz.Engine(model, optimizer, policy=policy, max_grad_norm=1e-3)
        torch.manual_seed(1)
        norms[policy] = one_step(engine, model, 0).grad_norm
    assert norms["float32"] == norms["scaling=dynamic"] > 1e-2
