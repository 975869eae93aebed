"""Rounding a float32 tensor to other formats: time in copies of that tensor, beside other libraries.

    python benchmarks/rounding.py --record benchmarks/records

Every contestant turns float32 numbers into the rounded numbers, float32 again, ours into a tensor that exists; "codes"
and "in place" are ours too. One copy into an existing tensor, in the same rounds, is the unit. Where a library takes
longer than 2 seconds, it is timed once.
"""

import argparse
import time
from collections.abc import Callable

import torch

import harness
import peers
from mezzotint.formats.catalog import find_format
from mezzotint.formats.rounding import Overflow, Rounding
from mezzotint.kernels.tensors import dtype_of, encode, range_stats, round_to, round_to_blocks

SIZES = (1 << 16, 1 << 24)
FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
SAMPLE_SECONDS = 2e-3


def repeated(call: Callable[[], object]) -> tuple[Callable[[], object], int, float]:
    """Return a call that runs long enough to be timed, how often it repeats the call, and the seconds of one."""
    call()
    start = time.perf_counter()
    call()
    taken = time.perf_counter() - start
    count = max(1, round(SAMPLE_SECONDS / max(taken, 1e-7)))

    def many() -> None:
        for _ in range(count):
            call()

    return many, count, taken


def in_copies(contestants: dict[str, Callable[[], object]], rounds: int) -> list[dict[str, object]]:
    """Time all contestants against the first; those that take long, once."""
    prepared = {name: repeated(call) for name, call in contestants.items()}
    fast = {name: many for name, (many, _, taken) in prepared.items() if taken < 2.0}
    timings = {t.name: t for t in harness.interleave(fast, rounds=rounds)}
    base_name = next(iter(contestants))
    base_count = prepared[base_name][1]
    base = timings[base_name].median_seconds / base_count
    rows = []
    for name, (_, count, taken) in prepared.items():
        timing = timings.get(name)
        ratio = taken / base if timing is None else timing.ratio * base_count / count
        spread = None if timing is None else timing.ratio_spread * base_count / count
        seconds = taken if timing is None else timing.median_seconds / count
        rows.append({"name": name, "ratio": ratio, "spread": spread, "seconds": seconds})
    return rows


def rounding_rows(size: int, rounds: int) -> dict[str, list[dict[str, object]]]:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    place = x.clone()
    tables = {}
    for name in FORMATS:
        stored = torch.empty(size, dtype=dtype_of(find_format(name)))
        # what each format is used with: 16 bits overflow to infinity, 8 bits saturate
        mode = Overflow.SATURATE if find_format(name).bits == 8 else Overflow.INFINITY
        contestants: dict[str, Callable[[], object]] = {
            "copy": lambda: out.copy_(x),
            "mezzotint": lambda name=name, mode=mode: round_to(x, name, out=out, overflow=mode),
            "mezzotint, codes": lambda name=name, stored=stored, mode=mode: round_to(
                x, name, out=stored, overflow=mode
            ),
            "mezzotint, in place": lambda name=name: round_to(place, name, out=place),
            "torch, codes": lambda stored=stored: stored.copy_(x),
        }
        for peer, rounder in peers.rounders(name, with_compile=True).items():
            contestants[peer] = lambda rounder=rounder: rounder(x)
        tables[name] = in_copies(contestants, rounds)
    blocks = x.view(-1, 1024)
    contestants = {
        "copy": lambda: out.copy_(x),
        "mezzotint": lambda: round_to_blocks(blocks, "mxfp8", out=out.view(-1, 1024)),
        "mezzotint, nvfp4": lambda: round_to_blocks(blocks, "nvfp4", out=out.view(-1, 1024)),
    }
    for peer, rounder in peers.block_rounders().items():
        if size <= 1 << 16 or peer == "torchao":
            contestants[peer] = lambda rounder=rounder: rounder(blocks)
    tables["mxfp8_e4m3"] = in_copies(contestants, rounds)
    half = torch.empty(size, dtype=torch.bfloat16)
    contestants = {
        "copy": lambda: out.copy_(x),
        "mezzotint": lambda: round_to(x, "bfloat16", out=half, rounding=Rounding.STOCHASTIC, seed=1),
        "mezzotint, float8_e4m3fn": lambda: round_to(
            x, "e4m3", out=out, rounding=Rounding.STOCHASTIC, overflow=Overflow.SATURATE
        ),
    }
    for peer, rounder in peers.stochastic_rounders().items():
        contestants[peer] = lambda rounder=rounder: rounder(x)
    tables["bfloat16, stochastic"] = in_copies(contestants, rounds)
    return tables


def overhead_rows() -> list[list[str]]:
    """Microseconds of a whole call on 1,024 elements."""
    x = torch.randn(1024)
    out, half = torch.empty_like(x), torch.empty(1024, dtype=torch.bfloat16)
    blocks, block_out = x.view(1, 1024), out.view(1, 1024)
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: out.copy_(x),
        "round_to bfloat16": lambda: round_to(x, "bfloat16", out=out),
        "round_to float8_e4m3fn": lambda: round_to(x, "e4m3", out=out),
        "round_to bfloat16, stochastic": lambda: round_to(x, "bfloat16", out=half, rounding=Rounding.STOCHASTIC),
        "encode float8_e4m3fn": lambda: encode(x, "e4m3"),
        "round_to_blocks mxfp8": lambda: round_to_blocks(blocks, "mxfp8", out=block_out),
        "range_stats": lambda: range_stats(x),
    }
    prepared = {name: repeated(call) for name, call in calls.items()}
    timings = harness.interleave({name: many for name, (many, _, _) in prepared.items()}, rounds=15)
    return [[t.name, f"{t.median_seconds / prepared[t.name][1] * 1e6:.1f}"] for t in timings]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = harness.machine() | peers.versions()
    tables, results = {}, {}
    for size in SIZES:
        found = rounding_rows(size, args.rounds)
        results[str(size)] = found
        names = list(dict.fromkeys(row["name"] for rows in found.values() for row in rows if row["name"] != "copy"))
        header = ["", *found]
        rows = []
        for name in names:
            cells = []
            for column in found.values():
                row = next((r for r in column if r["name"] == name), None)
                spread = "" if row is None or row["spread"] is None else f" ± {row['spread']:.2g}"
                cells.append("" if row is None else f"{row['ratio']:.3g}{spread}")
            rows.append([name, *cells])
        copies = "; ".join(f"{f}: {rows[0]['seconds'] * 1e6:.3g} us" for f, rows in found.items())
        tables[f"{size:,} elements, in copies ({copies} a copy)"] = harness.markdown_table(header, rows)
    overhead = overhead_rows()
    results["overhead_us"] = overhead
    tables["Whole calls on 1,024 elements, microseconds"] = harness.markdown_table(["call", "us"], overhead)
    for title, table in tables.items():
        print(f"\n{title}\n{table}")
    if args.record:
        print(harness.write_record(args.record, "rounding", tables, results, facts))


if __name__ == "__main__":
    main()
