"""The engine's calls: what they refuse, several optimizers, schedulers, dtypes of the loss, compiled models."""

import copy
import gc
import pickle
import shutil

import pytest
import torch
from loops import ToyModel, batch, same_bits, toy, values
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

import mezzotint as mz
from mezzotint.errors import EngineError, PolicyError
from mezzotint.policy.presets import PRESETS


def step(engine, model, index=0):
    with engine.forward():
        _, loss = model(*batch(index))
    engine.backward(loss)
    return engine.update()


class LowLoss(nn.Module):
    """Returns its loss in the compute format, in several containers."""

    def __init__(self, container) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)
        self.container = container

    def forward(self, x):
        logits = self.layer(x)
        return self.container(logits, logits.sum())


@pytest.mark.parametrize(
    ("container", "read"),
    [
        (lambda logits, loss: loss, lambda out: (None, out)),
        (lambda logits, loss: (logits, loss), lambda out: out),
        (lambda logits, loss: [logits, loss], lambda out: out),
        (lambda logits, loss: {"logits": logits, "loss": loss}, lambda out: (out["logits"], out["loss"])),
    ],
)
def test_loss_leaves_forward_in_float32_and_logits_as_computed(container, read):
    model = LowLoss(container)
    engine = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), policy="bf16-mixed")
    with engine.forward():
        logits, loss = read(model(batch(0)[0]))
    assert loss.dtype == torch.float32
    assert logits is None or logits.dtype == torch.bfloat16
    engine.backward(loss)
    assert engine.update().stepped
    assert read(model(batch(0)[0]))[1].dtype == torch.float32
    assert model.layer.weight.dtype == torch.float32


def test_a_loss_computed_in_16_bits_outside_the_model_is_named_once():
    model = nn.Linear(8, 1)
    engine = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), policy="bf16-mixed")
    with engine.forward():
        loss = model(batch(0)[0]).mean()
    assert loss.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match=r"loss reached backward\(\) in bfloat16"):
        engine.backward(loss)
    assert engine.update().stepped
    with engine.forward():
        loss = model(batch(0)[0]).mean()
    engine.backward(loss)  # a second warning would be an error here
    engine.update()


def test_forward_is_undone_after_an_exception_and_nests():
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="bf16-mixed")
    with pytest.raises(ZeroDivisionError), engine.forward():
        raise ZeroDivisionError
    assert not torch.is_autocast_enabled("cpu")
    with engine.forward():
        with engine.forward():
            assert torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
    assert step(engine, model).stepped


def test_float32_policy_means_float32_below_the_callers_autocast():
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="float32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with engine.forward():
            assert model(*batch(0))[0].dtype == torch.float32
        assert model(*batch(0))[0].dtype == torch.bfloat16


def test_backward_inside_forward_is_refused():
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="bf16-mixed")
    with engine.forward():
        _, loss = model(*batch(0))
        with pytest.raises(EngineError, match=r"inside forward\(\)"):
            engine.backward(loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m, o: mz.Engine(m, o, max_grad_norm=-1.0, policy="float32"), "max_grad_norm=-1.0"),
        (lambda m, o: mz.Engine(m, o, accumulate=0, policy="float32"), "accumulate=0"),
        (lambda m, o: mz.Engine(m, torch.optim.LBFGS(m.parameters()), policy="float32"), "LBFGS"),
        (lambda m, o: mz.Engine(m, [], policy="float32"), "no optimizer"),
        (lambda m, o: mz.Engine(m, o, policy="float32", scheduler=ReduceLROnPlateau(o)), "steps on a metric"),
        (lambda m, o: mz.Engine(nn.ReLU(), o, policy="float32"), "no parameters"),
        (lambda m, o: mz.Engine([m, "x"], o, policy="float32"), "model '1' is a str"),
        (lambda m, o: mz.Engine(ToyModel().to("meta"), o, policy="float32"), "meta device"),
    ],
)
def test_misuse_of_the_constructor(make, message):
    model, optimizer = toy()
    with pytest.raises(EngineError, match=message):
        make(model, optimizer)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("compute=e4m3", "float8_e4m3fn"),
        ("compute=bf16, loss=bf16", "loss=bfloat16"),
        ("bf16-mixed, params=float64, state=float64", "params=float64"),
        ("params=bf16, state=bf16, compute=float32", "already"),
        ("bf16-mixed, reduce=fp16", "reduce=float16"),
        ("bf16-mixd", "did you mean bf16-mixed"),
    ],
)
def test_policies_that_are_refused(policy, message):
    model, optimizer = toy()
    with pytest.raises(PolicyError, match=message):
        mz.Engine(model, optimizer, policy=policy)


