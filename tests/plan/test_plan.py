"""Plans of programs: memory against published peaks, time against what must hold, precisions, advice."""

import sys
from pathlib import Path

import pytest
import torch

from mezzotint.auditing.planning import plan_target
from mezzotint.auditing.script import parse_target
from mezzotint.errors import PlanError
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.costs import Work
from mezzotint.plan.memory import plan_memory
from mezzotint.plan.plan import Plan, advice, reasons
from mezzotint.plan.precision import find_precision
from mezzotint.plan.recording import GhostRun, Recording
from mezzotint.plan.timeline import chrome_trace
from mezzotint.trace.recorder import Recorder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plan_programs import cs336

SCRIPT = """
import sys
import torch
from torch import nn

size = int(sys.argv[1])
model = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size)).cuda()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(100):
    x = torch.randn(512, size).cuda()
    {region}
        loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""
WITH_AUTOCAST, WITHOUT = 'with torch.autocast("cuda", dtype=torch.bfloat16):', "if True:"
PRECISIONS = ("as written", "float32", "tf32", "fp16", "bf16", "fp8")


def plans_of(path: Path, region: str, *names: str, gpu: str = "H100", size: int = 2048) -> dict[str, Plan]:
    """Return the plans of the script by precision."""
    path.write_text(SCRIPT.format(region=region))
    found = plan_target(
        parse_target(str(path), [str(size)], is_module=False),
        [find_gpu(gpu)],
        lambda _card: [find_precision(name) for name in names],
    )
    return {plan.precision.name: plan for plan in found}


@pytest.mark.parametrize("region", [WITH_AUTOCAST, WITHOUT])
def test_precisions(tmp_path: Path, region: str) -> None:
    plans = plans_of(tmp_path / "train.py", region, *PRECISIONS)
    assert {name: plan.products_format for name, plan in plans.items()} == {
        "as written": "bfloat16" if region is WITH_AUTOCAST else "float32",
        "float32": "float32",
        "tf32": "tfloat32",
        "fp16": "float16",
        "bf16": "bfloat16",
        "fp8": "float8_e4m3fn",
    }
    time = {name: plan.time.gpu for name, plan in plans.items()}
    assert time["bf16"] < 0.6 * time["float32"]
    assert time["tf32"] < 0.5 * time["float32"]
    assert time["as written"] == pytest.approx(time["bf16" if region is WITH_AUTOCAST else "float32"])
    for plan in plans.values():
        assert plan.time.low <= plan.time.seconds <= plan.time.high
        assert plan.time.seconds >= 0.9 * plan.time.gpu
        assert plan.memory.fits
        assert plan.items == 512
        assert sum(plan.memory.at_peak.values()) == plan.memory.peak_allocated
    assert reasons(list(plans.values()))


def test_batches_come_over_the_bus(tmp_path: Path) -> None:
    plan = plans_of(tmp_path / "train.py", WITH_AUTOCAST, "as written")["as written"]
    (moved,) = [one for one in plan.time.calls if one.cost.work is Work.TRANSFER]
    assert moved.cost.nbytes == 512 * 2048 * 4
    assert moved.seconds > moved.cost.nbytes / 64e9  # PCIe 5


def test_weights_gradients_and_states_are_told_apart(tmp_path: Path) -> None:
    plan = plans_of(tmp_path / "train.py", WITHOUT, "as written")["as written"]
    weights = 4 * (2 * 4 * 2048**2 + 5 * 2048)
    assert plan.memory.at_peak["weights"] == pytest.approx(weights, rel=0.01)
    assert plan.memory.at_peak["optimizer states"] == pytest.approx(2 * weights, rel=0.01)


def test_a_step_that_does_not_fit(tmp_path: Path) -> None:
    plan = plans_of(tmp_path / "train.py", WITHOUT, "as written", gpu="T4", size=12288)["as written"]
    assert plan.memory.fits is False
    assert any("does not fit" in text for text in advice(plan))


def test_chrome_trace(tmp_path: Path) -> None:
    plan = plans_of(tmp_path / "train.py", WITH_AUTOCAST, "as written")["as written"]
    trace = chrome_trace(plan)
    kernels = [one for one in trace["traceEvents"] if one["ph"] == "X"]
    assert {"addmm", "mm", "gelu"} <= {one["name"] for one in kernels}
    assert sum(one["dur"] for one in kernels) == pytest.approx(plan.time.gpu * 1e6, rel=0.02)


def test_a_script_without_a_step(tmp_path: Path) -> None:
    path = tmp_path / "idle.py"
    path.write_text("import torch\ntorch.ones(3).cuda().sum()\n")
    target = parse_target(str(path), [], is_module=False)
    with pytest.raises(PlanError, match="without a training step"):
        plan_target(target, [find_gpu("H100")], lambda _card: [find_precision("bf16")])
    with pytest.raises(PlanError, match="cannot be planned"):
        find_precision("int4")


def recorded(scope: str, mode: str, config: tuple[int, ...], batch: int) -> GhostRun:
    """Run the CS336 model on a ghost H100; returns the run with its second step as the last."""
    recording = Recording("H100")
    recorder = Recorder(has_ranges=False)
    with recording.within(recorder), recorder:
        torch.backends.cuda.matmul.allow_tf32 = True
        step = cs336.make_step(config, batch, mode, scope, 0)
        marks = []
        for _ in range(2):
            marks.append(recorder.num_operations)
            step()
        marks.append(recorder.num_operations)
        del step
    run = recording.run(recorder.trace())
    run.trace.notes.append(f"{marks[1]} {marks[2]}")
    return run


@pytest.mark.parametrize(
    ("scope", "mode", "measured", "tolerance"),
    [
        ("fwd_bwd", "tf32", 4.11, 0.02),
        ("fwd_bwd", "amp-bf16", 3.29, 0.02),
        ("fwd", "amp-bf16", 0.91, 0.02),
    ],
)
def test_published_peaks_of_a_language_model(scope: str, mode: str, measured: float, tolerance: float) -> None:
    # H100, torch 2.11, 128.6M parameters, batch 4 x 512: rows sq-128, sq-130 and sq-132 of benchmarks/data
    run = recorded(scope, mode, (12, 768, 12, 3072, 10000, 512), 4)
    first, end = map(int, run.trace.notes[-1].split())
    peak = plan_memory(run, first=first, end=end).peak_allocated / 2**30
    assert peak == pytest.approx(measured, rel=tolerance)
