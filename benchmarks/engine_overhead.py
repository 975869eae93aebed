"""What the engine costs over the hand-written loop that does the same: autocast, scaler, clip, step, zero_grad.

    python benchmarks/engine_overhead.py --record benchmarks/records

Two models: a toy step of about 2 ms, where every microsecond of Python shows, and the 10M-parameter recipe.
Lightning Fabric and Accelerate take part where they are installed.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

import harness
import mezzotint as mz
from mezzotint.engine.casting import kernel_contexts
from mezzotint.models.gpt import GPT
from mezzotint.policy.grammar import parse_policy
from mezzotint.recipes.catalog import find_recipe

MAX_NORM = 1.0
DTYPES = {"float32": None, "bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}
Step = Callable[[], object]


class Toy(nn.Module):
    """An MLP whose step takes about 2 ms on one thread."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(6):
            layers += [nn.Linear(192, 192), nn.LayerNorm(192), nn.GELU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.layers(x)
        return out, F.mse_loss(out.float(), y)


def toy() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return Toy(), (torch.randn(56, 192), torch.randn(56, 192))


def gpt_10m() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    config = find_recipe("small-10m")
    ids = torch.randint(0, 256, (config.train.batch_size, config.model.block_size + 1))
    return GPT(config.model), (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def hand_written(make: Callable[[], tuple], policy: str) -> Step:
    """The textbook loop, on the same CPU kernels as the engine."""
    model, batch = make()
    optimizer = optimizer_of(model)
    dtype = DTYPES[policy]
    scaler = torch.amp.GradScaler("cpu") if policy == "fp16-mixed" else None
    kernels = (kernel_contexts(parse_policy(policy), torch.device("cpu")) or [nullcontext()])[0]

    def step() -> None:
        with kernels:
            with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
                _, loss = model(*batch)
            (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), MAX_NORM)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()

    return step


def with_engine(make: Callable[[], tuple], policy: str) -> Step:
    model, batch = make()
    engine = mz.Engine(model, optimizer_of(model), policy=policy, max_grad_norm=MAX_NORM)

    def step() -> None:
        with engine.forward():
            _, loss = model(*batch)
        engine.backward(loss)
        engine.update()

    return step


def with_fabric(make: Callable[[], tuple], policy: str) -> Step | None:
    try:
        from lightning_fabric import Fabric
    except ImportError:
        return None
    if policy == "fp16-mixed":
        return None  # Fabric has no float16 on the CPU
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if policy == "bf16-mixed" else "32-true")
    raw, batch = make()
    model, optimizer = fabric.setup(raw, optimizer_of(raw))

    def step() -> None:
        _, loss = model(*batch)
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def with_accelerate(make: Callable[[], tuple], policy: str) -> Step | None:
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError:
        return None
    if policy == "fp16-mixed":
        return None  # Accelerate has no float16 on the CPU
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if policy == "bf16-mixed" else "no")
    raw, batch = make()
    model, optimizer = accelerator.prepare(raw, optimizer_of(raw))

    def step() -> None:
        _, loss = model(*batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=31)
    parser.add_argument("--toy-rounds", type=int, default=600)
    parser.add_argument("--policies", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--models", nargs="+", default=["toy", "10M"], choices=["toy", "10M"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = harness.machine()
    tables, results = {}, {}
    for name, make, rounds in (("toy", toy, options.toy_rounds), ("10M", gpt_10m, options.rounds)):
        for policy in options.policies if name in options.models else ():
            contestants = {
                "hand-written loop": hand_written(make, policy),
                "mezzotint engine": with_engine(make, policy),
                "the same loop again": hand_written(make, policy),
                "Lightning Fabric": with_fabric(make, policy),
                "Accelerate": with_accelerate(make, policy),
            }
            timings = harness.interleave({k: v for k, v in contestants.items() if v is not None}, rounds=rounds)
            title = f"{name} model, {policy}"
            tables[title] = harness.markdown_table(
                ["", "step ms", "ratio", "extra us", "samples"],
                [
                    [
                        t.name,
                        f"{t.median_seconds * 1e3:.3f} ± {t.spread_seconds * 1e3:.3f}",
                        f"{t.ratio:.4f} ± {t.ratio_spread:.4f}",
                        f"{t.extra_seconds * 1e6:.0f}",
                        str(t.num_samples),
                    ]
                    for t in timings
                ],
            )
            results[title] = timings
            print(f"## {title}\n\n{tables[title]}", flush=True)
    if options.record:
        print(harness.write_record(options.record, "engine_overhead", tables, results, facts))


if __name__ == "__main__":
    main()