def test_calls_in_an_order_without_meaning():
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="float32")
    with pytest.raises(EngineError, match=r"without a backward"):
        engine.update()
    with engine.forward():
        logits, loss = model(*batch(0))
    with pytest.raises(EngineError, match=r"shape \(16, 4\)"):
        engine.backward(logits)
    with pytest.raises(EngineError, match="requires a gradient"):
        engine.backward(loss.detach())
    engine.backward(loss)
    with engine.forward():
        _, loss = model(*batch(0))
    with pytest.raises(EngineError, match=r"wait for update"):
        engine.backward(loss)
    with pytest.raises(EngineError, match="waiting for update"):
        engine.state_dict()
    with pytest.raises(EngineError, match="unknown optimizer 'x'"):
        engine.update("x")


def test_an_optimizer_of_another_model_is_noticed():
    model, _ = toy()
    _, optimizer = toy()
    with pytest.raises(EngineError, match="holds no parameter of this model"):
        mz.Engine(model, optimizer, policy="float32")


def test_scheduler_follows_real_steps_only():
    model, optimizer = toy()
    scheduler = LambdaLR(optimizer, lambda count: 0.5**count)
    engine = mz.Engine(model, optimizer, policy="fp16-mixed", scheduler=scheduler, accumulate=2)
    for index in range(8):
        with engine.forward():
            _, loss = model(*batch(index))
        engine.backward(loss)
        if index in (2, 3):
            next(model.parameters()).grad.fill_(float("nan"))
        engine.update()
    assert engine.steps == 3
    assert engine.skipped_steps == 1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**3)


def test_two_optimizers_on_one_loss():
    """A matrix optimizer and AdamW sharing a model: one backward, one update, both step."""
    model, _ = toy()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    start = values(model)
    engine = mz.Engine(
        model,
        {"matrices": torch.optim.SGD(matrices, lr=0.1), "others": torch.optim.AdamW(others, lr=1e-2)},
        policy="bf16-mixed",
    )
    assert step(engine, model).stepped
    assert all(not torch.equal(a, b) for a, b in zip(start, values(model), strict=True))
    assert all(p.grad is None for p in model.parameters())


class TestGan:
    """Two losses, two optimizers: each lane trains its own parameters and keeps its own scale."""

    def build(self, policy):
        torch.manual_seed(0)
        models = {"generator": nn.Linear(4, 8), "critic": nn.Linear(8, 1)}
        optimizers = {name: torch.optim.Adam(m.parameters(), lr=1e-2) for name, m in models.items()}
        return mz.Engine(models, optimizers, policy=policy), models

    def losses(self, engine, models, index):
        noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(index))
        real = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 + index)) + 2
        with engine.forward():
            fake = models["generator"](noise)
            critic = F.softplus(models["critic"](fake.detach()).float()).mean()
            critic = critic + F.softplus(-models["critic"](real).float()).mean()
        engine.backward(critic, "critic")
        yield engine.update("critic")
        with engine.forward():
            generator = F.softplus(-models["critic"](models["generator"](noise)).float()).mean()
        engine.backward(generator, "generator")
        assert models["critic"].weight.grad is None  # the generator's loss leaves the critic alone
        yield engine.update("generator")

    @pytest.mark.parametrize(
        "policy", ["float32", "bf16-mixed", "fp16-mixed, scaling=dynamic(initial=1024)", "bf16-master"]
    )
    def test_both_learn(self, policy):
        engine, models = self.build(policy)
        start = {name: values(model) for name, model in models.items()}
        for index in range(5):
            assert all(result.stepped for result in self.losses(engine, models, index))
        assert engine.steps == 10
        for name, model in models.items():
            assert not same_bits(start[name], values(model))

    def test_float32_equals_the_textbook_loop(self):
        engine, models = self.build("float32")
        for index in range(5):
            list(self.losses(engine, models, index))
        ours = [values(model) for model in models.values()]

        _, models = self.build("float32")
        optimizers = {name: torch.optim.Adam(m.parameters(), lr=1e-2) for name, m in models.items()}
        for index in range(5):
            noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(index))
            real = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 + index)) + 2
            fake = models["generator"](noise)
            optimizers["critic"].zero_grad()
            critic = F.softplus(models["critic"](fake.detach())).mean() + F.softplus(-models["critic"](real)).mean()
            critic.backward()
            optimizers["critic"].step()
            optimizers["generator"].zero_grad()
            F.softplus(-models["critic"](models["generator"](noise))).mean().backward()
            optimizers["generator"].step()
        for left, model in zip(ours, models.values(), strict=True):
            assert same_bits(left, values(model))

    def test_an_overflow_of_one_lowers_only_its_scale(self):
        engine, models = self.build("fp16-mixed, scaling=dynamic(initial=1024)")
        with engine.forward():
            loss = models["critic"](torch.randn(4, 8)).float().mean()
        engine.backward(loss, "critic")
        models["critic"].weight.grad.fill_(float("inf"))
        result = engine.update("critic")
        assert result.skipped
        assert result.nonfinite == ("critic.weight",)
        scales = {lane.optimizers: lane.scale.scale for lane in engine.lanes().values()}
        assert scales == {("critic",): 512.0}
        with engine.forward():
            loss = models["critic"](models["generator"](torch.randn(4, 4))).float().mean()
        engine.backward(loss, "generator")
        assert engine.update("generator").loss_scale == 1024.0


