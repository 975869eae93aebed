"""A training step on the CPU: float32, 16 bits and emulated formats on mezzotint's kernels, 16 bits on torch's own.

    python benchmarks/cpu_lowprec.py --record benchmarks/records
    python benchmarks/cpu_lowprec.py --simulate-avx2 --record benchmarks/records

The second takes from oneDNN, torch and numba the instructions that an AVX2 processor lacks, so that a processor with
native bfloat16 shows what most laptops and servers would: kernels are chosen by measurement, as always. float32 runs
under the same limits. All contestants of a table take turns in one process, under the same allocator settings. What
torch's own kernels take is timed fewer times, since a step may last half a minute.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import harness
import mezzotint as mz
from mezzotint.lowprec import gate
from mezzotint.lowprec.switch import status
from mezzotint.models.gpt import GPT
from mezzotint.recipes.catalog import find_recipe
from models import LanguageLSTM, PlainAttention, ResNet, ViT, fused_gpt

# numba compiles for the processor it finds unless told otherwise
AVX2_FEATURES = (
    "+64bit,+adx,+aes,+avx,+avx2,+bmi,+bmi2,+cx16,+cx8,+f16c,+fma,+fsgsbase,+fxsr,+lzcnt,+mmx,+movbe,+pclmul,+popcnt,"
    "+rdrnd,+rdseed,+sahf,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3,+xsave,+xsavec,+xsaveopt"
)
AVX2 = {
    "DNNL_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": AVX2_FEATURES,
}

Step = Callable[[], None]
Loss = Callable[[nn.Module], Tensor]


def hand_written(
    model: nn.Module, loss_of: Loss, dtype: torch.dtype | None, *, is_ours: bool, can_pack: bool = True
) -> Step:
    """Return a step of the loop that everybody writes; `is_ours` puts it under `fast_cpu`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype is torch.float16)

    def step() -> None:
        with ExitStack() as stack:
            if is_ours:
                stack.enter_context(mz.fast_cpu())
                if not can_pack:
                    stack.enter_context(_without_packing())
            with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                loss = loss_of(model)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return step


class _without_packing:  # noqa: N801 - a context, named as one
    """Leave products to upcasting, as on a processor that the packing kernel does not suit."""

    def __enter__(self) -> None:
        self.saved = {dtype: gate.packs(dtype) for dtype in gate.LOW_DTYPES}
        for dtype in gate.LOW_DTYPES:
            gate.set_packs(dtype, False)

    def __exit__(self, *_: object) -> None:
        for dtype, value in self.saved.items():
            gate.set_packs(dtype, value)


def by_engine(model: nn.Module, loss_of: Loss, policy: str) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = mz.Engine(model, optimizer, policy=policy, max_grad_norm=1.0)

    def step() -> None:
        with engine.forward():
            loss = loss_of(model)
        engine.backward(loss)
        engine.update()

    return step


