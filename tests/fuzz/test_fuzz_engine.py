"""Engine programs with non-finite and huge numbers put in anywhere: no update ruins weights or states in silence."""

import math
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hostile import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mezzotint as mz
from mezzotint.engine.casting import kernel_contexts
from mezzotint.errors import MezzotintError
from mezzotint.policy.presets import PRESETS

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adadelta": torch.optim.Adadelta,
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
}
PLACES = ("input", "activation", "gradient", "loss", "weight", "state")
VALUES = (math.nan, math.inf, -math.inf, 1e22, -1e22, 1e30, 3.4e38, -3.4e38, 65520.0, 1e-45, 0.0)


@dataclass(frozen=True)
class Injection:
    """A number written over one element of something, in one update."""

    update: int
    place: str
    value: float
    element: int


@dataclass(frozen=True)
class Program:
    """A training run of a few updates."""

    policy: str
    optimizer: str
    max_grad_norm: float | None
    accumulate: int
    injections: tuple[Injection, ...]
    seed: int


@st.composite
def programs(draw: st.DrawFn) -> Program:
    injection = st.builds(
        Injection, st.integers(0, 3), st.sampled_from(PLACES), st.sampled_from(VALUES), st.integers(0, 1000)
    )
    return Program(
        policy=draw(st.sampled_from(list(PRESETS))),
        optimizer=draw(st.sampled_from(list(OPTIMIZERS))),
        max_grad_norm=draw(st.sampled_from([None, 1.0, 1e-3, 1e30])),
        accumulate=draw(st.integers(1, 2)),
        injections=tuple(draw(st.lists(injection, max_size=3))),
        seed=draw(st.integers(0, 3)),
    )


class Net(nn.Module):
    """Two layers and a norm; `spoil` changes what flows between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 4)
        self.spoil = lambda hidden: hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.spoil(self.first(x)))))


def put(tensor: Tensor, injection: Injection) -> None:
    """Write the injection's number over an element."""
    with torch.no_grad():
        if tensor.numel():
            index = torch.unravel_index(torch.tensor(injection.element % tensor.numel()), tensor.shape)
            tensor[tuple(index)] = injection.value


def held(engine: Any) -> dict[str, Tensor]:
    """Return every tensor that an update may change: weights, float32 copies of them, states."""
    found = {f"weight {name}": value for name, value in engine.models["model"].state_dict().items()}
    for name, optimizer in engine.optimizers.items():
        places = [one for group in optimizer.param_groups for one in group["params"]]
        for number, parameter in enumerate(places):
            found[f"stepped {name} {number}"] = parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"state {name} {number} {key}"] = value
    return found


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def data(program: Program, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * program.seed + number)
    x = torch.randn(8, 32, generator=generator)
    return x, x[:, :4].argmax(dim=1)


def forward_backward(program: Program, engine: Any, net: Net, update: int, micro: int) -> Tensor:
    """Run parts 1 and 2, with what this update has injected into them."""
    x, y = data(program, update * program.accumulate + micro)
    todays = [one for one in program.injections if one.update == update] if micro == 0 else []
    for one in todays:
        if one.place == "input":
            put(x, one)

    def spoil(hidden: Tensor) -> Tensor:
        for one in (one for one in todays if one.place == "activation"):
            mask = torch.zeros_like(hidden)
            put(mask, one)
            hidden = hidden + mask
        return hidden

    net.spoil = spoil
    with engine.forward():
        loss = nn.functional.cross_entropy(net(x), y)
        for one in (one for one in todays if one.place == "loss"):
            loss = loss * one.value
    engine.backward(loss)
    for one in (one for one in todays if one.place == "gradient"):
        parameter = list(net.parameters())[one.element % len(list(net.parameters()))]
        if parameter.grad is not None:
            put(parameter.grad, one)
    return loss


def spoil_weights(engine: Any, net: Net, injections: list[Injection]) -> None:
    for one in injections:
        if one.place == "weight":
            parameters = list(net.parameters())
            put(parameters[one.element % len(parameters)], one)
        elif one.place == "state":
            states = [
                tensor
                for name, tensor in held(engine).items()
                if name.startswith("state") and tensor.is_floating_point() and not name.endswith("step")
            ]
            if states:
                put(states[one.element % len(states)], one)


def unstepped(before: dict[str, Tensor], is_written: bool) -> list[tuple[str, Tensor]]:
    return [pair for pair in before.items() if not (is_written and pair[0].startswith("stepped"))]


