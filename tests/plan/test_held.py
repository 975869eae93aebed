"""The plan names what a variable keeps from step to step, and why low precision needs more memory; nothing else."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mezzotint.plan.held import kept_activation
from mezzotint.plan.memory import MIB, plan_memory
from mezzotint.plan.plan import Plan, make_plan, reasons
from mezzotint.plan.precision import Precision, default_precisions, in_precision
from mezzotint.plan.recording import GhostRun, Recording
from mezzotint.trace.recorder import Recorder

WORDS, WIDTH = 32_000, 256


def _ids() -> torch.Tensor:
    return torch.randint(WORDS, (4, 513), device="cuda")


def _language_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.GELU(), nn.Linear(WIDTH, WORDS)).cuda()
    return net, torch.optim.AdamW(net.parameters())


def keeps_logits() -> None:
    net, optimizer = _language_model()
    for _ in range(2):
        ids = _ids()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = net(ids[:, :-1])  # named
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()


def keeps_logits_of_micro_batches() -> None:
    net, optimizer = _language_model()
    for _ in range(2):
        for _ in range(2):
            ids = _ids()
            logits = net(ids[:, :-1]).to(torch.float64)  # named
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def keeps_outputs_on_a_module() -> None:
    net, optimizer = _language_model()
    for _ in range(2):
        ids = _ids()
        net.last = net(ids[:, :-1]).bfloat16()  # named
        F.cross_entropy(net.last.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def deletes_logits() -> None:
    net, optimizer = _language_model()
    for _ in range(2):
        ids = _ids()
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = net(ids[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        del logits
        loss.backward()
        optimizer.step()


def carries_a_hidden_state() -> None:
    cell = nn.GRUCell(WIDTH, WIDTH).cuda()
    optimizer = torch.optim.SGD(cell.parameters(), momentum=0.9)
    state = torch.zeros(8192, WIDTH, device="cuda")
    for _ in range(3):
        state = cell(torch.randn(8192, WIDTH, device="cuda"), state.detach())
        state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)


def keeps_gradients_until_backward() -> None:
    net = nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(4)]).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        loss = net(torch.randn(4, 1024, device="cuda")).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def averages_weights_and_fetches_ahead() -> None:
    net, optimizer = _language_model()
    average = torch.optim.swa_utils.AveragedModel(net)
    following = torch.randn(4, 512, WIDTH, device="cuda")
    for _ in range(3):
        x, following = following, torch.randn(4, 512, WIDTH, device="cuda")
        checkpoint(net[2], x, use_reentrant=False).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)


def remembers_outputs_of_a_cache() -> None:
    net, optimizer = _language_model()
    cache: dict[int, torch.Tensor] = {}
    for step in range(3):
        cache[step] = net(_ids()).detach()  # kept for later on purpose
        net(_ids()).logsumexp(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _run(program: Callable[[], None], precision: Precision) -> GhostRun:
    recording, recorder = Recording("H100"), Recorder(has_ranges=False)
    with in_precision(precision), recording.within(recorder), recorder:
        program()
    return recording.run(recorder.trace())


def _precision(name: str) -> Precision:
    from mezzotint.hardware.gpus import find_gpu

    return next(one for one in default_precisions(find_gpu("H100")) if one.name == name)


@pytest.mark.parametrize(
    ("program", "mebibytes"),
    [(keeps_logits, 125), (keeps_logits_of_micro_batches, 500), (keeps_outputs_on_a_module, 125)],
)
def test_a_kept_activation_is_named(program: Callable[[], None], mebibytes: int) -> None:
    run = _run(program, _precision("as written"))
    kept = kept_activation(run, plan_memory(run))
    assert kept is not None
    assert kept.nbytes == mebibytes * MIB
    frame = kept.call.line
    assert frame is not None
    assert "# named" in Path(frame.path).read_text().splitlines()[frame.line - 1]
    assert f"{mebibytes} MiB" in kept.sentence
    assert "`del`" in kept.sentence


@pytest.mark.parametrize(
    "program",
    [
        deletes_logits,
        carries_a_hidden_state,
        keeps_gradients_until_backward,
        averages_weights_and_fetches_ahead,
        remembers_outputs_of_a_cache,
    ],
)
def test_other_programs_keep_nothing(program: Callable[[], None]) -> None:
    run = _run(program, _precision("as written"))
    assert kept_activation(run, plan_memory(run)) is None


def test_what_is_named_is_what_deleting_saves() -> None:
    peaks = [plan_memory(_run(one, _precision("as written"))).peak_allocated for one in (keeps_logits, deletes_logits)]
    assert abs(peaks[0] - peaks[1] - 125 * MIB) < 2 * MIB


def _wide(rows: int, *, has_gradients: bool) -> Callable[[], None]:
    def program() -> None:
        net = nn.Sequential(*[one for _ in range(6) for one in (nn.Linear(4096, 4096), nn.ReLU())]).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        for _ in range(2):
            x = torch.randn(rows, 4096, device="cuda")
            optimizer.zero_grad(set_to_none=not has_gradients)
            (net(x).float() - x).square().mean().backward()
            optimizer.step()

    return program


@pytest.mark.parametrize(
    ("rows", "has_gradients", "why"),
    [(64, False, "gradients in low precision"), (64, True, "copies of the weights"), (8192, False, None)],
)
def test_more_memory_under_autocast_has_its_cause(rows: int, has_gradients: bool, why: str | None) -> None:
    program = _wide(rows, has_gradients=has_gradients)
    plans: list[Plan] = [make_plan(_run(program, one), one) for one in map(_precision, ("tf32", "bf16"))]
    found = [one for one in reasons(plans) if "more memory" in one]
    if why is None:
        assert not found
        return
    assert why in found[0]
    for plan in plans:
        assert f"{plan.memory.peak_allocated / MIB:,.0f} MiB" in found[0]