def test_auto_says_why():
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer)
    assert engine.decision
    assert engine.policy.params == "float32"
    assert step(engine, model).stepped


def test_gradients_are_dropped_after_the_update():
    model, optimizer = toy()
    model.unused = nn.Parameter(torch.ones(1))
    engine = mz.Engine(model, optimizer, policy="bf16-master")
    step(engine, model)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def test_evaluation_under_no_grad():
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="bf16-mixed")
    with torch.no_grad(), engine.forward():
        logits, loss = model(*batch(0))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("policy", ["float32", "bf16-mixed", "bf16-master", "fp16-mixed"])
def test_frozen_parameters_stay(policy):
    model, optimizer = toy()
    model.first.weight.requires_grad_(False)
    frozen = model.first.weight.detach().clone()
    engine = mz.Engine(model, optimizer, policy=policy)
    assert step(engine, model).stepped
    assert torch.equal(model.first.weight.float(), frozen.to(model.first.weight.dtype).float())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.parametrize("policy", ["float32", "bf16-mixed", "bf16-master"])
@pytest.mark.filterwarnings("ignore")  # torch.compile warns about its own internals
def test_compiled_models(policy):
    """A compiled model trains under the engine, and its state loads into the uncompiled one."""
    torch.manual_seed(0)
    plain = ToyModel()
    plain.drop.p = 0.0
    model = torch.compile(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = mz.Engine(model, optimizer, policy=policy, max_grad_norm=1.0)
    losses = []
    for index in range(30):
        with engine.forward():
            _, loss = model(*batch(index % 3))
        assert loss.dtype == torch.float32
        losses.append(loss.item())
        engine.backward(loss)
        assert engine.update().stepped
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    other, other_optimizer = toy(1)
    twin = mz.Engine(other, other_optimizer, policy=policy)
    twin.load_state_dict(engine.state_dict())
    assert same_bits(values(other), values(plain))


def test_models_under_the_engine_can_be_pickled_and_copied() -> None:
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy="bf16-mixed")
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert same_bits(values(other), values(model))
        with engine.forward():
            assert torch.isfinite(other(*batch(0))[1])
    assert step(engine, model).stepped


@pytest.mark.parametrize("policy", ["float32", "fp16-mixed", "bf16-master"])
@pytest.mark.parametrize("max_norm", [None, 1e-2])
def test_sparse_gradients_train_as_dense_ones_do(policy, max_norm):
    """Rows that occur twice in a batch are one row of the gradient, for its norm and for clipping."""

    def run(sparse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 4, sparse=sparse))
        engine = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), policy=policy, max_grad_norm=max_norm)
        norms = []
        for _ in range(3):
            with engine.forward():
                loss = model(torch.tensor([1, 1, 3])).float().square().sum()
            engine.backward(loss)
            norms.append(engine.update().grad_norm)
        return norms, model[0].weight.detach().clone()

    (sparse_norms, sparse), (norms, dense) = run(True), run(False)
    assert sparse_norms == pytest.approx(norms, rel=1e-6)
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=0)


