"""The L2 cache of a plan: what was used a moment ago is read from there, what was streamed past is not."""

from dataclasses import replace
from pathlib import Path

import torch

from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.efficiency import memory_time, product_time
from mezzotint.plan.recording import GhostRun, Recording
from mezzotint.plan.roofline import plan_time
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


def test_products_in_a_row_reach_the_power_limit_of_late_cards():
    for gpu, is_slower in (("H100", True), ("B300", True), ("A100", False), ("V100", False)):
        alone, busy = (
            product_time(find_gpu(gpu), "float16", 8192, 8192, 8192, itemsize_in=2, itemsize_out=2, is_busy=one).seconds
            for one in (False, True)
        )
        assert (busy > 1.05 * alone) == is_slower


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
