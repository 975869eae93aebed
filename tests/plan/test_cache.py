"""The L2 cache of a plan: what was used a moment ago is read from there, what was streamed past is not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.efficiency import memory_time, product_time
from mezzotint.plan.recording import GhostRun, Recording
from mezzotint.plan.roofline import TimePlan, plan_time
from mezzotint.trace.recorder import Recorder

MIB = 1 << 20


def recorded(megabytes: int, *, spoil: int = 0) -> GhostRun:
    """Make a tensor, stream others past it, and read it."""
    recording, recorder = Recording("RTX4090"), Recorder(has_ranges=False)
    with recording.within(recorder), recorder:
        x = torch.ones(megabytes * MIB // 4, device="cuda")
        for _ in range(spoil):
            torch.ones(64 * MIB // 4, device="cuda")
        (x * 2.0).sum()
    return recording.run(recorder.trace())


def seconds_of(run: GhostRun, name: str) -> float:
    return sum(one.seconds for one in plan_time(run, first=0).calls if one.call.name == name)


def test_what_was_just_written_is_read_from_the_cache():
    assert seconds_of(recorded(16), "mul") < 0.7 * seconds_of(recorded(16, spoil=2), "mul")


def test_what_is_larger_than_the_cache_is_read_from_memory():
    near, far = seconds_of(recorded(256), "mul"), seconds_of(recorded(256, spoil=2), "mul")
    assert near == far


def test_cached_bytes_are_faster_and_never_free():
    card = find_gpu("A100")
    whole = memory_time(card, 100 * MIB).seconds
    assert memory_time(card, 100 * MIB, 100 * MIB).seconds < whole
    assert memory_time(card, 100 * MIB, 100 * MIB).seconds > whole / 5
    assert memory_time(replace(card, l2_bytes=None), 100 * MIB).seconds == whole


def test_products_in_a_row_reach_the_power_limit():
    def slower(gpu: str, name: str) -> float:
        size = 4 if name == "float32" else 2
        alone, busy = (
            product_time(
                find_gpu(gpu), name, 8192, 8192, 8192, itemsize_in=size, itemsize_out=size, is_busy=one
            ).seconds
            for one in (False, True)
        )
        return busy / alone

    for gpu in ("V100", "A100", "RTX4090", "H100", "B300"):
        assert 1 <= slower(gpu, "float16") < 1.2
        assert slower(gpu, "float32") == 1  # what is not for tensor cores draws less power
    assert slower("A100", "float16") > 1.1
    assert slower("T4", "float16") > 1.6  # 70 W


def test_a_loss_printed_now_and_then_does_not_make_every_step_wait(tmp_path: Path):
    from mezzotint.auditing.planning import plan_target
    from mezzotint.auditing.script import parse_target
    from mezzotint.plan.precision import AS_WRITTEN

    script = """
import torch
model = torch.nn.Linear(64, 64).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range(100):
    loss = model(torch.ones(8, 64, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % {every} == 0:
        loss.item()
"""
    for every, waits in ((10, 0), (1, 1)):
        path = tmp_path / f"every{every}.py"
        path.write_text(script.format(every=every))
        (plan,) = plan_target(parse_target(str(path), [], is_module=False), [find_gpu("A100")], lambda _: [AS_WRITTEN])
        assert plan.time.num_waits == waits


def planned(gpu: str, run: Callable[[], None]) -> TimePlan:
    """Plan what `run` does on a card, all of it."""
    recording, recorder = Recording(gpu), Recorder(has_ranges=False)
    with recording.within(recorder), recorder:
        run()
    return plan_time(recording.run(recorder.trace()), first=0)


def test_places_that_are_computed_one_by_one_cost_what_they_are():
    def plain() -> None:
        x = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
        x - x.clone()

    def broadcast() -> None:
        x = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)
        x.clone()
        x - torch.ones(4096, 1, device="cuda", dtype=torch.bfloat16)

    def seconds(gpu: str, run: Callable[[], None]) -> float:
        return sum(one.seconds for one in planned(gpu, run).calls if one.call.name == "sub")

    # H100 has the memory to be held up by it, RTX 4090 has not
    assert seconds("H100", broadcast) > 1.3 * seconds("H100", plain)
    assert seconds("RTX4090", broadcast) < seconds("RTX4090", plain)
    assert seconds("H200", broadcast) == pytest.approx(seconds("H100", broadcast))


def test_a_transposed_copy_waits_for_the_cache():
    card = find_gpu("H100")
    straight = memory_time(card, 2**30).seconds
    assert memory_time(card, 2**30, across=2**29).seconds == straight  # the cache is faster than memory
    assert memory_time(card, 2**30, across=2**33).seconds > 2 * straight
    assert memory_time(card, 2**30, across=2**33).wall == "cache"


def test_the_gradient_of_a_weight_is_slower_on_hopper():
    def seconds(gpu: str, num_turned: int) -> float:
        return product_time(
            find_gpu(gpu), "tfloat32", 4096, 4096, 4096, itemsize_in=4, itemsize_out=4, num_turned=num_turned
        ).seconds

    assert seconds("H100", 2) > 1.2 * seconds("H100", 0)
    assert seconds("H100", 1) == seconds("H100", 0)
    assert seconds("A100", 2) == seconds("A100", 0)


def test_waiting_for_the_gpu_after_every_phase_costs_time():
    def step(has_waits: bool) -> Callable[[], None]:
        def run() -> None:
            x = torch.ones(8192, 8192, device="cuda", requires_grad=True)
            for _ in range(4):  # short for the host, long for the GPU, and then the other way round
                y = x @ x
                if has_waits:
                    torch.cuda.synchronize()
                for _ in range(200):
                    torch.ones(8, device="cuda").add_(1)
            del y

        return run

    assert planned("H100", step(True)).seconds > 1.1 * planned("H100", step(False)).seconds


def test_forward_costs_the_host_less_without_gradients():
    def run(has_backward: bool) -> Callable[[], None]:
        def inside() -> None:
            x = torch.ones(8, 8, device="cuda", requires_grad=has_backward)
            y = x.sin().cos().exp().sum()
            if has_backward:
                y.backward()

        return inside

    plans = [planned("H100", run(one)) for one in (False, True)]
    assert plans[1].host > 2 * plans[0].host
    assert all(plan.low <= plan.seconds <= plan.high and plan.is_host_bound for plan in plans)


def test_a_program_in_bfloat16_is_planned_without_a_question():
    def run() -> None:
        model = torch.nn.Linear(64, 64).cuda().to(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(3):
            model(torch.ones(8, 64, device="cuda", dtype=torch.bfloat16)).sum().backward()
            optimizer.step()

    recording, recorder = Recording("A100"), Recorder(has_ranges=False)
    with recording.within(recorder), recorder:
        run()
    found = recording.run(recorder.trace())
    assert not found.assumed
    assert not found.waits
