"""The update in one pass: the weights, states and compensations of the optimizer's own step, bit for bit."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import batch, spoil, toy
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import mezzotint as mz
from mezzotint.engine import fused_update
from mezzotint.engine.weights import ShadowedWeights, cast_parameters, keep_gradients_float32
from mezzotint.policy.policy import Update

pytestmark = pytest.mark.skipif(
    not fused_update._multiplies_and_adds_at_once(),
    reason="torch rounds products before it adds here: built without FMA",
)

UPDATES = [Update.MASTER, Update.STOCHASTIC, Update.KAHAN]
POLICIES = ["bf16-master", "bf16-stochastic", "bf16-kahan"]
STEPS = 50
SHAPES = [(), (1,), (0,), (3,), (17, 5), (2049,), (300, 301), (4, 8, 3, 5)]
OPTIMIZERS = {
    "adamw": lambda params, **more: AdamW(params, lr=1e-2, **more),
    "adamw without decay": lambda params, **more: AdamW(params, lr=1e-2, weight_decay=0, betas=(0.3, 0.99), **more),
    "adam": lambda params, **more: Adam(params, lr=1e-2, **more),
    "adam with decay": lambda params, **more: Adam(params, lr=1e-2, weight_decay=0.1, eps=1e-4, **more),
    "sgd": lambda params, **more: SGD(params, lr=1e-2, **more),
    "sgd with decay": lambda params, **more: SGD(params, lr=1e-2, weight_decay=0.1, **more),
    "momentum": lambda params, **more: SGD(params, lr=1e-2, momentum=0.9, weight_decay=0.01, **more),
    "dampening": lambda params, **more: SGD(params, lr=1e-2, momentum=0.9, dampening=0.3, **more),
    "nesterov": lambda params, **more: SGD(params, lr=1e-2, momentum=0.9, nesterov=True, **more),
}


@pytest.fixture
def counted(monkeypatch):
    """Count the updates that take one pass."""
    taken = []
    step = fused_update.step
    monkeypatch.setattr(fused_update, "step", lambda *args, **kwargs: (taken.append(1), step(*args, **kwargs)))
    return taken


class Weights(nn.Module):
    """Parameters of many shapes, the last one with channels last."""

    def __init__(self, shapes, channels_last) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        if channels_last:
            tensors = [t.to(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
        self.all = nn.ParameterList(nn.Parameter(t) for t in tensors)


def train(make, update, *, is_fused, steps=STEPS, shapes=SHAPES, channels_last=True, part=None) -> ShadowedWeights:
    """Step `steps` times with gradients that depend on nothing but the step; one parameter has none at times."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_fused:
            patch.setattr(fused_update, "can_step", lambda *_: False)
        first_step = 0
        if part is None:
            model = Weights(shapes, channels_last)
            originals = cast_parameters([model], torch.bfloat16)
            keep_gradients_float32(model.parameters())
            groups = [{"params": list(model.all)[::2]}, {"params": list(model.all)[1::2], "lr": 3e-2}]
            part = ShadowedWeights(make(groups), update, originals, seed=11)
        else:
            first_step = part._rounds
        for step in range(first_step, first_step + steps):
            generator = torch.Generator().manual_seed(step)
            for index, stored in enumerate(part._stored):
                grad = torch.randn(stored.shape, generator=generator) * 10.0 ** (-step % 7 - 4)
                is_last = stored.dim() == 4 and stored.is_contiguous(memory_format=torch.channels_last)
                grad = grad.to(memory_format=torch.channels_last) if is_last else grad
                stored.grad = None if index == 4 and step % 3 == 1 else grad
            part.open()
            assert part._is_fused == is_fused
            part.step()
            part.close(stepped=True)
        return part


def tensors(part: ShadowedWeights) -> list[Tensor]:
    """Return all that an update leaves behind: stored weights, what is kept beside them, and the optimizer's state."""
    states = [state[key] for state in part._optimizer.state.values() for key in sorted(state)]
    kept = part.state_dict()["tensors"]
    return [*(p.detach() for p in part._stored), *kept, *states]