def weight_of(name: str, engine: Any) -> str:
    """Return the name of the weight that a stepped tensor is, or is a copy of."""
    weights = [f"weight {one}" for one, _ in engine.models["model"].named_parameters()]
    return weights[int(name.split()[-1])] if name.startswith("stepped") else name


def check_update(engine: Any, *, is_written: bool) -> bool:
    """Run part 3 and check what it did; return whether the run goes on.

    Where the user has written to weights, their float32 copies follow even if nothing is stepped.
    """
    before = copied(held(engine))
    steps = engine.steps
    try:
        result = engine.update()
    except MezzotintError:
        after = held(engine)
        for name, tensor in unstepped(before, is_written):
            assert same(after[name], tensor), f"{name} changed although update() raised"
        assert engine.steps == steps
        return False
    after = held(engine)
    assert 0 < engine.loss_scale < math.inf
    if not result.stepped:
        assert engine.steps == steps
        for name, tensor in unstepped(before, is_written):
            assert same(after[name], tensor), f"{name} changed although the outcome is {result.outcome}"
        return True
    assert engine.steps == steps + 1
    assert result.grad_norm is not None
    assert math.isfinite(result.grad_norm)
    for name, tensor in after.items():
        if tensor.is_floating_point():
            good = tensor.isfinite()
            if not name.startswith("state") and name in before:
                # ruined by the user, before the update; float32 copies follow the weights
                for ruined in (before[name], before[weight_of(name, engine)]):
                    good |= ~ruined.isfinite() if ruined.shape == good.shape else good
            assert bool(good.all()), f"{name} is not finite after an update that says it stepped"
    moved = [name for name, tensor in after.items() if name not in before or not same(before[name], tensor)]
    assert moved or result.grad_norm == 0, "update() says it stepped, and nothing changed"
    return True


@examples(40)
@given(programs())
def test_no_update_ruins_weights_in_silence(program: Program) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(program.seed)
        net = Net()
        optimizer = OPTIMIZERS[program.optimizer](net.parameters())
        try:
            engine = mz.Engine(
                net,
                optimizer,
                policy=program.policy,
                max_grad_norm=program.max_grad_norm,
                accumulate=program.accumulate,
            )
        except MezzotintError:
            return  # refused as a whole, which tests/engine looks at
        for update in range(4):
            spoil_weights(engine, net, [one for one in program.injections if one.update == update])
            try:
                for micro in range(program.accumulate):
                    forward_backward(program, engine, net, update, micro)
                    if micro < program.accumulate - 1:
                        assert not engine.update().stepped
            except MezzotintError:
                return
            if not check_update(engine, is_written=any(one.place == "weight" for one in program.injections)):
                return


@examples(10)
@given(programs(), st.sampled_from(["float32", "bf16-mixed"]))
def test_an_undisturbed_program_equals_the_plain_loop(program: Program, policy: str) -> None:
    def trained(*, is_engine: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(program.seed)
        net = Net()
        optimizer = OPTIMIZERS[program.optimizer](net.parameters())
        losses = []
        if is_engine:
            engine = mz.Engine(
                net,
                optimizer,
                policy=policy,
                max_grad_norm=program.max_grad_norm,
                accumulate=program.accumulate,
            )
            for number in range(3 * program.accumulate):
                loss = forward_backward(plain, engine, net, *divmod(number, program.accumulate))
                losses.append(loss.item())
                engine.update()
            return losses, [p.detach() for p in net.parameters()]
        kernels = kernel_contexts(mz.Policy.parse(policy), torch.device("cpu"))
        for update in range(3):
            for micro in range(program.accumulate):
                x, y = data(program, update * program.accumulate + micro)
                with kernels[0] if kernels else nullcontext():
                    with torch.autocast("cpu", torch.bfloat16, enabled=policy != "float32"):
                        loss = nn.functional.cross_entropy(net(x), y)
                    losses.append(loss.item())
                    (loss.float() / program.accumulate if program.accumulate > 1 else loss.float()).backward()
            if program.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(net.parameters(), program.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        return losses, [p.detach() for p in net.parameters()]

    plain = Program(policy, program.optimizer, program.max_grad_norm, program.accumulate, (), program.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, our_weights = trained(is_engine=True)
        losses, weights = trained(is_engine=False)
    assert ours == losses
    assert all(torch.equal(a, b) for a, b in zip(our_weights, weights, strict=True))
