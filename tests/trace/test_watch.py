"""`mz.watch`: rows and alarms of a training that stays the same to the bit."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from programs import EAGER
from torch import nn
from torch.optim import optimizer as optimizer_hooks

from mezzotint.errors import AuditError
from mezzotint.trace.alarms import Alarm, Limits
from mezzotint.trace.watch import Watch


@pytest.mark.parametrize("name", list(EAGER))
def test_a_watched_training_is_the_same(name: str):
    def train(**options) -> list[torch.Tensor]:
        program = EAGER[name]()
        if options:
            with Watch(**options) as watch:
                losses = [program.step().clone() for _ in range(8)]
            assert len(watch.rows) >= 3
        else:
            losses = [program.step().clone() for _ in range(8)]
        return losses + [value.clone() for model in program.models for value in model.state_dict().values()]

    for one, two in zip(train(), train(every=3), strict=True):
        assert torch.equal(one, two)


def test_rows_say_what_each_module_wrote(tmp_path: Path):
    program = EAGER["language_model"]()
    out = tmp_path / "metrics.jsonl"
    with Watch(every=5, out=out) as watch:
        for _ in range(11):
            program.step()
    assert watch.num_steps == 11
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "watch"] == [0, 5, 10]
    modules = lines[-1]["modules"]
    for name in ("model.blocks.0.attention", "model.blocks.1.feed_forward"):
        assert any(key.startswith(name) for key in modules), list(modules)
    figures = next(value for key, value in modules.items() if key.endswith("attention.out"))
    assert figures["forward"]["dtype"] == figures["backward"]["dtype"] == "bfloat16"
    expected = math.log2(torch.finfo(torch.bfloat16).max / figures["forward"]["amax"])
    assert figures["forward"]["headroom_bits"] == pytest.approx(expected)
    assert 0 < lines[-1]["updates"]["share_bfloat16_would_lose"] < 1
    assert lines[-1]["casts"]["number"] > 10


def test_turns_of_two_optimizers_are_one_row():
    program = EAGER["adversarial"]()
    with Watch(every=4) as watch:
        for _ in range(6):
            program.step()
    for row in watch.rows[1:]:
        assert {name.split(".")[0] for name in row["modules"]} == {"critic", "generator"}


def overflowing(from_step: int):
    """A float16 program whose norm overflows from one step on."""
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    number = 0

    def step() -> None:
        nonlocal number
        with torch.autocast("cpu", dtype=torch.float16):
            h = net(torch.randn(4, 8) * (2000.0 if number >= from_step else 1.0))
            loss = (h * h).float().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        number += 1

    return step


def test_the_operation_that_overflows_is_named_and_dumped(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    step, heard = overflowing(from_step=10), []
    with (
        caplog.at_level(logging.WARNING, "mezzotint"),
        Watch(every=1000, out=tmp_path / "m.jsonl", on_alarm=heard.append) as watch,
    ):
        for _ in range(14):
            step()
    kinds = [alarm.kind for alarm in watch.alarms]
    assert kinds[0] == "loss"
    birth = next(alarm for alarm in watch.alarms if alarm.kind == "not-finite")
    assert birth.details["op"] == "aten.mul.Tensor"
    assert birth.details["wide"] == "finite"
    assert birth.step == 11  # the step after the one whose loss was infinite
    assert heard == watch.alarms
    (dump,) = tmp_path.glob("m-not-finite-step-11.json")
    assert json.loads(dump.read_text())["details"]["line"].startswith(str(Path(__file__)))
    assert "aten.mul.Tensor" in caplog.text


def test_lost_updates_of_stored_weights_raise_an_alarm_once():
    weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-4)
    with Watch(every=1) as watch:
        for _ in range(5):
            (weight.float().sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    alarm, stopped = watch.alarms
    assert stopped.kind == "stopped-weights"
    assert (alarm.kind, alarm.measured) == ("lost-updates", 1.0)


def test_nothing_is_left_behind():
    step = torch.amp.GradScaler.step, torch.autograd._engine_run_backward
    watch = Watch(every=2)
    watch.start()
    watch.start()
    EAGER["language_model"]().step()
    watch.stop()
    watch.stop()
    assert step == (torch.amp.GradScaler.step, torch.autograd._engine_run_backward)
    assert not optimizer_hooks._global_optimizer_post_hooks
    assert torch._C._len_torch_dispatch_stack() == 0


def test_tensorboard(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    program = EAGER["language_model"]()
    with Watch(every=2, tensorboard=tmp_path):
        for _ in range(5):
            program.step()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert any(tag.startswith("headroom/model.blocks.0") for tag in events.Tags()["scalars"])
    assert any(tag.startswith("exponents/model") for tag in events.Tags()["histograms"])


def test_refusals():
    with pytest.raises(AuditError, match="every=0"):
        Watch(every=0)
    assert Limits().headroom_bits == 2.0
    assert (
        Alarm(kind="k", step=1, place="p", measured=1.0, limit=0.0, message="m", advice="a").to_json()["alarm"] == "k"
    )
