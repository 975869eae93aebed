"""A watched run is the same run: losses, gradients and weights after 20 steps equal those without, to the bit."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import EAGER, Program
from torch import Tensor
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks

from mezzotint.trace.recorder import Recorder

STEPS = 20


def run(build: Callable[[], Program], *, is_watched: bool) -> list[Tensor]:
    """Return every loss, then all weights, buffers and last gradients."""
    if is_watched:
        with Recorder() as recorder:
            found = _train(build)
        trace = recorder.trace()
        assert len(trace.steps) >= STEPS
        assert {call.phase for call in trace.calls} >= {"forward", "backward", "optimizer"}
        return found
    return _train(build)


def _train(build: Callable[[], Program]) -> list[Tensor]:
    program = build()
    found = [program.step().clone() for _ in range(STEPS)]
    for model in program.models:
        found += [value.detach().clone() for value in model.state_dict().values()]
        found += [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    return found


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        assert one.dtype is two.dtype
        assert torch.equal(one.view(torch.uint8) if one.dim() else one, two.view(torch.uint8) if two.dim() else two)


@pytest.mark.parametrize("name", list(EAGER))
def test_eager_programs(name: str):
    assert_same_bits(run(EAGER[name], is_watched=False), run(EAGER[name], is_watched=True))


def test_nothing_is_left_behind():
    functions = (
        torch.amp.autocast.__enter__, torch.amp.GradScaler.step, torch.autograd._engine_run_backward, torch.save,
        torch.optim.Optimizer.__init__, torch.nn.utils.clip_grad_norm_, torch.optim.lr_scheduler.LRScheduler.step,
    )  # fmt: skip
    with pytest.raises(KeyError):
        _fail_while_watched()
    assert torch._C._len_torch_dispatch_stack() == 0
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert not optimizer_hooks._global_optimizer_pre_hooks
    assert not optimizer_hooks._global_optimizer_post_hooks
    assert functions == (
        torch.amp.autocast.__enter__, torch.amp.GradScaler.step, torch.autograd._engine_run_backward, torch.save,
        torch.optim.Optimizer.__init__, torch.nn.utils.clip_grad_norm_, torch.optim.lr_scheduler.LRScheduler.step,
    )  # fmt: skip


def _fail_while_watched() -> None:
    with Recorder():
        EAGER["language_model"]().step()
        raise KeyError


COMPILED = """
import sys, torch
from torch import nn
from mezzotint.trace.recorder import Recorder
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4))
compiled = torch.compile(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
def train():
    losses = []
    for _ in range(20):
        x = torch.randn(8, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = compiled(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses
if sys.argv[1] == "watched":
    with Recorder() as recorder:
        losses = train()
    trace = recorder.trace()
    assert len(trace.steps) == 20, len(trace.steps)
    assert not any(call.name == "gelu" for call in trace.calls), "the graph did not run compiled"
    assert trace.notes, "nothing says that a graph was compiled"
else:
    losses = train()
torch.save([*losses, *[p.detach() for p in model.parameters()]], sys.argv[2])
"""

DISTRIBUTED = """
import os, sys, torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from mezzotint.trace.recorder import Recorder
dist.init_process_group("gloo")
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(dist.get_rank())
def train():
    losses = []
    for _ in range(20):
        x = torch.randn(8, 16, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return losses
if sys.argv[1] == "watched":
    with Recorder() as recorder:
        losses = train()
    trace = recorder.trace()
    assert len(trace.steps) == 20, len(trace.steps)
    assert any("model.0" == call.module and call.phase == "backward" for call in trace.calls)
else:
    losses = train()
if dist.get_rank() == 0:
    torch.save([*losses, *[p.detach() for p in model.parameters()]], sys.argv[2])
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # DDP's reducer keeps gloo's threads, which may abort while the interpreter goes: pytorch#190489
"""


def _saved(script: str, folder: Path, launcher: list[str], mode: str) -> list[Tensor]:
    path = folder / "program.py"
    path.write_text(script)
    out = folder / f"{mode}.pt"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    subprocess.run([*launcher, str(path), mode, str(out)], check=True, env=environment, timeout=280, cwd=folder)
    return list(torch.load(out))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        pytest.param(COMPILED, [sys.executable], id="compiled"),
        pytest.param(
            DISTRIBUTED,
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
            id="distributed",
        ),
    ],
)
def test_programs_of_their_own(script: str, launcher: list[str], tmp_path: Path):
    plain, watched = (_saved(script, tmp_path, launcher, mode) for mode in ("plain", "watched"))
    assert_same_bits(plain, watched)
