"""What watching costs: the recorder with and without ranges, next to what others offer, in steps of the same model.

    python benchmarks/audit_overhead.py --record benchmarks/records

A sample is `--steps` training steps in a row, with everything that the watcher installs and takes back around them.
`torch DebugMode` notes operations and dtypes as text; transformers' DebugUnderflowOverflow notes the smallest and
largest magnitude of what modules take and give, forward only; the histograms by hooks are what a user writes by hand:
torch.histc over the exponents of each module's output and of its gradient. `mz.watch` records one step in fifty by
default, so its samples are fifty steps long.
"""

import argparse
import io
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import harness
from mezzotint.models.gpt import GPT
from mezzotint.recipes.catalog import find_recipe
from mezzotint.trace.recorder import Recorder
from mezzotint.trace.watch import Watch

Step = Callable[[], object]


def make_step(dtype: torch.dtype | None) -> tuple[nn.Module, Step]:
    torch.manual_seed(0)
    config = find_recipe("small-10m")
    model = GPT(config.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 256, (config.train.batch_size, config.model.block_size + 1))

    def step() -> None:
        with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
            _, loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


class Empty(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def plain(dtype, steps: int) -> Step:
    _, step = make_step(dtype)
    return lambda: [step() for _ in range(steps)]


def empty_mode(dtype, steps: int) -> Step:
    _, step = make_step(dtype)

    def run() -> None:
        with Empty():
            for _ in range(steps):
                step()

    return run


def recorder(dtype, steps: int, *, has_ranges: bool) -> Step:
    _, step = make_step(dtype)

    def run() -> None:
        with Recorder(has_ranges=has_ranges):
            for _ in range(steps):
                step()

    return run


def debug_mode(dtype, steps: int) -> Step:
    from torch.utils._debug_mode import DebugMode

    _, step = make_step(dtype)

    def run() -> None:
        for _ in range(steps):
            with DebugMode() as mode:
                step()
            mode.debug_string()

    return run


def debug_underflow(dtype, steps: int) -> Step | None:
    try:
        from transformers.debug_utils import DebugUnderflowOverflow
    except ImportError:
        return None
    model, step = make_step(dtype)
    with redirect_stdout(io.StringIO()):
        DebugUnderflowOverflow(model)

    def run() -> None:
        with redirect_stdout(io.StringIO()):
            for _ in range(steps):
                step()

    return run


def hook_histograms(dtype, steps: int) -> Step:
    model, step = make_step(dtype)
    found: dict[str, Tensor] = {}

    def count(name: str, value: object) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            exponents = torch.frexp(value.detach().float()).exponent
            found[name] = torch.histc(exponents.float(), bins=256, min=-127, max=128)

    for name, module in model.named_modules():
        module.register_forward_hook(lambda _m, _a, out, name=name: count(name, out))
        module.register_full_backward_hook(lambda _m, _g, out, name=name: count(f"{name} grad", out[0]))
    return lambda: [step() for _ in range(steps)]


def watch_table(rounds: int) -> list[harness.Timing]:
    """Time fifty steps of one model with and without the watch: two models would differ by more than it costs."""
    _, step = make_step(torch.bfloat16)
    step()

    def fifty() -> None:
        for _ in range(50):
            step()

    def watched() -> None:
        with Watch():
            fifty()

    return harness.interleave({"plain": fifty, "mz.watch, every 50 steps": watched}, rounds=rounds, warmup=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--watch-rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = harness.machine()
    tables, results = {}, {}
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16)) if options.rounds else ():
        contestants = {
            "plain": plain(dtype, options.steps),
            "empty dispatch mode": empty_mode(dtype, options.steps),
            "mezzotint, dtypes only": recorder(dtype, options.steps, has_ranges=False),
            "mezzotint, all ranges": recorder(dtype, options.steps, has_ranges=True),
            "torch DebugMode": debug_mode(dtype, options.steps),
            "transformers DebugUnderflowOverflow": debug_underflow(dtype, options.steps),
            "histograms by hooks": hook_histograms(dtype, options.steps),
        }
        timings = harness.interleave({k: v for k, v in contestants.items() if v is not None}, rounds=options.rounds)
        title = f"small-10m, {name}, {options.threads} thread{'s' if options.threads > 1 else ''}"
        tables[title] = harness.markdown_table(
            ["", f"seconds for {options.steps} steps", "ratio to the plain step", "samples"],
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
        results[title] = timings
        print(f"## {title}\n\n{tables[title]}", flush=True)
    if options.record and results:
        print(harness.write_record(options.record, "audit_overhead", tables, results, facts))
    if options.watch_rounds:
        _watch(options, facts)


def _watch(options: argparse.Namespace, facts: dict) -> None:
    timings = watch_table(options.watch_rounds)
    title = f"small-10m, bfloat16, {options.threads} thread{'s' if options.threads > 1 else ''}"
    table = harness.markdown_table(
        ["", "seconds for 50 steps", "ratio to the plain steps", "samples"],
        [
            [
                t.name,
                f"{t.median_seconds:.2f} ± {t.spread_seconds:.2f}",
                f"{t.ratio:.3f} ± {t.ratio_spread:.3f}",
                str(t.num_samples),
            ]
            for t in timings
        ],
    )
    print(f"## {title}\n\n{table}", flush=True)
    if options.record:
        print(harness.write_record(options.record, "watch_overhead", {title: table}, {title: timings}, facts))


if __name__ == "__main__":
    main()
