"""docs/cpu.md: what low precision costs on a CPU, from the newest records."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"

INTRODUCTION = """\
# Low precision on CPUs

Made by `python scripts/generate_docs.py` from the records named below each table.

On a processor without bfloat16 units, torch's own bfloat16 and float16 kernels train many times slower than float32,
and so does every library that calls them. Under `with mz.fast_cpu():` the same program runs at about float32's speed,
keeps the memory of 16 bits, and computes as a tensor core does: compact operands, float32 sums, one rounding of each
result. At best it is some ten percent faster than float32: there are no units that could make it more.

```python
import torch
import mezzotint as mz

model = torch.nn.Linear(64, 64)
with mz.fast_cpu():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(32, 64)).float().square().mean()
    loss.backward()
```

- The context goes around forward *and* backward. It nests; the gate is process-wide, because autograd may run backward
  in another thread. `mz.fast_cpu().enable()` opens it for the rest of the process. `Engine`, `mezzotint train` and
  `mezzotint demo` open it by themselves.
- Outside the context, and for every other dtype inside it, torch's own kernels compute the same bits as before.
- Where torch's kernels are fast, they stay: that is measured once per process. `mezzotint doctor` says what was chosen.
  `MEZZOTINT_LOWPREC=off`, `upcast` or `packed` decides by hand.
- Models under `torch.compile` need `mz.fast_cpu(compiled=True)`, since compiled graphs call other overloads.
- Once our kernels are registered, float32 gradients of fused attention and of convolutions, and float32 products of
  compiled graphs, hold Python's global lock while they compute.

## What computes an operation

