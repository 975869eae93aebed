"""Range statistics of a float32 tensor: time in reads of that tensor (one `sum`), beside other ways to get them.

    python benchmarks/stats.py --record benchmarks/records

Full statistics are the counts of NaN, infinities, zeros and subnormals, amax, the smallest magnitude that is not zero,
and the histogram of exponents. The same are asked of torch's expressions, plain and compiled.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import harness
import peers
from mezzotint.kernels.tensors import range_stats
from rounding import in_copies

SIZES = (1 << 16, 1 << 24)


def by_expressions(x: Tensor) -> list[Tensor]:
    """Full statistics as one would write them with torch's float operations."""
    magnitude = x.abs()
    finite = torch.where(x.isfinite(), magnitude, 0.0)
    apart = torch.where(magnitude > 0, magnitude, torch.inf)
    bits = x.view(torch.int32)
    return [
        x.isnan().sum(),
        x.isinf().sum(),
        (x == 0).sum(),
        ((magnitude > 0) & (magnitude < 2.0**-126)).sum(),
        finite.amax(),
        apart.amin(),
        torch.bincount((bits >> 23) & 255, minlength=256),
    ]


def by_scalars(x: Tensor) -> list[Tensor]:
    magnitude = x.abs()
    return [
        x.isnan().sum(),
        x.isinf().sum(),
        (x == 0).sum(),
        ((magnitude > 0) & (magnitude < 2.0**-126)).sum(),
        torch.where(x.isfinite(), magnitude, 0.0).amax(),
        torch.where(magnitude > 0, magnitude, torch.inf).amin(),
    ]


def inputs(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(size, generator=generator)
    return {
        "normal": normal,
        "half zeros": normal.relu(),
        "over 60 exponents": normal * torch.exp(6 * torch.randn(size, generator=generator)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compiled, compiled_scalars = torch.compile(by_expressions), torch.compile(by_scalars)
    facts = harness.machine() | peers.versions()
    tables, results = {}, {}
    for size in SIZES:
        found = {}
        for kind, x in inputs(size).items():
            half = x.bfloat16()
            contestants: dict[str, Callable[[], object]] = {
                "sum": x.sum,
                "mezzotint, full": lambda x=x: range_stats(x),
                "mezzotint, full, bfloat16": lambda half=half: range_stats(half),
                "torch expressions, full": lambda x=x: by_expressions(x),
                "torch.compile, full": lambda x=x: compiled(x),
                "torch.compile, no histogram": lambda x=x: compiled_scalars(x),
                "torch.bincount of exponents": lambda x=x: torch.bincount((x.view(torch.int32) >> 23) & 255),
                "torch.aminmax": lambda x=x: torch.aminmax(x),
            }
            found[kind] = in_copies(contestants, args.rounds)
        results[str(size)] = found
        names = [row["name"] for row in next(iter(found.values())) if row["name"] != "sum"]
        rows = []
        for name in names:
            cells = (next(row for row in column if row["name"] == name) for column in found.values())
            rows.append([name, *(f"{row['ratio']:.3g} ± {row['spread']:.2g}" for row in cells)])
        reads = "; ".join(f"{kind}: {rows[0]['seconds'] * 1e6:.3g} us" for kind, rows in found.items())
        tables[f"{size:,} elements, in reads ({reads} a read)"] = harness.markdown_table(["", *found], rows)
    for title, table in tables.items():
        print(f"\n{title}\n{table}")
    if args.record:
        print(harness.write_record(args.record, "stats", tables, results, facts))


if __name__ == "__main__":
    main()
