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
FIELDS = ("generation", "overhead_us", "scale", "small_tile", "unaligned", "busy", "turned", "low", "high", "rows")


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


SHAPES = (
    re.compile(r"(?P<m>\d+)x(?P<k>\d+)x(?P<n>\d+) M x K x N"),
    re.compile(r"(?P<m>\d+)x(?P<k>\d+) @ \d+x(?P<n>\d+)"),
)


def busy_rows() -> list[tuple[str, object, str, int, int, int, float]]:
    """Return (id, card, format, m, k, n, seconds) of products that kept a card busy.

    Those are squares from 8192 on, products measured in long loops ("large square", taken for 8192), and the linear
    layers of models, forward. Formats of tensor cores only: float32 draws less power.
    """
    from mezzotint.hardware.devices import find_device
    from mezzotint.hardware.gpus import find_gpu

    found = [
        (f"{card.name} {n}", card, name, n, n, n, seconds)
        for card, name, n, seconds in products()
        if n >= 8192 and name != "float32"
    ]
    with ROWS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            name = FORMATS.get(row["dtype_mode"], "float32")
            if "scope=op" not in row["notes"] or name in ("float32", "float8_e4m3fn") or "fwd+bwd" in row["notes"]:
                continue
            text = f"{row['model']} {row['architecture_details']}"
            shape = next((match for pattern in SHAPES if (match := pattern.search(text))), None)
            try:
                card = find_device(row["gpu"]) or find_gpu(row["gpu"])
            except ValueError:
                continue
            if card.compute_capability is None or card.bandwidth_bytes_per_second is None:
                continue
            if row["architecture_details"] == "large square":
                seconds = 2 * 8192**3 / (float(row["value"]) * 1e12)
                found.append((row["id"], card, name, 8192, 8192, 8192, seconds))
            elif shape is not None:
                m, k, n = (int(shape[key]) for key in "mkn")
                found.append((row["id"], card, name, m, k, n, float(row["value"]) * 1e-3))
    return found


def busy() -> dict[str, float]:
    """Return, by generation, the speed of products that keep a card busy over what one measured alone promises.

    Cards reach their power limit when products follow each other, and clocks fall; median of the rows.
    """
    from mezzotint.plan.efficiency import product_time

    found = defaultdict(list)
    for name, card, dtype, m, k, n, seconds in busy_rows():
        if dtype == "bfloat16" and card.compute_capability < (8, 0):
            continue  # emulated
        promised = product_time(card, dtype, m, n, k, itemsize_in=2, itemsize_out=2, is_busy=False).seconds
        major, minor = card.compute_capability
        found[f"{major}.{minor}" if major < 10 else f"{major}.x"].append(promised / seconds)
        sys.stdout.write(f"{name} {dtype} {m}x{k}x{n}: {promised / seconds:.2f}\n")
    return {generation: min(1.0, statistics.median(ratios)) for generation, ratios in found.items()}


