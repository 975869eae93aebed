"""Memory of a training step on the CPU, above what weights and optimizer hold: float32 against what saves some.

    python benchmarks/memory.py --record benchmarks/records

Allocator figures add up the allocator's own events (torch.profiler) and repeat exactly. Resident figures are the
highest resident set of a process that does nothing else, above its level before the step (Linux counts it from
/proc/self/clear_refs on); they move with what malloc keeps.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness
import mezzotint as mz
from cpu_lowprec import AVX2
from mezzotint.models.gpt import GPT
from mezzotint.recipes.catalog import find_recipe
from mezzotint.training.memory import measure_step
from models import PlainAttention, fused_gpt

VOCABULARY = 8192


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and how it trains; the first of each vocabulary is what the others are compared with."""

    name: str
    make: Callable[..., nn.Module] = GPT
    policy: str = "float32"
    vocab_size: int = 256
    is_chunked: bool = True


CASES = (
    Case(name="float32", is_chunked=False),
    Case(name="float32, chunked loss"),
    Case(name="bf16-mixed", policy="bf16-mixed", is_chunked=False),
    Case(name="bf16-mixed, fused modules, bf16 residual", policy="bf16-mixed", make=fused_gpt, is_chunked=False),
    Case(name="bf16-mixed, fused modules, bf16 residual, chunked loss", policy="bf16-mixed", make=fused_gpt),
    Case(name="bf16-saved", policy="bf16-saved", is_chunked=False),
    Case(name="fp8-mixed", policy="fp8-mixed", is_chunked=False),
    Case(name="mxfp8", policy="mxfp8", is_chunked=False),
    Case(name="float32, plain attention", make=PlainAttention, is_chunked=False),
    Case(name="bf16-mixed, plain attention", policy="bf16-mixed", make=PlainAttention, is_chunked=False),
    Case(name="float32, V=8192", vocab_size=VOCABULARY, is_chunked=False),
    Case(name="float32, V=8192, chunked loss", vocab_size=VOCABULARY),
    Case(name="bf16-mixed, V=8192", vocab_size=VOCABULARY, policy="bf16-mixed", is_chunked=False),
    Case(name="bf16-mixed, V=8192, fused modules, bf16 residual, chunked loss", vocab_size=VOCABULARY,
         policy="bf16-mixed", make=fused_gpt),
)  # fmt: skip


def prepare(case: Case, recipe: str) -> tuple[Callable[[], Tensor], Callable[[Tensor], None], Callable[[], object]]:
    """Return forward, backward and update of a case."""
    config = find_recipe(recipe)
    torch.manual_seed(0)
    model = case.make(replace(config.model, vocab_size=case.vocab_size))
    engine = mz.Engine(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), policy=case.policy)
    ids = torch.randint(0, case.vocab_size, (config.train.batch_size, config.model.block_size + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def forward() -> Tensor:
        with engine.forward():
            if case.is_chunked:
                return model(inputs, targets, keep_logits=False)[1]
            return F.cross_entropy(model(inputs)[0].float().flatten(0, 1), targets.flatten())

    return forward, engine.backward, engine.update


def allocator_peak(case: Case, recipe: str) -> tuple[int, int]:
    """Return bytes held when forward has ended, and at the peak of the step."""
    forward, backward, update = prepare(case, recipe)
    for _ in range(2):  # the first step makes optimizer states and caches
        backward(forward())
        update()
    memory = measure_step(forward, backward, torch.device("cpu"))
    return memory.activations_bytes, memory.peak_bytes


def resident_peak(case: Case, recipe: str) -> int | None:
    """Return bytes of the highest resident set of a step above the level before; None where the system tells none."""
    forward, backward, update = prepare(case, recipe)
    for _ in range(2):
        backward(forward())
        update()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps of the first steps would hide this one
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    backward(forward())
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=1)
    parser.add_argument("--recipe", default="small-10m")
    parser.add_argument("--simulate-avx2", action="store_true")
    parser.add_argument("--case", help="measure the resident peak of one case and print it")
    options = parser.parse_args()
    if options.simulate_avx2 and os.environ.get("DNNL_MAX_CPU_ISA") != "AVX2":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    torch.set_num_threads(options.threads)
    if options.case:
        case = next(case for case in CASES if case.name == options.case)
        print(json.dumps(resident_peak(case, options.recipe)))
        return
    rows, results = [], {}
    for case in CASES:
        held, peak = allocator_peak(case, options.recipe)
        command = [sys.executable, __file__, "--case", case.name, "--recipe", options.recipe]
        printed = subprocess.run(
            [*command, "--threads", str(options.threads)], capture_output=True, text=True, check=True
        )
        resident = json.loads(printed.stdout)
        results[case.name] = {"held_bytes": held, "peak_bytes": peak, "resident_bytes": resident}
        base = results["float32" if case.vocab_size == 256 else "float32, V=8192"]
        if "plain attention" in case.name:
            base = results["float32, plain attention"]
        rows.append([
            case.name,
            f"{held / 2**20:.0f}",
            f"{peak / 2**20:.0f}",
            f"{peak / base['peak_bytes']:.3f}",
            "-" if resident is None else f"{resident / 2**20:.0f} ({resident / base['resident_bytes']:.2f})",
        ])  # fmt: skip
        print(" | ".join(rows[-1]), flush=True)
    header = ["step", "held after forward, MiB", "peak, MiB", "peak over float32", "resident peak, MiB (over float32)"]
    table = harness.markdown_table(header, rows)
    if options.record:
        facts = {**harness.machine(), "limited_to": "AVX2" if options.simulate_avx2 else None}
        name = "memory_avx2" if options.simulate_avx2 else "memory"
        title = f"{options.recipe}, above weights and optimizer states"
        print(harness.write_record(options.record, name, {title: table}, results, facts))


if __name__ == "__main__":
    main()
