"""The calls around a step, with the facts that were true when they were made."""

import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from mezzotint.trace import gradients
from mezzotint.trace.gradients import Gradients
from mezzotint.trace.record import Event, Trace
from mezzotint.trace.recorder import Recorder


class Bench:
    """A model, an optimizer and a scaler, recorded together."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def backward(self, *, is_scaled: bool = True) -> None:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = self.net(torch.randn(3, 4)).float().square().mean()
        (self.scaler.scale(loss) if is_scaled else loss).backward()


def recorded(program) -> Trace:
    bench = Bench()
    with Recorder(has_ranges=False) as recorder:
        program(bench)
    return recorder.trace()


def only(trace: Trace, name: str) -> Event:
    (event,) = [one for one in trace.events if one.name == name]
    return event


@pytest.mark.parametrize(
    "clip",
    [
        partial(clip_grad_norm_, max_norm=1.0),  # imported before the recorder came
        partial(clip_grad_value_, clip_value=1.0),
        lambda weights: torch.nn.utils.clip_grad_norm_(weights, 1.0),
    ],
)
@pytest.mark.parametrize("is_unscaled", [True, False])
def test_a_clip_knows_whether_gradients_carry_the_scale(clip, is_unscaled: bool):
    def program(bench: Bench) -> None:
        bench.backward()
        if is_unscaled:
            bench.scaler.unscale_(bench.optimizer)
        clip(list(bench.net.parameters()))

    facts = only(recorded(program), "clip").facts
    assert facts["num_grads"] == 2
    assert facts["num_scaled"] == (0 if is_unscaled else 2)


def test_a_norm_that_is_only_looked_at_is_no_clip():
    def program(bench: Bench) -> None:
        bench.backward()
        torch.nn.utils.get_total_norm([one.grad for one in bench.net.parameters()])

    assert not [event for event in recorded(program).events if event.name == "clip"]


def test_events_come_in_the_order_of_the_calls():
    def program(bench: Bench) -> None:
        bench.optimizer.zero_grad()
        bench.backward()
        bench.scaler.unscale_(bench.optimizer)
        bench.scaler.step(bench.optimizer)
        bench.scaler.update()

    assert [event.name for event in recorded(program).events] == [
        "optimizer.zero_grad",
        "autocast.enter",
        "autocast.exit",
        "scaler.scale",
        "backward",
        "scaler.unscale",
        "optimizer.step",
        "scaler.step",
        "scaler.update",
    ]


def test_the_scale_is_followed_through_sums_of_losses():
    def program(bench: Bench) -> None:
        losses = [bench.scaler.scale(bench.net(torch.randn(3, 4)).square().mean()) for _ in range(2)]
        (losses[0] + losses[1]).backward()

    assert only(recorded(program), "backward").facts["is_scaled"]


def test_a_scale_by_hand_is_seen():
    def program(bench: Bench) -> None:
        (bench.net(torch.randn(3, 4)).square().mean() * 1024).backward()

    facts = only(recorded(program), "backward").facts
    assert (facts["is_scaled"], facts["factor"]) == (False, 1024)


def test_a_disabled_scaler_scales_nothing():
    def program(bench: Bench) -> None:
        bench.scaler = torch.amp.GradScaler("cpu", enabled=False)
        bench.backward()
        bench.scaler.step(bench.optimizer)

    trace = recorded(program)
    assert not only(trace, "backward").facts["is_scaled"]
    assert only(trace, "optimizer.step").facts["num_scaled"] == 0


def test_a_step_past_the_scaler_is_a_step_on_scaled_gradients():
    def program(bench: Bench) -> None:
        bench.backward()
        bench.optimizer.step()

    facts = only(recorded(program), "optimizer.step").facts
    assert (facts["num_scaled"], facts["in_scaler"]) == (2, False)


def test_accumulation_after_unscaling_mixes():
    def program(bench: Bench) -> None:
        bench.backward()
        bench.scaler.unscale_(bench.optimizer)
        bench.backward()

    backwards = [event for event in recorded(program).events if event.name == "backward"]
    assert [event.facts["num_mixed"] for event in backwards] == [0, 2]


def test_zero_grad_starts_anew():
    def program(bench: Bench) -> None:
        bench.backward()
        bench.optimizer.zero_grad(set_to_none=False)
        bench.backward(is_scaled=False)

    backwards = [event for event in recorded(program).events if event.name == "backward"]
    assert [event.facts["num_mixed"] for event in backwards] == [0, 0]


@pytest.mark.parametrize("has_scaler", [True, False])
def test_what_a_checkpoint_holds(has_scaler: bool):
    def program(bench: Bench) -> None:
        state = {"nested": [{"model": bench.net.state_dict(), "optim": bench.optimizer.state_dict()}]}
        if has_scaler:
            state["amp"] = bench.scaler.state_dict()
        torch.save(state, io.BytesIO())

    holds = only(recorded(program), "save").facts["holds"]
    assert holds == (["optimizer", "scaler", "tensors"] if has_scaler else ["optimizer", "tensors"])


def test_calls_that_raise_are_noted_with_their_error():
    def program(bench: Bench) -> None:
        bench.backward()
        bench.scaler.unscale_(bench.optimizer)
        with pytest.raises(RuntimeError):
            bench.scaler.unscale_(bench.optimizer)

    events = [event for event in recorded(program).events if event.name == "scaler.unscale"]
    assert "error" not in events[0].facts
    assert "already been called" in events[1].facts["error"]


def test_regions_nest_and_belong_to_their_thread():
    def program(bench: Bench) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            bench.net(torch.randn(1, 4))
            with torch.autocast("cpu", enabled=False):
                bench.net(torch.randn(1, 4))
            bench.net(torch.randn(1, 4))

    trace = recorded(program)
    products = [one.call.autocast for one in trace.operations if one.call.name == "addmm"]
    assert products == ["bfloat16", None, "bfloat16"]
    assert [event.facts["depth"] for event in trace.events] == [1, 2, 1, 0]


def test_a_region_that_was_open_before_counts():
    net = nn.Linear(4, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16), Recorder(has_ranges=False) as recorder:
        net(torch.randn(1, 4))
    (product,) = [call for call in recorder.trace().calls if call.name == "addmm"]
    assert product.autocast == "bfloat16"


def test_a_closure_is_forward_and_backward_though_an_optimizer_calls_it():
    net = nn.Linear(4, 2)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net(torch.ones(1, 4)).square().sum()
        loss.backward()
        return loss

    with Recorder(has_ranges=False) as recorder:
        optimizer.step(closure)
    trace = recorder.trace()
    assert {call.phase for call in trace.calls if call.name == "addmm"} == {"forward"}
    assert {call.phase for call in trace.calls if call.name == "mm"} == {"backward"}
    assert len(trace.steps) == 1


class _Trainer:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.strategy = {"optimizers": [optimizer]}


_far = nn.Module  # a class of torch, whose attributes are not looked at


def _accumulating(hold, *, is_reentrant: bool = False) -> dict[str, object]:
    """Accumulate bfloat16 gradients, scaled and not, before the first step; return what the second pass found."""
    torch.manual_seed(0)
    net = nn.Linear(4, 2, dtype=torch.bfloat16)
    held = hold(torch.optim.SGD(net.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    def loss() -> torch.Tensor:
        x = torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True)
        if is_reentrant:
            return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=True).float().mean()
        return net(x.detach()).float().mean()

    with Recorder(has_ranges=False) as recorder:
        loss().backward()
        scaler.scale(loss()).backward()
    del held
    second = [one for one in recorder.trace().events if one.name == "backward" and not one.facts["is_nested"]][1]
    return {name: second.facts[name] for name in ("num_written", "num_mixed", "num_rounded")}


def _holds_far(optimizer: torch.optim.Optimizer) -> None:
    _far._held_by_a_test = optimizer


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize(
    ("hold", "num_searches"),
    [
        (lambda one: one, 0),
        (_Trainer, 0),
        (lambda one: [_Trainer(one).strategy.values], 0),
        (lambda one: lambda: one, 0),
        (_holds_far, 1),
    ],
    ids=["variable", "attribute", "builtin method", "closure", "elsewhere"],
)
def test_optimizers_are_found_wherever_they_are(monkeypatch, hold, num_searches: int, is_reentrant: bool):
    searches = []
    find = Gradients.find_optimizers
    monkeypatch.setattr(Gradients, "find_optimizers", lambda self: (searches.append(1), find(self)))
    monkeypatch.setattr(gradients, "_MAX_VISITED", 1_000_000)  # the frames of a whole suite hold many objects
    try:
        found = _accumulating(hold, is_reentrant=is_reentrant)
    finally:
        if hasattr(_far, "_held_by_a_test"):
            del _far._held_by_a_test
    assert found == {"num_written": 2, "num_mixed": 2, "num_rounded": 2}
    assert len(searches) <= 1
    if not is_reentrant:  # else the inputs are leaves, too, that no optimizer holds
        assert len(searches) == num_searches