def error(rates: object, rows: list[tuple[object, str, int, float]]) -> list[float]:
    """Return predicted over measured time of each row."""
    from mezzotint.plan import efficiency

    efficiency._rates.cache_clear()
    kept, efficiency.rates_of = efficiency.rates_of, lambda _card: rates
    try:
        sizes = {"float32": 4, "tfloat32": 4, "float8_e4m3fn": 1}
        return [
            efficiency.product_time(
                card,
                name,
                n,
                n,
                n,
                itemsize_in=sizes.get(name, 2),
                itemsize_out=max(2, sizes.get(name, 2)),
                is_busy=False,
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
        (2, 3, 4, 6, 8, 10), (0.85, 0.9, 0.95, 1.0), (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
    ):
        rates = Rates(overhead * 1e-6, scale, small, UNALIGNED, 1.0, 1.0, 1.0, 1.0, len(rows))
        off = sorted(abs(ratio - 1) for ratio in error(rates, rows))
        score = off[len(off) // 2] + off[int(len(off) * 0.9)] / 3
        if best is None or score < best[0]:
            best = (score, rates)
    assert best is not None
    return best[1]


UNALIGNED = 272.73 / 395.01
"""An MLP of 10922 columns against 11008, bfloat16, H100 (stas00/ml-engineering): 272.73 and 395.01 TFLOP/s."""


TURNED = {"9.0": 2.0 / (4.79 - 2.0), "10.x": 4.197 / (12.758 - 2 * 4.197)}
"""Speed of the gradient of a weight over that of the forward product, of linear layers alone.

H100: nanochat-001 and -002, 2.00 ms forward and 4.79 with backward; backward is one product there, that of the weight,
since two in 2.79 ms would exceed the card's peak. B300: te-034 less te-014, -019, -024 and -029 for forward and for the
gradient of the input. The tensor cores of Hopper take TF32 only along the axis that is summed over (PTX, wgmma), so the
figure of bfloat16 is the best that can be expected of it. No row tells it of other generations.
"""


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
        rates = Rates(rates.overhead, rates.scale, rates.small_tile, UNALIGNED, 1.0, 1.0, low, high, len(rows))
        lines.append(
            [generation, rates.overhead * 1e6, rates.scale, rates.small_tile, UNALIGNED, 1.0, 1.0, low, high, len(rows)]
        )
        report(generation, rates, rows)
        left_out(rows)
    write(lines)
    shares = busy()  # with the rates that were just written
    for line in list(lines):
        if line[0] in shares:
            line[5] = shares.pop(line[0])
        elif line[0] == "all":  # generations without squares of their own
            lines += [[generation, *line[1:5], share, *line[6:]] for generation, share in shares.items()]
    for line in lines:
        line[6] = TURNED.get(line[0], 1.0)
    write(lines)
    scattered()
    return 0


def attention(length: int, size: int, *, has_backward: bool) -> float:
    """Return the planned seconds of attention written out in float32 on an H100, as cs336h-046 to -062 measured it."""
    import torch

    from mezzotint.plan.recording import Recording
    from mezzotint.plan.roofline import plan_time
    from mezzotint.trace.recorder import Recorder

    recording, recorder = Recording("H100"), Recorder(has_ranges=False)
    with recording.within(recorder), recorder:
        q, k, v = (torch.randn(8, length, size, device="cuda", requires_grad=True) for _ in range(3))
        mask = torch.ones(length, length, dtype=torch.bool, device="cuda")
        first = recorder.num_operations
        scores = torch.where(mask, torch.einsum("...md,...nd->...mn", q, k) / size**0.5, float("-inf"))
        exps = torch.exp(scores - torch.max(scores, dim=-1, keepdim=True)[0])
        out = torch.einsum("...mn,...nd->...md", exps / torch.sum(exps, dim=-1, keepdim=True), v)
        if has_backward:
            out.sum().backward()
    return plan_time(recording.run(recorder.trace()), first=first).gpu


def scattered() -> None:
    """Print how `_SCATTERED` of `plan/efficiency.py` does on attention written out; the least error is what it is."""
    from mezzotint.plan import efficiency

    rows = []
    with ROWS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            size = re.match(r"unfused attention d(\d+) seq(\d+)", row["model"])
            if size is not None and row["dtype_mode"] == "fp32" and row["torch_compile"] == "no":
                rows.append((int(size[2]), int(size[1]), "backward" in row["notes"], float(row["value"]) * 1e-3))
    kept = efficiency._SCATTERED
    for value in (0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 2.0, 10.0):
        efficiency._SCATTERED = value
        off = []
        for length, width, is_backward, seconds in rows:
            planned = attention(length, width, has_backward=is_backward)
            if is_backward:
                planned -= attention(length, width, has_backward=False)
            off.append(abs(planned / seconds - 1))
        sys.stdout.write(f"scattered {value}: median error {statistics.median(off):.1%}, worst {max(off):.1%}\n")
    efficiency._SCATTERED = kept


def write(lines: list[list[object]]) -> None:
    """Write the table, and forget what was read of it."""
    from mezzotint.plan import efficiency

    with RATES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(FIELDS)
        writer.writerows([line[0], *(f"{value:.4g}" for value in line[1:])] for line in lines)
    efficiency._rates.cache_clear()


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