@pytest.mark.parametrize("policy", ["float32", "bf16-mixed", "bf16-stochastic", "bf16-master", "fp8-mixed"])
def test_close_gives_the_model_back(policy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    parameters = list(model.parameters())
    engine = mz.Engine(model, optimizer, policy=policy)
    with engine.forward():
        loss = model(torch.ones(2, 16)).float().mean()
    engine.backward(loss)
    engine.update()
    dtypes = [p.dtype for p in parameters]
    engine.close()
    engine.close()
    assert all(type(layer) is nn.Linear and not layer._forward_hooks for layer in model)
    assert not model._forward_hooks
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in parameters]
    assert set(optimizer.state) == set(parameters)
    assert [p.dtype for p in parameters] == dtypes
    assert all(p.grad is None for p in parameters)
    for call in (engine.forward, engine.update, engine.discard, engine.state_dict, lambda: engine.backward(loss)):
        with pytest.raises(EngineError, match="was closed"):
            call()
    again = mz.Engine(model, optimizer, policy=policy)
    with again.forward():
        loss = model(torch.ones(2, 16)).float().mean()
    again.backward(loss)
    assert again.update().stepped


@pytest.mark.parametrize("is_old_alive", [True, False])
@pytest.mark.parametrize("is_optimizer_new", [True, False])
@pytest.mark.parametrize("policy", ["float32", "fp16-mixed", "bf16-stochastic", "fp8-mixed"])
def test_a_second_engine_replaces_the_first_or_names_close(policy, is_optimizer_new, is_old_alive):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    optimizer = torch.optim.AdamW(model.parameters())
    parameters = list(model.parameters())

    def step(engine):
        with engine.forward():
            loss = model(torch.ones(2, 16)).float().square().mean()
        engine.backward(loss)
        return engine.update

    first = mz.Engine(model, optimizer, policy=policy)
    step(first)()
    step(first)  # gradients that wait are gone with their engine
    second_optimizer = torch.optim.AdamW(parameters) if is_optimizer_new else optimizer
    is_replaced = first.policy.params == "float32" and first.policy.products is None
    if not is_old_alive:
        first.itself = first  # only a cycle holds it
        del first
        if is_replaced:
            gc.collect()
    elif not is_replaced:
        with pytest.raises(EngineError, match=r"another Engine trains this model and .*; call close\(\)"):
            mz.Engine(model, second_optimizer, policy=policy)
        assert first.update().stepped
        return
    second = mz.Engine(model, second_optimizer, policy=policy)
    held = {id(p) for p in second.trained_parameters()}
    assert {id(p) for p in parameters} <= held
    assert all(len(module._forward_hooks) <= 1 for module in model.modules())
    assert all(p.grad is None for p in parameters)
    assert step(second)().stepped
    if is_old_alive:
        with pytest.raises(EngineError, match="a newer Engine trains this model"):
            first.update()
        first.close()
        assert step(second)().stepped


def test_a_collected_engine_gives_the_optimizer_its_parameters():
    model, optimizer = toy()
    for policy in PRESETS:
        model = nn.Sequential(nn.Linear(16, 16))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = mz.Engine(model, optimizer, policy=policy)
        del engine
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        assert type(model[0]) is nn.Linear
        assert not model._forward_hooks


def test_an_update_of_all_optimizers_takes_the_micro_batches_of_each():
    models = {"g": nn.Linear(4, 1), "d": nn.Linear(4, 1)}
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.1) for name, model in models.items()}
    engine = mz.Engine(models, optimizers, policy="float32")
    x = torch.ones(2, 4)
    engine.backward(models["d"](x).mean(), "d")
    engine.backward(models["d"](x).mean() + models["g"](x).mean())
    with pytest.raises(EngineError, match="gradients of g, d wait together"):
        engine.update("d")
    assert engine.update().stepped
    with pytest.raises(EngineError, match=r"update\(\) without a backward\(\)"):
        engine.update("d")
