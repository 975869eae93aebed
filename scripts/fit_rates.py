"""Fit the constants of `plan/efficiency.py` on published microbenchmarks, and say how well they do.

Only rows of single operations (scope=op) are read. Written is `src/mezzotint/plan/rates.csv`; printed are the errors by
generation and format, also with each card left out of its own fit.
"""

import csv
import itertools
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "data" / "gpu_measurements.csv"
RATES = ROOT / "src" / "mezzotint" / "plan" / "rates.csv"
FORMATS = {
    "fp32": "float32",
    "tf32": "tfloat32",
    "pure-fp16": "float16",
    "pure-bf16": "bfloat16",
    "fp8": "float8_e4m3fn",
}
FIELDS = ("generation", "overhead_us", "scale", "small_tile", "unaligned", "low", "high", "rows")


def products() -> list[tuple[object, str, int, float]]:
    """Return (card, format, n, seconds) of the square products of cards in the table."""
    from mezzotint.hardware.devices import find_device
    from mezzotint.hardware.gpus import find_gpu

    found = []
    with ROWS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            size = re.fullmatch(r"square (\d+)x\1x\1", row["architecture_details"])
            if size is None or "scope=op" not in row["notes"] or row["dtype_mode"] not in FORMATS:
                continue
            try:
                card = find_device(row["gpu"]) or find_gpu(row["gpu"])
            except ValueError:
                continue
            if card.compute_capability is None or card.bandwidth_bytes_per_second is None:
                continue
            n = int(size[1])
            found.append((card, FORMATS[row["dtype_mode"]], n, 2 * n**3 / (float(row["value"]) * 1e12)))
    return found


def error(rates: object, rows: list[tuple[object, str, int, float]]) -> list[float]:
    """Return predicted over measured time of each row."""
    from mezzotint.plan import efficiency

    efficiency._rates.cache_clear()
    kept, efficiency.rates_of = efficiency.rates_of, lambda _card: rates
    try:
        sizes = {"float32": 4, "tfloat32": 4, "float8_e4m3fn": 1}
        return [
            efficiency.product_time(
                card, name, n, n, n, itemsize_in=sizes.get(name, 2), itemsize_out=max(2, sizes.get(name, 2))
            ).seconds
            / seconds
            for card, name, n, seconds in rows
        ]
    finally:
        efficiency.rates_of = kept


def fit(rows: list[tuple[object, str, int, float]]) -> object:
    """Return the constants with the least median and 90th percentile error, by grid."""
    from mezzotint.plan.efficiency import Rates

    best = None
    for overhead, scale, small in itertools.product(
        (2, 3, 4, 6, 8, 10), (0.85, 0.9, 0.95, 1.0), (0.8, 0.85, 0.9, 0.95)
    ):
        rates = Rates(overhead * 1e-6, scale, small, UNALIGNED, 1.0, 1.0, len(rows))
        off = sorted(abs(ratio - 1) for ratio in error(rates, rows))
        score = off[len(off) // 2] + off[int(len(off) * 0.9)] / 3
        if best is None or score < best[0]:
            best = (score, rates)
    assert best is not None
    return best[1]


UNALIGNED = 272.73 / 395.01
"""An MLP of 10922 columns against 11008, bfloat16, H100 (stas00/ml-engineering): 272.73 and 395.01 TFLOP/s."""


def main() -> int:
    """Fit, write, print."""
    from mezzotint.plan.efficiency import Rates

    groups = defaultdict(list)
    for row in products():
        groups["all"].append(row)
        major, minor = row[0].compute_capability
        groups[f"{major}.{minor}"].append(row)
    lines = []
    for generation, rows in sorted(groups.items()):
        rates = fit(rows)
        ratios = sorted(error(rates, rows))
        low, high = 1 / ratios[int(len(ratios) * 0.9)], 1 / ratios[int(len(ratios) * 0.1)]
        rates = Rates(rates.overhead, rates.scale, rates.small_tile, UNALIGNED, low, high, len(rows))
        lines.append((generation, rates.overhead * 1e6, rates.scale, rates.small_tile, UNALIGNED, low, high, len(rows)))
        report(generation, rates, rows)
        left_out(rows)
    with RATES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows([line[0], *(f"{value:.4g}" for value in line[1:])] for line in lines)
    return 0


def report(generation: str, rates: object, rows: list[tuple[object, str, int, float]]) -> None:
    """Print the errors by format."""
    by_format = defaultdict(list)
    for (_, name, _, _), ratio in zip(rows, error(rates, rows), strict=True):
        by_format[name].append(ratio)
    for name, ratios in by_format.items():
        off = sorted(abs(ratio - 1) for ratio in ratios)
        sys.stdout.write(
            f"{generation:4} {name:14} {len(off):3} rows, median error {off[len(off) // 2]:.1%}, 90th percentile "
            f"{off[int(len(off) * 0.9)]:.1%}, bias {statistics.median(ratios) - 1:+.1%}\n"
        )


def left_out(rows: list[tuple[object, str, int, float]]) -> None:
    """Print the median error of cards whose rows took no part in the fit."""
    names = {card.name for card, *_ in rows}
    if len(names) < 2:
        return
    off = []
    for name in names:
        rates = fit([row for row in rows if row[0].name != name])
        off += [abs(ratio - 1) for ratio in error(rates, [row for row in rows if row[0].name == name])]
    sys.stdout.write(f"     each card left out: median error {sorted(off)[len(off) // 2]:.1%}\n")


if __name__ == "__main__":
    sys.exit(main())
