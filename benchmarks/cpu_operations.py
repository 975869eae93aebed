"""Every kind of operation that models use, on the CPU: 16 bits against float32, on torch's kernels and on mezzotint's.

    python benchmarks/cpu_operations.py --simulate-avx2 --record benchmarks/records

Forward and backward are timed apart, in CPU time of one thread, interleaved. A ratio above 2 on torch's kernels is a
reason to have one of ours; one below 1.3 on ours says that it serves.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness
import mezzotint as mz
from cpu_lowprec import AVX2

BUDGET_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation, how to make its inputs, and whether it has a backward."""

    name: str
    run: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    has_backward: bool = True


def _module(make: Callable[[], nn.Module]) -> Callable[..., Any]:
    """Return a function of the module's input and parameters, so that they come in the dtype of the case."""
    torch.manual_seed(0)
    module = make()

    def run(x: Tensor) -> Any:
        out = module.to(x.dtype)(x)
        return out[0] if isinstance(out, tuple) else out

    return run


def _grouped(x: Tensor, weight: Tensor) -> Tensor:
    offsets = torch.arange(1, weight.shape[0] + 1, dtype=torch.int32) * (x.shape[0] // weight.shape[0])
    return F.grouped_mm(x, weight, offs=offsets)


_IDS = torch.randint(0, 1000, (64, 64), generator=torch.Generator().manual_seed(0))
_LABELS = torch.randint(0, 1000, (512,), generator=torch.Generator().manual_seed(0))
_MASK = torch.ones(128, 128, dtype=torch.bool).tril()

CASES = (
    Case(name="mm NN", run=torch.mm, shapes=((256, 384), (384, 512))),
    Case(name="mm NT (linear)", run=F.linear, shapes=((256, 384), (512, 384))),
    Case(name="mm TN", run=lambda a, b: a.t() @ b, shapes=((256, 384), (256, 512))),
    Case(name="linear with bias", run=F.linear, shapes=((256, 384), (512, 384), (512,))),
    Case(name="linear, 1 row", run=F.linear, shapes=((1, 1024), (1024, 1024))),
    Case(name="linear, 4 rows", run=F.linear, shapes=((4, 1024), (1024, 1024))),
    Case(name="mv", run=torch.mv, shapes=((1024, 1024), (1024,))),
    Case(name="addmv", run=torch.addmv, shapes=((1024,), (1024, 1024), (1024,))),
    Case(name="dot", run=torch.dot, shapes=((1 << 18,), (1 << 18,))),
    Case(name="bmm", run=torch.bmm, shapes=((16, 128, 64), (16, 64, 128))),
    Case(name="baddbmm", run=torch.baddbmm, shapes=((16, 128, 128), (16, 128, 64), (16, 64, 128))),
    Case(name="addbmm", run=torch.addbmm, shapes=((128, 128), (16, 128, 64), (16, 64, 128))),
    Case(name="einsum bthd,bshd->bhts", run=lambda a, b: torch.einsum("bthd,bshd->bhts", a, b),
         shapes=((2, 128, 4, 64), (2, 128, 4, 64))),
    Case(name="grouped_mm", run=_grouped, shapes=((256, 256), (4, 256, 256))),
    Case(name="bilinear", run=F.bilinear, shapes=((64, 64), (64, 64), (64, 64, 64))),
    Case(name="attention, causal", run=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
         shapes=((2, 4, 128, 64),) * 3),
    Case(name="attention, mask", run=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=_MASK),
         shapes=((2, 4, 128, 64),) * 3),
    Case(name="attention, grouped queries",
         run=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
         shapes=((2, 8, 128, 64), (2, 2, 128, 64), (2, 2, 128, 64))),
    Case(name="conv1d", run=lambda x, w: F.conv1d(x, w, padding=1), shapes=((4, 64, 256), (64, 64, 3))),
    Case(name="conv2d 3x3", run=lambda x, w: F.conv2d(x, w, padding=1), shapes=((4, 32, 32, 32), (32, 32, 3, 3))),
    Case(name="conv2d 1x1", run=F.conv2d, shapes=((4, 64, 32, 32), (64, 64, 1, 1))),
    Case(name="conv2d depthwise", run=lambda x, w: F.conv2d(x, w, padding=1, groups=64),
         shapes=((4, 64, 32, 32), (64, 1, 3, 3))),
    Case(name="conv2d 16x16 patches", run=lambda x, w: F.conv2d(x, w, stride=16),
         shapes=((4, 3, 128, 128), (192, 3, 16, 16))),
    Case(name="conv2d with bias", run=lambda x, w, b: F.conv2d(x, w, b, padding=1),
         shapes=((4, 32, 32, 32), (32, 32, 3, 3), (32,))),
    Case(name="conv3d", run=lambda x, w: F.conv3d(x, w, padding=1), shapes=((2, 16, 8, 16, 16), (16, 16, 3, 3, 3))),
    Case(name="transposed conv2d", run=lambda x, w: F.conv_transpose2d(x, w, stride=2),
         shapes=((4, 32, 16, 16), (32, 32, 2, 2))),
    Case(name="transposed conv1d", run=lambda x, w: F.conv_transpose1d(x, w, stride=2),
         shapes=((4, 64, 128), (64, 64, 2))),
    Case(name="transposed conv3d", run=lambda x, w: F.conv_transpose3d(x, w, stride=2),
         shapes=((2, 16, 4, 8, 8), (16, 16, 2, 2, 2))),
    Case(name="LSTM", run=_module(lambda: nn.LSTM(128, 128, batch_first=True)), shapes=((16, 32, 128),)),
    Case(name="GRU", run=_module(lambda: nn.GRU(128, 128, batch_first=True)), shapes=((16, 32, 128),)),
    Case(name="RNN", run=_module(lambda: nn.RNN(128, 128, batch_first=True)), shapes=((16, 32, 128),)),
    Case(name="embedding", run=lambda w: F.embedding(_IDS, w), shapes=((1000, 256),)),
    Case(name="layer_norm", run=lambda x, w, b: F.layer_norm(x, (384,), w, b), shapes=((512, 384), (384,), (384,))),
    Case(name="rms_norm", run=lambda x, w: F.rms_norm(x, (384,), w), shapes=((512, 384), (384,))),
    Case(name="batch_norm", run=lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
         shapes=((8, 32, 32, 32), (32,), (32,))),
    Case(name="group_norm", run=lambda x, w, b: F.group_norm(x, 8, w, b), shapes=((8, 32, 32, 32), (32,), (32,))),
    Case(name="instance_norm", run=F.instance_norm, shapes=((8, 32, 32, 32),)),
    Case(name="softmax", run=lambda x: x.softmax(-1), shapes=((512, 512),)),
    Case(name="log_softmax", run=lambda x: x.log_softmax(-1), shapes=((512, 1000),)),
    Case(name="cross_entropy", run=lambda x: F.cross_entropy(x, _LABELS), shapes=((512, 1000),)),
    Case(name="mse_loss", run=F.mse_loss, shapes=((512, 512), (512, 512))),
    Case(name="bce_with_logits", run=lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()),
         shapes=((512, 512), (512, 512))),
    Case(name="max_pool2d", run=lambda x: F.max_pool2d(x, 2), shapes=((8, 32, 32, 32),)),
    Case(name="avg_pool2d", run=lambda x: F.avg_pool2d(x, 2), shapes=((8, 32, 32, 32),)),
    Case(name="adaptive_avg_pool2d", run=lambda x: F.adaptive_avg_pool2d(x, 4), shapes=((8, 32, 32, 32),)),
    Case(name="interpolate bilinear", run=lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
         shapes=((8, 16, 32, 32),)),
    Case(name="gelu", run=F.gelu, shapes=((512, 512),)),
    Case(name="silu", run=F.silu, shapes=((512, 512),)),
    Case(name="relu", run=F.relu, shapes=((512, 512),)),
    Case(name="tanh", run=torch.tanh, shapes=((512, 512),)),
    Case(name="sigmoid", run=torch.sigmoid, shapes=((512, 512),)),
    Case(name="add", run=torch.add, shapes=((512, 512), (512, 512))),
    Case(name="mul", run=torch.mul, shapes=((512, 512), (512, 512))),
    Case(name="sum", run=lambda x: x.sum(-1), shapes=((512, 512),)),
    Case(name="mean", run=lambda x: x.mean(-1), shapes=((512, 512),)),
    Case(name="norm", run=lambda x: x.norm(dim=-1), shapes=((512, 512),)),
    Case(name="cumsum", run=lambda x: x.cumsum(-1), shapes=((512, 512),)),
    Case(name="cdist", run=torch.cdist, shapes=((256, 64), (256, 64))),
    Case(name="dropout", run=lambda x: F.dropout(x, 0.1), shapes=((512, 512),)),
    Case(name="masked_fill", run=lambda x: x.masked_fill(x > 1, 0.0), shapes=((512, 512),)),
    Case(name="topk", run=lambda x: x.topk(8)[0], shapes=((512, 512),)),
    Case(name="cat", run=lambda a, b: torch.cat((a, b), -1), shapes=((512, 512), (512, 512))),
    Case(name="transposed copy", run=lambda x: x.t().contiguous(), shapes=((512, 512),)),
    Case(name="index_select", run=lambda x: x.index_select(0, _LABELS % 512), shapes=((512, 512),)),
)  # fmt: skip