| operations | how |
|---|---|
| `mm`, `bmm`, `addmm`, `baddbmm`, `_grouped_mm` from half a million multiplications on, and what is made of them: linear layers, `matmul`, `einsum`, plain attention, cells of RNNs | a kernel of ours that widens 16 bits to float32 while it packs, sums in float32, and rounds what is still in cache; on torch's own threads |
| smaller products, `addbmm`, in-place sums; convolutions of any kind; fused attention (bfloat16's forward aside); LSTM layers on float32 inputs under autocast, which torch leaves to oneDNN (what it keeps for backward is as large as in float32) | torch's float32 kernel on converted operands, rounded once |
| LSTMs on 16-bit inputs of one dtype, or under autocast to it, without projection or packed sequences | products as above, gates and cells in float32, each layer recorded as one operation that keeps 16 bits; cannot be differentiated twice, as in float32. Torch would make them of products and small operations |
| everything else: norms, softmax, losses, pooling, embedding, elementwise operations, reductions, `mv`, `dot` | torch's own kernel, whose 16-bit versions cost at most about twice float32's time |

The packing kernel needs AVX2 with FMA, AVX-512 or NEON, and, on several threads, the OpenMP library (libgomp) that
torch's Linux wheels bring; elsewhere products are converted as the smaller ones are. What a kernel of ours is given and
cannot serve goes to torch's, is counted (`mezzotint.lowprec.calls.call_counts()`) and named once in a warning.
"""

EMULATED = """\
## Emulated formats

The policies `fp8-mixed`, `fp8-rowwise`, `fp8-blockwise`, `mxfp8`, `nvfp4` and `fp16-products`, and any other that the
field `products` spells, round the inputs of the three products of each linear layer: forward, input gradient and weight
gradient. Sums are float32. On a CPU the rounding happens while operands are packed; on other devices it is done by
torch operations with the same numbers. On a GPU that multiplies float8, torchao's real float8 layers are used for
current scales of whole tensors or rows (`pip install 'mezzotint[fp8]'`).

- Changed are `torch.nn.Linear` layers with both sizes a multiple of 16 and a weight of their own; attention, embeddings
  and a head tied to an embedding stay in the compute format.
- `scale=tensor` is one scale for a tensor, from its own largest magnitude, or delayed, from that of the last `history`
  steps; `row` one for each row or column that a product does not sum over; `block` one for 1 x 128 numbers of
  activations and gradients and 128 x 128 of weights. MX and NVFP4 blocks lie along the axis that is summed, so each
  operand is rounded twice a step. `stochastic=true` rounds gradients at random.
- Products of 8-bit numbers are exact in float32 and the sums are float32's. Hopper's tensor cores keep about 14 bits of
  a float8 sum, so equal bits with any one GPU are not claimed. Checked against torchao's own emulation: over 99 % of
  results are equal, the rest are neighbours.

## Saved activations

`saved=bfloat16` (the policy `bf16-saved`) leaves all arithmetic in float32 and keeps in bfloat16 what waits for
backward. Statistics, log-probabilities, parameters and the user's data stay as they are; a tensor that several
operations keep is rounded once.

## Modules

`mezzotint.modules` has an RMSNorm, a SwiGLU and a LinearCrossEntropy that keep less for backward, for any model. In
`mezzotint.models.gpt.GPT` they are passed as classes, and `is_residual_compact` keeps the residual stream in the
autocast dtype: it rounds where plain autocast with a float32 embedding does not, so it is an option.
"""

NOT_PAID = """\
## What did not pay

- Packing products of fewer than 8 rows or columns: up to 5 times float32's time, converting 2; and a single row against
  a weight stored by rows is fastest by torch's own kernel, which reads 16 bits.
- Waiting for the packed operand inside one parallel region: 3 us less a call, but a team that waits spins on its cores,
  and beside a busy neighbour steps took many times longer. Two regions sleep.
- Rounding float8 and MX operands before the product: a step took 1.19 (per tensor) and 1.31 (MX) of float32's time on
  two threads; rounded while they are packed, they cost what the tables say.
- An update that calls MKL's square root, as torch's AdamW does where `fused=True` is not set, to have its bits: three
  times the fused one. Pass `fused=True`.
- oneDNN's float32 LSTM for 16-bit inputs: as fast, but it keeps float32's memory for backward, 142 MiB where products
  kept 44 and the layer of ours keeps 38.
"""


def newest(pattern: str) -> tuple[dict[str, Any], str] | None:
    """Return the newest record of a name, and the words that point to it."""
    paths = sorted(RECORDS.glob(pattern))
    if not paths:
        return None
    found = json.loads(paths[-1].read_text(encoding="utf-8"))
    machine = found["machine"]
    limited = f" limited to {machine['limited_to']}" if machine.get("limited_to") else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    path = paths[-1].relative_to(ROOT).with_suffix(".md")
    return found, f"({machine['cpu']}{limited}, {threads}, torch {machine['torch']}, {found['date']}; `{path}`)"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _ratio(timing: dict[str, Any]) -> str:
    return f"{timing['ratio']:.2f} ± {timing['ratio_spread']:.2f}"


def step_section() -> list[str]:
    lines = ["## A training step, in units of float32's time", ""]
    for pattern in ("cpu_lowprec_avx2-*.json", "cpu_lowprec_avx2_2threads-*.json"):
        found = newest(pattern)
        if found is None:
            continue
        record, words = found
        for title, timings in record["results"].items():
            rows = [[t["name"], f"{t['median_seconds']:.3f}", _ratio(t)] for t in timings]
            lines += [f"{title}:", "", *table(["step", "seconds", "ratio to float32"], rows)]
        lines += [words, ""]
    return lines


def memory_section() -> list[str]:
    found = newest("memory_avx2-*.json")
    if found is None:
        return []
    record, words = found
    results = record["results"]
    rows = []
    for name, result in results.items():
        base = "float32, V=8192" if "V=8192" in name else "float32"
        base = "float32, plain attention" if "plain attention" in name else base
        resident, whole = result["resident_bytes"], results[base]["resident_bytes"]
        rows.append([
            name,
            f"{result['peak_bytes'] / 2**20:.0f}",
            f"{result['peak_bytes'] / results[base]['peak_bytes']:.2f}",
            "-" if not resident or not whole else f"{resident / 2**20:.0f} ({resident / whole:.2f})",
        ])  # fmt: skip
    header = ["10M-parameter language model", "peak, MiB", "over float32", "resident peak, MiB (over float32)"]
    return [
        "## Memory of a step, above weights and optimizer states",
        "",
        *table(header, rows),
        "The peak adds up the allocator's events and repeats exactly. The resident peak is that of a process by itself and",
        f"moves with what malloc keeps. {words}",
        "",
    ]


def simple_section(pattern: str, title: str, header: Sequence[str], row: Callable[[str, Any], list[str]]) -> list[str]:
    found = newest(pattern)
    if found is None:
        return []
    record, words = found
    rows = [row(name, result) for name, result in record["results"].items()]
    return [f"## {title}", "", *table(header, rows), words, ""]


def operations_section() -> list[str]:
    def row(name: str, results: dict[str, Any]) -> list[str]:
        base = results["float32"]
        cells = []
        for kind in ("bfloat16, torch", "bfloat16, ours", "float16, torch", "float16, ours"):
            found = results[kind]
            cells.append("-" if isinstance(found, str) else " / ".join(
                f"{a / b:.2g}" if b > 5e-6 else "-" for a, b in zip(found, base, strict=True)))  # fmt: skip
        return [name, *cells]

    header = ["forward / backward", "bfloat16, torch's", "inside fast_cpu", "float16, torch's", "inside fast_cpu"]
    return simple_section(
        "cpu_operations_avx2-*.json", "Operation by operation, in units of float32's time", header, row
    )


def peers_section() -> list[str]:
    def row(name: str, result: Any) -> list[str]:
        _, outside, losses = result
        return [name, f"{outside['ratio']:.1f} ± {outside['ratio_spread']:.1f}", f"{losses['torch']:.5f}",
                f"{losses['ours']:.5f}"]  # fmt: skip

    header = ["unchanged bfloat16 program", "time outside over inside fast_cpu", "last loss outside", "inside"]
    return simple_section("peers_under_fast_cpu_avx2-*.json", "Programs of other libraries", header, row)


def update_section() -> list[str]:
    found = newest("update-*.json")
    if found is None:
        return []
    record, words = found
    rows = [[t["name"], f"{t['median_seconds'] * 1e3:.0f}", _ratio(t)] for t in record["results"]]
    header = ["update of 50M weights", "ms", "over torch's fused float32 AdamW"]
    return ["## The update", "", *table(header, rows), words, ""]


def page() -> str:
    """Return docs/cpu.md."""
    parts = [
        INTRODUCTION.splitlines(), [""], step_section(), memory_section(), EMULATED.splitlines(), [""],
        update_section(), peers_section(), NOT_PAID.splitlines(), [""], operations_section(),
    ]  # fmt: skip
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"
