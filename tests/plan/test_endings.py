"""How scripts end, what a step of several optimizers is, and what the GPU has no part in."""

from pathlib import Path

import pytest
import torch

from mezzotint.auditing.planning import plan_target
from mezzotint.auditing.script import parse_target
from mezzotint.errors import PlanError
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.plan import Plan
from mezzotint.plan.precision import AS_WRITTEN, find_precision

HEAD = """
import torch
from torch import nn
model = nn.Linear(8, 8).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def step():
    model(torch.randn(4, 8).cuda()).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def plan_of(folder: Path, text: str, steps: int = 2) -> Plan:
    path = folder / "train.py"
    path.write_text(text)
    target = parse_target(str(path), [], is_module=False)
    return plan_target(target, [find_gpu("H100")], lambda _: [AS_WRITTEN], steps=steps)[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nsys.exit(3)\n", r"called sys.exit\(3\) at .*train.py:2 before a training step"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['x'])\n", r"sys.exit\(2\) at .*train.py:2"),
        ("import flash_attn_of_nobody\n", "No module named .* at .*train.py:1; install it, or plan the path without"),
        ("import os\nos.environ['LOCAL_RANK']\n", "expects torchrun; set RANK=0 LOCAL_RANK=0 WORLD_SIZE=1"),
        ("raise FileNotFoundError(2, 'No such file', '/cuda/bin/nvcc')\n", "runs no custom CUDA kernels"),
        (
            "from torch.utils.cpp_extension import load\nraise OSError('CUDA_HOME is mentioned')\n",
            "mentioned at [^;]*$",
        ),
        ("raise ValueError(\"'RANK'\")\n", "'RANK' at [^;]*$"),
        ("import torch\ntorch.nn.Linear(2, 2)(torch.ones(3))\n", r"RuntimeError: .* at \S*train.py:2$"),
        ("x = 1 / 0\n", "ZeroDivisionError: division by zero at .*train.py:1"),
        (HEAD, "no torch optimizer stepped"),
    ],
)
def test_nothing_to_plan(tmp_path: Path, text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(PlanError, match=message):
        plan_of(tmp_path, text)


def test_what_torch_says_of_a_missing_driver_is_asked_of_torch(tmp_path: Path) -> None:
    try:
        torch.device(0)
    except RuntimeError as error:
        text = str(error)
    else:
        pytest.skip(f"torch {torch.__version__} gives a device for an index where there is no driver")
    with pytest.raises(PlanError, match=r"a ghost GPU has none"):
        plan_of(tmp_path, f"raise RuntimeError({text!r})\n")


@pytest.mark.parametrize("folder", ["torch", "mezzotint", "plain"])
def test_a_line_of_the_user_is_shown_whatever_the_folder_is_called(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder).mkdir()
    with pytest.raises(PlanError, match=rf"{folder}/train.py:2"):
        plan_of(tmp_path / folder, "import torch\ntorch.ones(2) @ torch.ones(3)\n")
    plan = plan_of(
        tmp_path / folder, f"{HEAD}\nfor _ in range(3):\n    step()\n    torch.ones(1).cuda().sum().mul(3).item()\n"
    )
    assert all(path.endswith(f"{folder}/train.py") for path, _, _ in plan.run.assumed)


def test_an_early_end_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, f"{HEAD}\nstep()\nraise RuntimeError('no more data')\n")
    assert any("1 of 2 steps ran before an error: RuntimeError: no more data at" in note for note in plan.run.notes)
    plan = plan_of(tmp_path, f"{HEAD}\nfor _ in range(9): step()\n")
    assert not any("steps ran" in note for note in plan.run.notes)


def test_ctrl_c_stops_the_plan(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        plan_of(tmp_path, f"{HEAD}\nstep()\nraise KeyboardInterrupt\n")
    assert not torch.cuda.is_available()


GAN = """
import torch
from torch import nn
made, judge = nn.Linear(4, 8).cuda(), nn.Linear(8, 1).cuda()
one, other = torch.optim.Adam(made.parameters()), torch.optim.Adam(judge.parameters())
for _ in range(9):
    for optimizer in (other, one):
        other.zero_grad()
        one.zero_grad()
        judge(made(torch.randn(16, 4, device="cuda"))).mean().backward()
        optimizer.step()