def assert_same(ours: ShadowedWeights, theirs: ShadowedWeights) -> None:
    left, right = tensors(ours), tensors(theirs)
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("more", [{}, {"foreach": True}, {"foreach": False}])
def test_fifty_updates_equal_the_optimizers_own(name, update, more):
    make = lambda params: OPTIMIZERS[name](params, **more)  # noqa: E731
    channels_last = update is not Update.STOCHASTIC  # whose random bits go by the order of contiguous elements
    ours, theirs = (train(make, update, is_fused=fused, channels_last=channels_last) for fused in (True, False))
    assert_same(ours, theirs)


# torch's vectors are at most this long; it rounds products and sums of the elements after the last whole one otherwise
LONGEST_VECTOR = 16


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_updates_equal_torchs_fused_kernels(name, update):
    """Bit for bit in whole vectors; masters and states of the rest within a bound.

    For the elements after the last whole vector torch's compiler adds the products of an average the other way round:
    kept * average + (added * grad) is rounded with the first product exact instead of the second. Each way rounds
    three times, so that one step parts both by at most 6 u of the larger product, u = 2^-24, and n steps, each of which
    shrinks what was there, by 6 n u of the largest gradient G (of G^2 for squares). SGD moves by lr times an average
    (Nesterov: twice), and averages of n steps sum up to n G: 2 lr n * 6 n u G, and 4 u of the weight W a step.
    Adam moves by lr * mean / root, at most lr * n in size, with relative errors of 6 n u (mean) and 3 n u (root).
    """
    make = lambda params: OPTIMIZERS[name](params, fused=True)  # noqa: E731
    shapes = [(16,), (300, 16), (2048, 40), (100_003,), (5,)]
    ours, theirs = (train(make, update, is_fused=fused, channels_last=False, shapes=shapes) for fused in (True, False))
    unit, largest_grad, largest_weight, lr = 2.0**-24, 6.0, 8.0, 3e-2
    moved = 2 * lr * STEPS * 9 * STEPS * unit * (1 + largest_grad) + STEPS * 4 * unit * largest_weight
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        whole = one.numel() // LONGEST_VECTOR * LONGEST_VECTOR if one.dim() else 1
        left, right = one.flatten(), other.flatten()
        assert torch.equal(left[:whole], right[:whole])
        if one.dtype is torch.float32:
            assert bool(((left - right)[whole:].abs() <= moved).all())


@settings(max_examples=25, deadline=None)
@given(
    update=st.sampled_from(UPDATES),
    lr=st.floats(1e-6, 1.0),
    betas=st.tuples(st.floats(0, 0.999), st.floats(0, 0.9999)),
    eps=st.floats(1e-10, 1e-2),
    decay=st.one_of(st.just(0.0), st.floats(1e-5, 0.5)),
    kind=st.sampled_from([AdamW, Adam]),
)
def test_adam_with_any_settings(update, lr, betas, eps, decay, kind):
    make = lambda params: kind(params, lr=lr, betas=betas, eps=eps, weight_decay=decay)  # noqa: E731
    shapes = [(7,), (33, 70)]
    assert_same(*(train(make, update, is_fused=fused, steps=5, shapes=shapes) for fused in (True, False)))


@settings(max_examples=25, deadline=None)
@given(
    update=st.sampled_from(UPDATES),
    lr=st.floats(1e-6, 1.0),
    momentum=st.one_of(st.just(0.0), st.floats(1e-3, 1.0)),
    dampening=st.one_of(st.just(0.0), st.floats(0, 1)),
    decay=st.one_of(st.just(0.0), st.floats(1e-5, 0.5)),
    nesterov=st.booleans(),
)
def test_sgd_with_any_settings(update, lr, momentum, dampening, decay, nesterov):
    nesterov = nesterov and momentum > 0
    options = {"momentum": momentum, "dampening": 0.0 if nesterov else dampening, "nesterov": nesterov}
    make = lambda params: SGD(params, lr=lr, weight_decay=decay, **options)  # noqa: E731
    shapes = [(7,), (33, 70)]
    assert_same(*(train(make, update, is_fused=fused, steps=5, shapes=shapes) for fused in (True, False)))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("name", ["adamw", "nesterov"])