def time_case(case: Case, variants: dict[str, tuple[torch.dtype, bool]]) -> dict[str, tuple[float, float] | str]:
    """Return seconds of forward and backward by variant, or why there are none."""
    results: dict[str, tuple[float, float] | str] = {}
    samples: dict[str, list[tuple[float, float]]] = {}
    inputs: dict[str, list[Tensor]] = {}
    for name, (dtype, _) in variants.items():
        torch.manual_seed(0)
        inputs[name] = [torch.randn(shape).to(dtype).requires_grad_(case.has_backward) for shape in case.shapes]
    start = time.perf_counter()
    while time.perf_counter() - start < BUDGET_SECONDS * len(variants) or len(samples.get("float32", ())) < 3:
        for name, (_, is_ours) in variants.items():
            if name in results:
                continue
            try:
                sample = _once(case, inputs[name], is_ours)
            except (RuntimeError, NotImplementedError) as error:
                results[name] = str(error).splitlines()[0]
                continue
            samples.setdefault(name, []).append(sample)
    for name, times in samples.items():
        if name not in results:
            kept = times[1:] or times
            results[name] = tuple(statistics.median(column) for column in zip(*kept, strict=True))  # type: ignore[assignment]
    return results


def _once(case: Case, tensors: list[Tensor], is_ours: bool) -> tuple[float, float]:
    gate = mz.fast_cpu() if is_ours else None
    if gate is not None:
        gate.__enter__()
    try:
        start = time.process_time()
        out = case.run(*tensors)
        middle = time.process_time()
        if case.has_backward:
            torch.autograd.grad(out, [t for t in tensors if t.requires_grad], torch.ones_like(out), allow_unused=True)
        return middle - start, time.process_time() - middle
    finally:
        if gate is not None:
            gate.__exit__(None, None, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=0)
    parser.add_argument("--simulate-avx2", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    if options.simulate_avx2 and os.environ.get("DNNL_MAX_CPU_ISA") != "AVX2":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    torch.set_num_threads(options.threads)
    variants = {
        "float32": (torch.float32, False),
        "bfloat16, torch": (torch.bfloat16, False),
        "bfloat16, ours": (torch.bfloat16, True),
        "float16, torch": (torch.float16, False),
        "float16, ours": (torch.float16, True),
    }
    rows, raw = [], {}
    for case in CASES:
        if options.only not in case.name:
            continue
        raw[case.name] = results = time_case(case, variants)
        base = results["float32"]
        row = [case.name, " / ".join(f"{1e3 * part:.2f}" for part in base)]
        for name in list(variants)[1:]:
            found = results[name]
            row.append(found if isinstance(found, str) else " / ".join(
                f"{a / b:.2f}" if b > 5e-6 else "-" for a, b in zip(found, base, strict=True)))  # fmt: skip
        rows.append(row)
        print(" | ".join(row), flush=True)
    table = harness.markdown_table(["operation, forward / backward", "float32, ms", *list(variants)[1:]], rows)
    if options.record:
        facts = {**harness.machine(), "limited_to": "AVX2" if options.simulate_avx2 else None}
        name = "cpu_operations_avx2" if options.simulate_avx2 else "cpu_operations"
        print(harness.write_record(options.record, name, {"Ratios to float32": table}, raw, facts))


if __name__ == "__main__":
    main()
