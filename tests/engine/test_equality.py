"""The engine computes the bits of the hand-written loop."""

from contextlib import nullcontext

import pytest
import torch
from loops import batch, same_bits, spoil, toy, values
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import mezzotint as mz
from mezzotint.engine.casting import kernel_contexts

STEPS = 50


def hand_written(dtype, accumulate, kernels):
    """Return losses and weights of the textbook loop: autocast, backward, clip, step, scheduler."""
    model, optimizer = toy()
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step / 10))
    losses = []
    torch.manual_seed(7)
    for step in range(STEPS):
        for micro in range(accumulate):
            with kernels(), torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                _, loss = model(*batch(step * accumulate + micro))
            losses.append(loss.item())
            with kernels():
                (loss / accumulate if accumulate > 1 else loss).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    return losses, values(model)


def with_engine(policy, accumulate):
    model, optimizer = toy()
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step / 10))
    engine = mz.Engine(model, optimizer, policy=policy, max_grad_norm=0.5, accumulate=accumulate, scheduler=scheduler)
    losses = []
    torch.manual_seed(7)
    for step in range(STEPS):
        for micro in range(accumulate):
            with engine.forward():
                _, loss = model(*batch(step * accumulate + micro))
            losses.append(loss.item())
            engine.backward(loss)
            result = engine.update()
            assert result.stepped == (micro == accumulate - 1)
    assert engine.steps == STEPS
    return losses, values(model), engine


@pytest.mark.parametrize("accumulate", [1, 3])
def test_float32_equals_the_loop(accumulate):
    losses, weights = hand_written(None, accumulate, nullcontext)
    ours, our_weights, _ = with_engine("float32", accumulate)
    assert ours == losses
    assert same_bits(our_weights, weights)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_bf16_mixed_equals_the_autocast_loop(accumulate):
    ours, our_weights, engine = with_engine("bf16-mixed", accumulate)
    kernels = lambda: kernel_contexts(engine.policy, engine.device)[0]  # noqa: E731
    losses, weights = hand_written(torch.bfloat16, accumulate, kernels)
    assert ours == losses
    assert same_bits(our_weights, weights)


def test_a_different_step_would_be_noticed():
    """The comparison above can fail: another clipping norm gives other weights."""
    _, weights = hand_written(None, 1, nullcontext)
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="float32", max_grad_norm=0.4)
    torch.manual_seed(7)
    for step in range(STEPS):
        with engine.forward():
            _, loss = model(*batch(step))
        engine.backward(loss)
        engine.update()
    assert not same_bits(values(model), weights)


@pytest.mark.parametrize("growth_interval", [2, 5])
def test_fp16_equals_gradscaler_through_overflows(growth_interval):
    """Scales, losses and weights equal those of torch's scaler, with overflows forced at some steps."""
    overflows = {0, 1, 7, 20, 21, 22, 40}
    policy = f"fp16-mixed, scaling=dynamic(initial=4096, growth_interval={growth_interval})"

    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy=policy, max_grad_norm=0.5)
    torch.manual_seed(7)
    ours = []
    for step in range(STEPS):
        with engine.forward():
            _, loss = model(*batch(step))
        engine.backward(loss)
        spoil(model, overflows, step)
        result = engine.update()
        if step in overflows:
            assert result.skipped
            assert "first.weight" in result.nonfinite
        ours.append((loss.item(), result.loss_scale))
    weights = values(model)

    kernels = kernel_contexts(engine.policy, engine.device)[0]
    model, optimizer = toy()
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0, growth_interval=growth_interval)
    torch.manual_seed(7)
    theirs = []
    for step in range(STEPS):
        with kernels, torch.autocast("cpu", dtype=torch.float16):
            _, loss = model(*batch(step))
        theirs.append((loss.item(), scaler.get_scale()))
        with kernels:
            scaler.scale(loss).backward()
        spoil(model, overflows, step)
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert ours == theirs
    assert engine.loss_scale == scaler.get_scale()
    assert same_bits(weights, values(model))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "RMSprop", "NAdam"])
def test_any_optimizer(name, foreach):
    """Float32 under the engine equals the bare optimizer, whichever it is."""
    results = []
    for is_ours in (True, False):
        model, _ = toy()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-2, foreach=foreach)
        engine = mz.Engine(model, optimizer, policy="float32") if is_ours else None
        torch.manual_seed(3)
        for step in range(10):
            if engine is not None:
                with engine.forward():
                    _, loss = model(*batch(step))
                engine.backward(loss)
                assert engine.update().stepped
            else:
                _, loss = model(*batch(step))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(values(model))
    assert same_bits(*results)


def test_flush_averages_over_the_micro_batches_that_came():
    """Two of four micro-batches, flushed, move the weights as an accumulation of two would (powers of two: exactly)."""
    results = []
    for accumulate in (4, 2):
        model, optimizer = toy()
        engine = mz.Engine(model, optimizer, policy="float32", accumulate=accumulate)
        torch.manual_seed(3)
        for micro in range(2):
            with engine.forward():
                _, loss = model(*batch(micro))
            engine.backward(loss)
        assert engine.update(flush=True).stepped
        results.append(values(model))
    assert same_bits(*results)
