"""bfloat16 weights that move: master copies, stochastic rounding, Kahan compensation."""

import pytest
import torch
from loops import batch, same_bits, toy, values
from torch import nn

import mezzotint as mz
from mezzotint.errors import PolicyError

NUM_WEIGHTS = 1000
LR = 1e-3
KEEPING = ["bf16-master", "bf16-kahan", "bf16-stochastic"]


class Ones(nn.Module):
    """A thousand weights of 1.0 whose gradient is 1 everywhere, so that SGD subtracts lr from each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NUM_WEIGHTS))

    def forward(self) -> torch.Tensor:
        return self.weight.float().sum()


def train(policy, steps, optimizer_type=torch.optim.SGD):
    model = Ones()
    engine = mz.Engine(model, optimizer_type(model.parameters(), lr=LR), policy=policy, seed=3)
    for _ in range(steps):
        with engine.forward():
            loss = model()
        engine.backward(loss)
        assert engine.update().stepped
    return model.weight.detach().float()


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
def test_pure_bfloat16_weights_never_move(optimizer_type):
    moved = train("bf16-pure", 100, optimizer_type) != 1.0
    assert int(moved.sum()) == 0


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("policy", ["bf16-master", "bf16-kahan"])
def test_masters_and_kahan_reach_the_float32_answer(policy, optimizer_type):
    """All of 1000 weights move, to the float32 distance within 1 %, plus the stored weight's own half ulp."""
    steps = 300
    expected = train("float32", steps, optimizer_type)
    got = train(policy, steps, optimizer_type)
    assert int((got != 1.0).sum()) == NUM_WEIGHTS
    distance = 1.0 - expected.mean()
    half_ulp = 2.0**-9  # of a bfloat16 in [0.5, 1)
    assert torch.all((got - expected).abs() <= 0.01 * distance + half_ulp)


@pytest.mark.parametrize("optimizer_type", [torch.optim.SGD, torch.optim.AdamW])
def test_stochastic_rounding_reaches_it_in_expectation(optimizer_type):
    """The mean over 1000 independent weights lies within 5 standard errors of the float32 answer.

    One step of SGD moves a weight w in [0.5, 1) by one ulp = 2**-8 with probability p = lr / ulp, so its variance is
    p (1 - p) ulp**2 <= lr ulp, independent between steps: after n steps the standard deviation of one weight is at most
    sqrt(n lr ulp), that of the mean of 1000 weights sqrt(n lr ulp / 1000). AdamW moves by lr a step too.
    """
    steps = 300
    expected = train("float32", steps, optimizer_type)
    got = train("bf16-stochastic", steps, optimizer_type)
    assert int((got != 1.0).sum()) == NUM_WEIGHTS
    bound = 5 * (steps * LR * 2.0**-8 / NUM_WEIGHTS) ** 0.5
    assert bound < 0.01 * float(1.0 - expected.mean()) * 2
    assert abs(float((got - expected).mean())) <= bound
    assert float(got.std()) > 0


@pytest.mark.parametrize("policy", KEEPING)
def test_optimizer_steps_float32_and_model_stores_bfloat16(policy):
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy=policy)
    for step in range(3):
        with engine.forward():
            _, loss = model(*batch(step))
        engine.backward(loss)
        engine.update()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for group in optimizer.param_groups for p in group["params"])
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert states
    assert {value.dtype for value in states} == {torch.float32}
    kept = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert kept == (sum(p.numel() for p in model.parameters()) if policy == "bf16-master" else 0)


def test_master_weights_keep_the_float32_start():
    """The first update starts from the float32 weights that the model came with, not from their rounding."""
    model, optimizer = toy()
    originals = values(model)
    engine = mz.Engine(model, optimizer, policy="bf16-master")
    masters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    assert same_bits(masters, originals)
    assert same_bits(values(model), [v.bfloat16() for v in originals])
    assert engine.policy.params == "bfloat16"


@pytest.mark.parametrize("policy", KEEPING)
def test_accumulation_adds_in_float32(policy):
    """Gradients 1 + 2**-10 of many micro-batches add up, where a bfloat16 sum would stall at 256."""
    model = nn.Linear(1, 1, bias=False)
    engine = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), policy=policy, accumulate=512)
    for _ in range(512):
        with engine.forward():
            loss = model(torch.ones(1, 1)).float().sum() * 512
        engine.backward(loss)
    assert engine.update().grad_norm == pytest.approx(512.0)


@pytest.mark.parametrize("policy", KEEPING)
def test_weights_written_from_outside_are_followed(policy):
    """load_state_dict into the model between updates is not undone by an old master copy or compensation."""
    model, optimizer = toy()
    engine = mz.Engine(model, optimizer, policy=policy)
    for step in range(2):
        with engine.forward():
            _, loss = model(*batch(step))
        engine.backward(loss)
        engine.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    with engine.forward():
        _, loss = model(*batch(2))
    engine.backward(loss)
    assert engine.update().stepped
    assert all(bool((p == 0.5).all()) for p in model.parameters())


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return nn.functional.cross_entropy(self.head(self.embed(ids)).float(), ids)

    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = mz.Engine(model, optimizer, policy="bf16-master")
    for _ in range(3):
        with engine.forward():
            loss = model(torch.arange(11))
        engine.backward(loss)
        assert engine.update().stepped
    assert model.head.weight is model.embed.weight
    assert model.head.weight.dtype == torch.bfloat16
    assert len(optimizer.param_groups[0]["params"]) == 1


def test_a_parameter_group_added_later_is_shadowed_too():
    model, _ = toy()
    optimizer = torch.optim.SGD(model.first.parameters(), lr=1e-3)
    engine = mz.Engine(model, optimizer, policy="bf16-master")
    optimizer.add_param_group({"params": list(model.last.parameters()), "lr": 1e-4})
    start = [p.detach().clone() for p in model.last.parameters()]
    for step in range(60):
        with engine.forward():
            _, loss = model(*batch(step))
        engine.backward(loss)
        engine.update()
    assert all(p.dtype == torch.float32 for group in optimizer.param_groups for p in group["params"])
    assert not same_bits(start, [p.detach() for p in model.last.parameters()])
    assert len(optimizer.param_groups) == 2


def test_a_bfloat16_model_is_refused_where_the_policy_says_float32_weights():
    model, optimizer = toy()
    model.bfloat16()
    with pytest.raises(PolicyError, match=r"first\.weight is bfloat16.*params=float32"):
        mz.Engine(model, optimizer, policy="bf16-mixed")


def test_buffers_keep_their_format():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), policy="bf16-master")
    assert model[1].running_mean.dtype == torch.float32