def language_model(recipe: str, vocab_size: int | None) -> tuple[Callable[..., nn.Module], Loss]:
    config = find_recipe(recipe)
    shape = config.model if vocab_size is None else replace(config.model, vocab_size=vocab_size)
    ids = torch.randint(0, min(shape.vocab_size, 8192), (config.train.batch_size, shape.block_size + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def make(kind: Callable[..., nn.Module] = GPT) -> nn.Module:
        torch.manual_seed(0)
        return kind(shape)

    return make, lambda model: model(inputs, targets, keep_logits=False)[1]


def gpt_steps(recipe: str, vocab_size: int | None) -> dict[str, Step]:
    make, loss = language_model(recipe, vocab_size)
    return {
        "float32": hand_written(make(), loss, None, is_ours=False),
        "float32 inside fast_cpu": hand_written(make(), loss, None, is_ours=True),
        "float32, fused modules": hand_written(make(fused_gpt), loss, None, is_ours=False),
        "bfloat16, upcast": hand_written(make(), loss, torch.bfloat16, is_ours=True, can_pack=False),
        "bfloat16, packed": hand_written(make(), loss, torch.bfloat16, is_ours=True),
        "bfloat16, packed, fused modules": hand_written(make(fused_gpt), loss, torch.bfloat16, is_ours=True),
        "float16, packed": hand_written(make(), loss, torch.float16, is_ours=True),
        "bf16-saved": by_engine(make(), loss, "bf16-saved"),
        "fp8-mixed": by_engine(make(), loss, "fp8-mixed"),
        "fp8-rowwise": by_engine(make(), loss, "fp8-rowwise"),
        "fp8-blockwise": by_engine(make(), loss, "fp8-blockwise"),
        "mxfp8": by_engine(make(), loss, "mxfp8"),
        "nvfp4": by_engine(make(), loss, "nvfp4"),
    }


def other_steps() -> dict[str, dict[str, Step]]:
    """Return the steps of models of other kinds by kind: float32 first."""
    tables: dict[str, dict[str, Step]] = {}
    for kind in (ViT, ResNet, LanguageLSTM):

        def make(kind: type[nn.Module] = kind) -> nn.Module:
            torch.manual_seed(0)
            return kind()

        batch = make().example(torch.Generator().manual_seed(0))

        def loss(model: nn.Module, batch: tuple[Tensor, Tensor] = batch) -> Tensor:
            return model.loss(*batch)

        tables[kind.__name__] = {
            "float32": hand_written(make(), loss, None, is_ours=False),
            "bfloat16, fast_cpu": hand_written(make(), loss, torch.bfloat16, is_ours=True),
            "float16, fast_cpu": hand_written(make(), loss, torch.float16, is_ours=True),
        }
        if kind is LanguageLSTM:
            # torch hands float32 inputs to oneDNN under autocast, 16-bit ones only where its flags promise the format
            for name in ("bfloat16", "float16"):
                low = _on_compact_inputs(batch, getattr(torch, name))
                tables[kind.__name__][f"{name} inputs, fast_cpu"] = hand_written(
                    make(), low, getattr(torch, name), is_ours=True
                )
    return tables


def _on_compact_inputs(batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> Loss:
    def loss(model: nn.Module) -> Tensor:
        hidden, _ = model.layers(model.embed(batch[0]).to(dtype))
        return nn.functional.cross_entropy(model.head(hidden).float().flatten(0, 1), batch[1].flatten())

    return loss


def stock_steps(recipe: str, fast: Step) -> dict[str, dict[str, Step]]:
    """Return torch's own kernels against float32 and ours, with fused and with plain attention."""
    make, loss = language_model(recipe, None)
    return {
        "torch's kernels, fused attention": {
            "float32": hand_written(make(), loss, None, is_ours=False),
            "bfloat16, fast_cpu": fast,
            "bfloat16, torch's kernels": hand_written(make(), loss, torch.bfloat16, is_ours=False),
            "float16, torch's kernels": hand_written(make(), loss, torch.float16, is_ours=False),
        },
        "torch's kernels, plain attention": {
            "float32": hand_written(make(PlainAttention), loss, None, is_ours=False),
            "bfloat16, fast_cpu": hand_written(make(PlainAttention), loss, torch.bfloat16, is_ours=True),
            "bfloat16, torch's kernels": hand_written(make(PlainAttention), loss, torch.bfloat16, is_ours=False),
        },
    }


def table_of(timings: list[harness.Timing]) -> str:
    return harness.markdown_table(
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=11)
    parser.add_argument("--stock-rounds", type=int, default=1)
    parser.add_argument("--recipe", default="small-10m")
    parser.add_argument("--only", default="", help="contestants whose name holds this, float32 aside")
    parser.add_argument("--skip", default="", help="contestants left out, separated by commas")
    parser.add_argument("--tables", default="gpt,large-vocabulary,others,stock")
    parser.add_argument("--simulate-avx2", action="store_true")
    options = parser.parse_args()
    if options.simulate_avx2 and os.environ.get("DNNL_MAX_CPU_ISA") != "AVX2":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    torch.set_num_threads(options.threads)
    facts = {**harness.machine(), "limited_to": "AVX2" if options.simulate_avx2 else None}
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        facts[name] = os.environ.get(name)
    wanted, tables, results = options.tables.split(","), {}, {}

    def run(title: str, steps: dict[str, Step], rounds: int, warmup: int = 2) -> None:
        chosen = {
            name: step
            for name, step in steps.items()
            if name == "float32" or (options.only in name and name not in options.skip.split(","))
        }
        results[title] = harness.interleave(chosen, rounds=rounds, warmup=warmup)
        tables[title] = table_of(results[title])
        print(f"{title}\n\n{tables[title]}", flush=True)

    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    if "gpt" in wanted:
        run(f"{options.recipe}, {threads}", gpt_steps(options.recipe, None), options.rounds)
    if "large-vocabulary" in wanted:
        steps = gpt_steps(options.recipe, 8192)
        chosen = {name: step for name, step in steps.items() if name.startswith(("float", "bfloat"))}
        run(f"{options.recipe}, vocabulary of 8192, {threads}", chosen, options.rounds)
    if "others" in wanted:
        for kind, steps in other_steps().items():
            run(f"{kind}, {threads}", steps, options.rounds)
    if "stock" in wanted:
        make, loss = language_model(options.recipe, None)
        fast = hand_written(make(fused_gpt), loss, torch.bfloat16, is_ours=True)
        for title, steps in stock_steps(options.recipe, fast).items():
            run(f"{options.recipe}, {title}, {threads}", steps, options.stock_rounds, warmup=0)
    tables["Kernels"] = "\n".join(f"- {choice.format}: {choice.path}; {choice.reason}" for choice in status()) + "\n"
    print(tables["Kernels"])
    if options.record:
        name = "cpu_lowprec_avx2" if options.simulate_avx2 else "cpu_lowprec"
        name += f"_{options.threads}threads" if options.threads > 1 else ""
        print(harness.write_record(options.record, name, tables, results, facts))


if __name__ == "__main__":
    main()