"""


def test_optimizers_that_step_in_turns_make_one_step(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, GAN)
    (first, last) = plan.run.trace.steps
    assert first.optimizers == last.optimizers == ("Adam", "Adam")
    inside = plan.run.trace.operations[last.first : last.end]
    assert sum(one.call.name.startswith(("_foreach_sqrt", "_fused_adam")) for one in inside) == 2
    assert plan_of(tmp_path, GAN, steps=1).run.trace.steps[-1].optimizers == ("Adam",)


def test_operations_on_the_cpu_are_not_the_gpus(tmp_path: Path) -> None:
    work = "\ndef augment(): return [torch.randn(64).sort() for _ in range(200)]\n"
    plain = plan_of(tmp_path, f"{HEAD}{work}\nfor _ in range(9): step()\n")
    busy = plan_of(tmp_path, f"{HEAD}{work}\nfor _ in range(9):\n    augment()\n    step()\n")
    assert busy.time.num_launches == plain.time.num_launches
    assert busy.time.gpu == pytest.approx(plain.time.gpu)


def test_experts_and_complex_products_have_a_price(tmp_path: Path) -> None:
    text = """
import torch
weights = torch.randn(4, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
spectrum = torch.randn(64, 64, device="cuda", dtype=torch.complex64, requires_grad=True)
optimizer = torch.optim.SGD([weights, spectrum], lr=0.1)
offsets = torch.tensor([16, 32, 48, 64], dtype=torch.int32, device="cuda")
for _ in range(9):
    x = torch.randn(64, 64, device="cuda", dtype=torch.bfloat16)
    out = torch._grouped_mm(x, weights, offs=offsets).float().sum()
    (out + (spectrum @ spectrum).abs().sum()).backward()
    optimizer.step()
"""
    path = tmp_path / "train.py"
    path.write_text(text)
    target = parse_target(str(path), [], is_module=False)
    (plan,) = plan_target(target, [find_gpu("H100")], lambda _: [find_precision("as written")])
    products = [one for one in plan.time.calls if one.cost.work == "product"]
    assert {one.cost.format for one in products} == {"bfloat16", "float32"}
    real = next(one for one in products if one.cost.format == "float32")
    assert real.cost.flops == 8 * 64**3


def test_recording_changes_no_memory() -> None:
    from mezzotint.ghost.session import ghost_gpu
    from mezzotint.trace.recorder import Recorder

    def train() -> None:
        model = torch.nn.Linear(512, 512, device="cuda", dtype=torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            model(torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    peaks = []
    for is_recorded in (False, True):
        with ghost_gpu("H100") as gpu:
            if is_recorded:
                with Recorder(has_ranges=False) as recorder:
                    train()
                assert not recorder.trace().updates  # a ghost has no numbers to lose
            else:
                train()
            peaks.append((gpu.peak_allocated, [one.nbytes for one in gpu.storages.events if one.nbytes > 0]))
    assert peaks[0] == peaks[1]


def test_operations_without_autograd_arrive_whole_and_have_a_price(tmp_path: Path) -> None:
    teach = """
teacher = nn.Sequential(nn.Linear(8, 512), nn.Linear(512, 512), nn.Linear(512, 8)).cuda().half()
for _ in range(9):
    with torch.inference_mode():
        image = nn.functional.conv2d(torch.randn(1, 3, 8, 8, device="cuda"), torch.randn(4, 3, 3, 3, device="cuda"))
        teacher(torch.randn(64, 8, device="cuda").half()) @ torch.randn(8, 4, device="cuda").half()
    step()
"""
    plan = plan_of(tmp_path, HEAD + teach)
    assert not plan.time.uncovered
    flops = 2 * 64 * (8 * 512 + 512 * 512 + 512 * 8 + 8 * 4) + 2 * 36 * 4 * 27
    assert plan.time.flops == flops + 2 * 4 * 8 * 8 * 2  # and the step's own: forward, and the weight's gradient


def test_tokens_are_lookups_in_the_largest_table(tmp_path: Path) -> None:
    text = """
import torch
from torch import nn
words, places = nn.Embedding(1000, 8).cuda(), nn.Embedding(32, 4).cuda()
model = nn.ModuleList([words, places])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(9):
    found = words(torch.zeros(4, 16, dtype=torch.long, device="cuda"))
    bias = places(torch.arange(256, device="cuda").view(16, 16) % 32)
    (found.sum() + bias.sum()).backward()
    optimizer.step()
"""
    plan = plan_of(tmp_path, text)
    assert (plan.items, plan.unit) == (64, "tokens")
