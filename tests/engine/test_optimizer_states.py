"""NaN and infinity in optimizer states, found before they reach a weight, for every policy and optimizer of torch."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import mezzotint as mz
from mezzotint.errors import MezzotintError, NonFiniteError
from mezzotint.policy.presets import PRESETS

# LBFGS is refused, SparseAdam takes sparse gradients alone
OPTIMIZERS = [
    name
    for name, kind in sorted(vars(torch.optim).items())
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam")
]
SQUARING = ["Adadelta", "Adagrad", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop"]
SETTINGS = {"SGD": {"momentum": 0.9}}


def build(optimizer, policy):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=1e-3, **SETTINGS.get(optimizer, {}))
    return model, made, mz.Engine(model, made, policy=policy)


def update(model, engine, fill=None):
    with engine.forward():
        loss = model(torch.ones(4, 16)).float().square().mean()
    engine.backward(loss)
    if fill is not None:
        next(model.parameters()).grad.fill_(fill)
    return engine.update()


def numbers(model, optimizer):
    return [
        t.detach().clone()
        for t in tree_leaves([list(model.parameters()), list(optimizer.state.values())])
        if isinstance(t, torch.Tensor)
    ]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("policy", PRESETS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_that_is_not_finite_never_reaches_a_weight(name, policy):
    try:
        model, optimizer, engine = build(name, policy)
    except MezzotintError:
        pytest.skip("refused")
    assert update(model, engine).stepped
    first = optimizer.param_groups[0]["params"][0]
    kept = copy.deepcopy(optimizer.state[first])
    formats = {str(t.dtype) for t in kept.values() if isinstance(t, torch.Tensor) and t.dim() and t.is_floating_point()}
    assert formats <= {f"torch.{engine.policy.state}"}
    for key, value in kept.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        for bad in (float("nan"), float("inf")):
            optimizer.state[first][key].data.view(-1)[-1] = bad
            before = numbers(model, optimizer)
            with pytest.raises(NonFiniteError, match=rf"state {key} of 0\.weight"):
                update(model, engine)
            assert same(numbers(model, optimizer), before)
            optimizer.state[first][key].data.copy_(value)
    assert update(model, engine).stepped


@pytest.mark.parametrize("settings", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_states_that_are_there_already_take_the_format_of_the_policy(settings):
    model = nn.Linear(16, 16)
    optimizer = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=1 / 3, **settings)
    engine = mz.Engine(model, optimizer, policy="bf16-pure")
    assert update(model, engine).stepped
    assert {state["sum"].dtype for state in optimizer.state.values()} == {torch.bfloat16}
    assert all(state["step"].dtype is torch.float32 for state in optimizer.state.values())


@pytest.mark.parametrize(
    "policy", ["float32", "bf16-mixed", "fp16-mixed", "bf16-master", "bf16-stochastic", "bf16-kahan"]
)
@pytest.mark.parametrize("name", SQUARING)
def test_a_gradient_whose_square_overflows_is_skipped(name, policy):
    model, optimizer, engine = build(name, policy)
    assert update(model, engine).stepped
    before = numbers(model, optimizer)
    scale = engine.loss_scale
    result = update(model, engine, 1e22 * scale)
    assert result.skipped
    assert result.nonfinite == ("0.weight",)
    assert "would become infinite" in result.reason
    assert same(numbers(model, optimizer), before)
    assert update(model, engine).stepped
    assert not same(numbers(model, optimizer), before)


def test_the_square_of_the_clipped_gradient_counts():
    model, optimizer, engine = build("Adam", "float32")
    engine.close()
    engine = mz.Engine(model, optimizer, policy="float32", max_grad_norm=1.0)
    assert update(model, engine, 1e22).stepped


def test_a_step_taken_back_leaves_the_continued_run_as_it_was():
    for policy in ("bf16-master", "bf16-kahan", "bf16-stochastic"):
        runs = []
        for is_disturbed in (False, True):
            model, _, engine = build("AdamW", policy)
            update(model, engine)
            if is_disturbed:
                assert update(model, engine, 1e22).skipped
            update(model, engine)
            runs.append([p.detach().clone() for p in model.parameters()])
        assert same(*runs)


@pytest.mark.parametrize("number", [3.4e38, -3.4e38, 1e30])
@pytest.mark.parametrize("name", [*SQUARING, "Adamax"])
def test_a_huge_finite_state_never_makes_a_weight_infinite(name, number):
    model, optimizer, engine = build(name, "float32")
    assert update(model, engine).stepped
    weight = next(model.parameters())
    for key in [key for key, value in optimizer.state[weight].items() if value.dim()]:
        optimizer.state[weight][key][0, 0] = number
        before = numbers(model, optimizer)
        result = update(model, engine)
        assert result.stepped or same(numbers(model, optimizer), before)
        assert all(bool(one.isfinite().all()) for one in numbers(model, optimizer))
        optimizer.state[weight][key][0, 0] = 1.0


def test_a_huge_weight_does_not_ruin_others_through_a_norm():
    model, optimizer, engine = build("Adafactor", "float32")
    with torch.no_grad():
        model[1].weight[0, 0] = 1e22
    before = numbers(model, optimizer)
    with engine.forward():
        loss = model(torch.ones(4, 16)).tanh().mean()
    engine.backward(loss)
    assert not engine.update().stepped
    assert same(numbers(model, optimizer), before)
