"""A training step on the CPU: float32, 16 bits on mezzotint's kernels, 16 bits on torch's own.

    python benchmarks/cpu_lowprec.py --record benchmarks/records
    python benchmarks/cpu_lowprec.py --simulate-avx2 --record benchmarks/records

The second takes from oneDNN and torch the instructions that an AVX2 processor lacks, so that a processor with native
bfloat16 shows what most laptops and servers would: kernels are chosen by measurement, as always. float32 runs under
the same limits. What torch's own kernels take is timed fewer times, since a step may last half a minute.
"""

import argparse
import os
import sys
from collections.abc import Callable

import torch
from torch.nn.utils import clip_grad_norm_

import harness
import mezzotint as mz
from mezzotint.lowprec.switch import status
from mezzotint.models.gpt import GPT
from mezzotint.recipes.catalog import find_recipe

AVX2 = {"DNNL_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def make_step(recipe: str, dtype: torch.dtype | None, is_ours: bool) -> Callable[[], None]:
    """Return a step of the hand-written loop; `is_ours` puts it under `fast_cpu`."""
    config = find_recipe(recipe)
    torch.manual_seed(0)
    model = GPT(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 256, (config.train.batch_size, config.model.block_size + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            _, loss = model(inputs, targets, keep_logits=False)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def fast_step() -> None:
        with mz.fast_cpu():
            step()

    return fast_step if is_ours else step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=11)
    parser.add_argument("--stock-rounds", type=int, default=1)
    parser.add_argument("--recipe", default="small-10m")
    parser.add_argument("--simulate-avx2", action="store_true")
    options = parser.parse_args()
    if options.simulate_avx2 and os.environ.get("DNNL_MAX_CPU_ISA") != "AVX2":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    torch.set_num_threads(options.threads)
    facts = {**harness.machine(), "limited_to": "AVX2" if options.simulate_avx2 else None}
    fast = {
        "float32": make_step(options.recipe, None, False),
        "bfloat16, fast_cpu": make_step(options.recipe, torch.bfloat16, True),
        "float16, fast_cpu": make_step(options.recipe, torch.float16, True),
    }
    timings = harness.interleave(fast, rounds=options.rounds)
    stock = {
        "float32": fast["float32"],
        "bfloat16, torch's kernels": make_step(options.recipe, torch.bfloat16, False),
        "float16, torch's kernels": make_step(options.recipe, torch.float16, False),
    }
    timings += harness.interleave(stock, rounds=options.stock_rounds, warmup=0)[1:]
    table = harness.markdown_table(
        ["step", "seconds", "ratio to float32", "samples"],
        [
            [
                t.name,
                f"{t.median_seconds:.3f} ± {t.spread_seconds:.3f}",
                f"{t.ratio:.3f} ± {t.ratio_spread:.3f}",
                str(t.num_samples),
            ]
            for t in timings
        ],
    )
    choices = "\n".join(f"- {choice.format}: {choice.path}; {choice.reason}" for choice in status()) + "\n"
    print(table, choices, sep="\n")
    if options.record:
        name = "cpu_lowprec_avx2" if options.simulate_avx2 else "cpu_lowprec"
        tables = {f"{options.recipe}, {options.threads} threads": table, "Kernels": choices}
        print(harness.write_record(options.record, name, tables, timings, facts))


if __name__ == "__main__":
    main()