@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_run_may_change_between_both_ways(name, update, order):
    make = OPTIMIZERS[name]
    whole = train(make, update, is_fused=False, channels_last=False, steps=20)
    part = train(make, update, is_fused=order[0], channels_last=False, steps=10)
    part = train(make, update, is_fused=order[1], part=part, steps=10)
    assert_same(part, whole)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    expected = train(OPTIMIZERS["adamw"], Update.STOCHASTIC, is_fused=True, steps=3, channels_last=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = train(OPTIMIZERS["adamw"], Update.STOCHASTIC, is_fused=True, steps=3, channels_last=False)
    finally:
        torch.set_num_threads(before)
    assert_same(got, expected)


def train_engine(policy, *, is_fused, optimizer_type=AdamW, steps=12, **options):
    """Train the toy with clipping, two micro-batches, a schedule and a gradient that is not finite."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_fused:
            patch.setattr(fused_update, "can_step", lambda *_: False)
        model, _ = toy()
        groups = [{"params": model.first.parameters()}, {"params": model.norm.parameters(), "lr": 3e-3}]
        optimizer = optimizer_type(groups, lr=1e-2, **options)
        scheduler = LambdaLR(optimizer, [lambda step: 1 / (1 + step), lambda step: 1.0])
        engine = mz.Engine(
            model, optimizer, policy=policy, max_grad_norm=0.05, accumulate=2, scheduler=scheduler, seed=5
        )
        optimizer.add_param_group({"params": list(model.last.parameters()), "lr": 2e-3, "initial_lr": 2e-3})
        scheduler.base_lrs.append(2e-3)
        scheduler.lr_lambdas.append(lambda step: 1.0)
        torch.manual_seed(3)
        results = []
        for step in range(steps):
            for micro in range(2):
                with engine.forward():
                    _, loss = model(*batch(2 * step + micro))
                engine.backward(loss)
                if micro:
                    spoil(model, {5}, step)
                results.append(engine.update())
        return engine, results


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("options", [{"optimizer_type": AdamW}, {"optimizer_type": SGD, "momentum": 0.9}])
def test_the_engine_trains_the_same(policy, options, counted):
    ours, our_results = train_engine(policy, is_fused=True, **options)
    assert len(counted) == 11
    theirs, results = train_engine(policy, is_fused=False, **options)
    assert len(counted) == 11
    assert [str(result) for result in our_results] == [str(result) for result in results]
    assert results[11].skipped
    assert_same(ours.shadowed_weights()["optimizer"], theirs.shadowed_weights()["optimizer"])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_checkpoint_crosses_from_one_way_to_the_other(policy, order):
    saved, _ = train_engine(policy, is_fused=order[0], steps=4)
    state = copy.deepcopy(saved.state_dict())

    def resume(is_fused):
        engine, _ = train_engine(policy, is_fused=is_fused, steps=1)
        engine.load_state_dict(copy.deepcopy(state))
        with pytest.MonkeyPatch.context() as patch:
            if not is_fused:
                patch.setattr(fused_update, "can_step", lambda *_: False)
            torch.manual_seed(8)
            for step in range(4):
                with engine.forward():
                    _, loss = engine.models["model"](*batch(step))
                engine.backward(loss)
                assert engine.update(flush=True).stepped
        return engine.shadowed_weights()["optimizer"]

    assert_same(resume(order[1]), resume(order[0]))


def step_once(optimizer_of, *, prepare=lambda model, optimizer: None, policy="bf16-kahan", model=None):
    """Train one step; return the model and its optimizer."""
    model = model or nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    optimizer = optimizer_of(model.parameters())
    engine = mz.Engine(model, optimizer, policy=policy)
    handle = prepare(model, optimizer)
    with engine.forward():
        loss = model(torch.ones(2, 8)).float().sum()
    engine.backward(loss)
    try:
        assert engine.update().stepped
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    return model, optimizer


class OwnAdamW(AdamW):
    """A subclass may do anything in its step."""


def replace_step(_, optimizer):
    own = optimizer.step
    optimizer.step = lambda closure=None: own(closure)


REFUSED = {
    "a subclass": (OwnAdamW, None),
    "amsgrad": (lambda params: AdamW(params, amsgrad=True), None),
    "maximize": (lambda params: SGD(params, lr=1e-3, maximize=True), None),
    "tensor lr": (lambda params: AdamW(params, lr=torch.tensor(1e-3), foreach=False), None),
    "another optimizer": (torch.optim.RMSprop, None),
    "a pre hook": (AdamW, lambda _, optimizer: optimizer.register_step_pre_hook(lambda *args: None)),
    "a post hook": (AdamW, lambda _, optimizer: optimizer.register_step_post_hook(lambda *args: None)),
    "a global hook": (AdamW, lambda *_: register_optimizer_step_post_hook(lambda *args: None)),
    "a replaced step": (AdamW, replace_step),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_loops_do_not_serve_goes_through_the_optimizer(name, counted):
    optimizer_of, prepare = REFUSED[name]
    model, _ = step_once(optimizer_of, prepare=prepare or (lambda *_: None))
    assert not counted
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_one_pass_is_taken_where_nothing_is_in_the_way(counted):
    step_once(AdamW)
    step_once(lambda params: SGD(params, lr=0.1), policy="bf16-stochastic")
    step_once(lambda params: AdamW(params, fused=True), policy="bf16-master")
    assert len(counted) == 3


@pytest.mark.parametrize("update", UPDATES)
def test_sparse_gradients_go_through_the_optimizer(update, counted):
    model = nn.Embedding(11, 4, sparse=True)
    originals = cast_parameters([model], torch.bfloat16)
    keep_gradients_float32(model.parameters())
    part = ShadowedWeights(SGD(model.parameters(), lr=0.5), update, originals, seed=1)
    before = model.weight.detach().clone()
    model(torch.tensor([1, 2])).float().sum().backward()
    part.open()
    part.step()
    part.close(stepped=True)
    assert not counted
    assert torch.equal((model.weight != before).any(dim=1).nonzero().flatten(), torch.tensor([1, 2]))


def test_schedulers_see_that_a_step_was_taken(counted):
    """torch warns of a scheduler before the first step, and warnings are errors here."""
    model = nn.Linear(8, 1)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    engine = mz.Engine(model, optimizer, policy="bf16-master", scheduler=scheduler)
    for _ in range(3):
        with engine.forward():
            loss = model(torch.ones(2, 8)).float().sum()
        engine.backward(loss)
        engine.update()
    assert len(counted) == 3
    assert optimizer.param_groups[0]["lr"] == 1e-3 * 0.5**3


def test_autograd_notices_the_write():
    """A graph that saved a weight before the update cannot be walked after it, as with torch's optimizers."""
    for policy in POLICIES:
        model = nn.Linear(8, 1, bias=False)
        engine = mz.Engine(model, SGD(model.parameters(), lr=0.1), policy=policy)
        kept = (model.weight * model.weight).float().sum()
        with engine.forward():
            loss = model(torch.ones(2, 8)).float().sum()
        engine.backward(loss)
        engine.update()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            kept.backward()


@pytest.mark.parametrize("update", [Update.STOCHASTIC, Update.KAHAN])
def test_no_float32_copy_is_made(update):
    """The largest tensor that an update holds beside states and gradients is a number."""
    part = train(OPTIMIZERS["sgd"], update, is_fused=True, steps=1, channels_last=False)
    for stored in part._stored:
        stored.grad = torch.ones(stored.shape)
    part.open()
    shadows = [p for group in part._optimizer.param_groups for p in group["params"]]
    assert max(p.untyped_storage().nbytes() for p in shadows) == 4
    part.step()
    assert max(p.untyped_storage().nbytes() for p in shadows) == 4
    part.close(stepped=True)
    assert sum(p.numel() for p in shadows) == 0


def test_a_probe_that_can_fail():
    """What torch is asked before the loops replace it: its product and sum, rounded once, and its roots."""
    one_rounding, two_roundings = 2.0**-11 + 2.0**-24, 2.0**-11
    near_one = torch.tensor(1 + 2.0**-12)
    assert float(torch.tensor(-1.0) + near_one * near_one) == two_roundings
    assert math.fsum((-1.0, float(near_one) ** 2)) == one_rounding
    assert fused_update._roots(True) == 0
