"""What the recorder sees: phases, places, ranges, FLOPs; and that it holds on to nothing."""

import gc
import os
import threading
import weakref
from pathlib import Path

import pytest
import torch
from programs import EAGER, adversarial, checkpointed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.errors import AuditError
from mezzotint.kernels.tensors import range_stats
from mezzotint.trace.record import Call, Kind, Phase, Trace
from mezzotint.trace.recorder import Enough, Recorder


def recorded(step, times: int = 1, **options) -> Trace:
    with Recorder(**options) as recorder:
        for _ in range(times):
            step()
    return recorder.trace()


def calls(trace: Trace, name: str, phase: Phase | None = None) -> list[Call]:
    return [call for call in trace.calls if call.name == name and phase in (None, call.phase)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def simple_step():
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(torch.randn(4, 8)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def test_each_operation_has_its_phase_and_module():
    trace = recorded(simple_step())
    products = {(call.phase, call.module, call.format) for call in trace.calls if call.name in ("mm", "addmm")}
    assert products == {
        (Phase.FORWARD, "net.body.0", "bfloat16"),
        (Phase.FORWARD, "net.head", "bfloat16"),
        (Phase.BACKWARD, "net.body.0", "bfloat16"),
        (Phase.BACKWARD, "net.head", "bfloat16"),
    }
    assert {call.phase for call in calls(trace, "add_")} == {Phase.OPTIMIZER}
    assert {call.phase for call in calls(trace, "randn")} == {Phase.OTHER}
    assert {call.node for call in calls(trace, "mm", Phase.BACKWARD)} == {"AddmmBackward0"}
    assert trace.modules["net.body.0"] == "Linear"


def test_lines_are_those_of_the_user():
    trace = recorded(simple_step())
    (forward,) = calls(trace, "mean")
    assert forward.line is not None
    assert forward.line.path == __file__
    assert forward.line.function == "simple_step.<locals>.step"
    for call in calls(trace, "mm", Phase.BACKWARD):
        assert call.line is not None
        assert call.line.function == "Net.forward"
        assert "self.head(self.body(x))" in Path(__file__).read_text().splitlines()[call.line.line - 1]


def test_casts_name_what_they_cast():
    trace = recorded(simple_step())
    casts = [call for call in trace.calls if call.kind is Kind.CAST and call.module == "net.head"]
    forward = [call for call in casts if call.phase is Phase.FORWARD]
    assert {(call.inputs[0].dtype, call.outputs[0].dtype) for call in forward} == {("float32", "bfloat16")}
    weights = {one.index: one.name for one in trace.parameters}
    producers = {
        weights[-2 - operation.producers[0]]
        for operation in trace.operations
        if operation.call in forward and operation.producers[0] < -1
    }
    assert producers == {"net.head.weight", "net.head.bias"}


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_recomputed_operations_are_told_apart(is_reentrant: bool):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)

    def step() -> None:
        x = torch.randn(4, 8, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = checkpoint(block, x, use_reentrant=is_reentrant)
        y.float().sum().backward()
        optimizer.step()

    trace = recorded(step)
    for phase in (Phase.FORWARD, Phase.RECOMPUTE):
        (call,) = calls(trace, "addmm", phase)
        assert (call.module, call.format) == ("block.0", "bfloat16")
    assert {call.module for call in calls(trace, "mm", Phase.BACKWARD)} == {"block.0"}
    assert {call.module for call in calls(trace, "gelu_backward")} == {"block.1"}


def test_a_plain_function_is_recomputed_too():
    weight = nn.Parameter(torch.randn(4, 4))

    def step() -> None:
        checkpoint(lambda x: (x @ weight).exp(), torch.randn(2, 4), use_reentrant=False).sum().backward()

    trace = recorded(step)
    assert len(calls(trace, "exp", Phase.RECOMPUTE)) == 1
    assert not calls(trace, "exp", Phase.BACKWARD)


def test_backward_of_backward_is_backward():
    net = nn.Linear(4, 1)

    def step() -> None:
        x = torch.randn(3, 4, requires_grad=True)
        (slope,) = torch.autograd.grad(net(x).sigmoid().sum(), x, create_graph=True)
        slope.square().sum().backward()

    trace = recorded(step)
    assert not [call for call in trace.calls if call.phase is Phase.RECOMPUTE]
    names = [event.name for event in trace.events]
    assert names.count("grad") == 1
    assert names.count("backward") == 1


def test_steps_of_two_optimizers():
    program = adversarial()
    trace = recorded(program.step, 3)
    assert [step.optimizers for step in trace.steps] == [("Adam",)] * 6  # critic and generator in turn
    assert {call.module.split(".")[0] for call in trace.calls if call.name == "addmm"} == {"critic", "generator"}


def test_a_step_that_a_scaler_skips_is_a_step():
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def step(factor: float) -> None:
        loss = (net(torch.ones(2, 4)) * factor).sum()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    with Recorder() as recorder:
        step(float("inf"))
        step(1.0)
    assert [one.is_skipped for one in recorder.trace().steps] == [True, False]


def test_the_program_is_stopped_at_the_next_backward_pass():
    step, seen = simple_step(), []

    def train() -> None:
        for number in range(5):
            seen.append(number)
            step()

    recorder = Recorder(steps=2)
    with pytest.raises(Enough), recorder:
        train()
    assert seen == [0, 1, 2]
    assert recorder.num_steps == 2


def test_flops_are_those_of_torch():
    program = EAGER["vision_transformer"]()
    program.step()
    with FlopCounterMode(display=False) as counter:
        program.step()
    trace = recorded(program.step)
    counts = trace.counts()
    listed = set(counter.get_flop_counts()["Global"])
    found = sum(
        (call.flops or 0) * counts[call.index]
        for call in trace.calls
        if any(call.name == str(one).split(".")[-1] for one in listed)
    )
    assert found == counter.get_total_flops() > 0


def test_ranges_are_those_of_the_tensors():
    kept: list[Tensor] = []

    class Kept(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept.append(x.exp())
            return kept[-1]

    module = Kept()
    x = torch.randn(50, 40).mul(20).to(torch.bfloat16).requires_grad_()
    trace = recorded(lambda: module(x), 3)
    (call,) = calls(trace, "exp")
    (tally,) = call.tallies
    stats = [range_stats(one) for one in kept]
    assert tally is not None
    assert tally.count == 3 * 2000
    assert tally.amax == max(one.amax for one in stats)
    assert tally.smallest == min(one.smallest for one in stats)
    assert tally.exponents == [sum(column) for column in zip(*(one.exponents for one in stats), strict=True)]
    assert tally.zeros == sum(one.zeros for one in stats)


def test_no_tensor_is_kept_alive():
    references = []

    class Watcher(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x * 2)
            references.extend([weakref.ref(x), weakref.ref(y)])
            return y

    net = nn.Sequential(nn.Linear(4, 4), Watcher(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    gc.disable()  # reference counts alone must do
    try:
        with Recorder():
            for _ in range(3):
                loss = net(torch.randn(2, 4)).sum()
                loss.backward()
                optimizer.step()
                del loss
            assert [one() for one in references] == [None] * 6
    finally:
        gc.enable()


def test_weights_are_released_with_the_recorder():
    net = nn.Linear(4, 4)
    reference = weakref.ref(net)
    recorder = Recorder()
    with recorder:
        net(torch.randn(2, 4)).sum().backward()
    trace = recorder.trace()
    del net, recorder
    gc.collect()
    assert reference() is None
    assert trace.parameters


def test_threads_that_are_started_are_seen():
    net, found = nn.Linear(4, 4), []

    def work() -> None:
        found.append(net(torch.randn(2, 4)))

    def step() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    trace = recorded(step)
    (operation,) = [one for one in trace.operations if one.call.name == "addmm"]
    assert operation.thread == 1
    assert operation.call.module == "net"


def test_a_forked_child_records_nothing():
    with Recorder() as recorder:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                torch.ones(3).add(1)
                os.write(write, str(len(recorder._tape.log)).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 10) == b"0"
        torch.ones(3).add(1)
    assert recorder.has_seen_operations


def test_one_recorder_at_a_time():
    with Recorder(), pytest.raises(AuditError, match="at work already"), Recorder():
        pass


def test_tied_weights_have_one_name():
    trace = recorded(checkpointed().step)
    names = [one.name for one in trace.parameters]
    assert len(names) == len(set(names))


def test_an_operation_that_raises_is_recorded():
    a, b = torch.randn(2, 3), torch.randn(3, 2, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError), Recorder() as recorder:
        torch.mm(a, b)
    (operation,) = [one for one in recorder.trace().operations if one.error]
    assert operation.call.name == "mm"
    assert [meta.dtype for meta in operation.call.inputs] == ["float32", "bfloat16"]


def test_first_birth_of_an_infinity():
    x = torch.full((4,), 300.0, dtype=torch.float16)

    def step() -> None:
        y = x * x
        (y + 1).sum()

    (birth,) = recorded(step).births
    assert (birth.infinities, birth.nans, birth.wide, birth.wide_amax) == (4, 0, "finite", 90000.0)
    assert birth.inputs[0] == ("float16", 300.0, 300.0)


def test_masks_are_no_births():
    scores = torch.randn(4, 4, dtype=torch.float16)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    trace = recorded(lambda: F.softmax(scores.masked_fill(mask, float("-inf")), -1))
    assert not trace.births


def test_lost_updates_are_counted_exactly():
    weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    weight.grad = torch.cat([torch.full((600,), 1e-3), torch.full((400,), 0.5)]).to(torch.bfloat16)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    (record,) = [one for one in recorded(optimizer.step).updates if one.role == "weight"]
    assert (record.count, record.lost, record.dtype) == (1000, 600, "bfloat16")


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"foreach": False}])
def test_lost_updates_do_not_depend_on_the_implementation(options: dict):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(500).to(torch.bfloat16))
    weight.grad = torch.randn(500).to(torch.bfloat16)
    optimizer = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0, **options)
    optimizer.step()  # states exist, and have names
    records = [one for one in recorded(optimizer.step).updates if one.role == "weight"]
    assert sum(one.lost for one in records) / sum(one.count for one in records) > 0.95


def test_float32_weights_say_what_bfloat16_would_lose():
    weight = nn.Parameter(torch.ones(1000))
    weight.grad = torch.cat([torch.full((600,), 1e-3), torch.full((400,), 0.5)])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    (record,) = recorded(optimizer.step).updates
    assert (record.count, record.lost) == (1000, 0)
    assert record.would_be_lost == {"bfloat16": 600, "float16": 0}


def test_what_was_not_finite_before_the_recording_is_no_birth():
    held = torch.full((4,), float("nan"))
    assert not recorded(lambda: held.mul_(0.9)).births


@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 1.0), (torch.float32, None)])
def test_an_average_that_rounds_back_and_forth_is_lost(dtype: torch.dtype, share: float | None):
    """Both halves of the update move the stored number, by one unit down and up again: together they do nothing."""
    average, weight = torch.full((8,), 0.9, dtype=dtype), torch.full((8,), 0.95, dtype=dtype)
    trace = recorded(lambda: average.mul_(0.9995).add_(weight, alpha=0.0005))
    found = {one.op: one.share_lost for one in trace.updates if one.role == "copy"}
    assert found == ({} if share is None else {"aten.mul_.Tensor": 0.0, "aten.add_.Tensor": share})
