"""What is said about number formats, each with the command that tests it, the verdict and the figure.

Exact claims are computed anew, by torch's casts and the exact scalar rounding, whenever the page is made; claims of
speed and memory are read from the dated records of `benchmarks/records`. Every verdict is asserted against its figure,
so that a record that says otherwise stops the page from being made. `docs/claims.md` is made of this by
`scripts/generate_docs.py`.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mezzotint.formats.catalog import (
    BFLOAT16,
    FLOAT8_E4M3FN,
    FLOAT8_E4M3FNUZ,
    FLOAT16,
    FLOAT32,
    TFLOAT32,
)
from mezzotint.formats.rounding import Rounding, round_scalar
from mezzotint.kernels.tensors import round_to

STOCK = "bfloat16, torch's kernels"
RECORDS = Path(__file__).resolve().parents[1] / "benchmarks" / "records"


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence people repeat; `check` returns the verdict (true, false, true if ...) and the figure."""

    text: str
    command: str
    check: Callable[[], tuple[str, str]]


def record(pattern: str) -> Any:
    return json.loads(max(RECORDS.glob(pattern)).read_text(encoding="utf-8"))


def cast(value: float, dtype: torch.dtype) -> float:
    """Return a float64 as torch stores it, by way of float32, as tensors are."""
    return float(torch.tensor(value, dtype=torch.float32).to(dtype))


def float16_ends() -> tuple[str, str]:
    largest = torch.finfo(torch.float16).max
    assert (
        (cast(65519, torch.float16), cast(65520, torch.float16))
        == (largest, float("inf"))
        == (FLOAT16.max, float("inf"))
    )
    return "true", "the largest is 65504; numbers below 65520 still round to it, from 65520 on they become infinity"


def bfloat16_overflow() -> tuple[str, str]:
    assert cast(3.39e38, torch.bfloat16) < float("inf") == cast(3.4e38, torch.bfloat16)
    assert BFLOAT16.max < 3.4e38 < FLOAT32.max
    return "false", f"its largest is {BFLOAT16.max:.4g}: the float32 number 3.4e38 becomes infinity"


def same_range() -> tuple[str, str]:
    assert BFLOAT16.smallest_normal == FLOAT32.smallest_normal == torch.finfo(torch.bfloat16).smallest_normal
    return (
        "true for normal numbers",
        f"both begin at {BFLOAT16.smallest_normal:.3g} and end at 3.4e38; subnormals go down to "
        f"{BFLOAT16.smallest_subnormal:.2g} against {FLOAT32.smallest_subnormal:.2g}",
    )


def digits() -> tuple[str, str]:
    lost = [n for n in range(100, 1000) if round(cast(n / 100, torch.bfloat16), 2) != n / 100]
    kept = [n for n in range(10, 100) if round(cast(n / 10, torch.bfloat16), 1) == n / 10]
    assert len(kept) == 90
    assert BFLOAT16.decimal_digits == 2
    return (
        "true",
        f"all 90 numbers of two digits from 1.0 to 9.9 survive; of the 900 with three from 1.00 to 9.99, {len(lost)} "
        "do not",
    )


def more_precise() -> tuple[str, str]:
    ratio = BFLOAT16.epsilon / FLOAT16.epsilon
    assert ratio == torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float16).eps == 8
    return "true", f"{ratio:.0f} times: machine epsilon 2^-10 against 2^-7, while its range ends at 65504"


def small_updates() -> tuple[str, str]:
    assert cast(1.001, torch.bfloat16) == 1.0
    assert cast(1.0 + 2.0**-8, torch.bfloat16) == 1.0 < cast(1.0 + 2.0**-8 + 2.0**-20, torch.bfloat16)
    return "true", "at 1.0, an addition of up to 2^-8 = 0.0039 rounds away; that of an optimizer is often 0.001 or less"


def float16_gradients() -> tuple[str, str]:
    assert cast(2.0**-25, torch.float16) == 0.0 < cast(2.0**-25 * 1.001, torch.float16) == FLOAT16.smallest_subnormal
    return "true", "up to 2^-25 = 2.98e-8 they become 0; up to 6.1e-5 they are subnormal and have fewer than 11 bits"


def truncation() -> tuple[str, str]:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(100_000, generator=generator)
    nearest = round_to(numbers, "bfloat16")
    assert torch.equal(numbers.bfloat16().float(), nearest)
    cut = (nearest != round_to(numbers, "bfloat16", rounding=Rounding.TOWARD_ZERO)).float().mean()
    return (
        "false",
        f"torch rounds to nearest, ties to even; cutting off would differ for {float(cut):.0%} of normal numbers",
    )


def tf32_bits() -> tuple[str, str]:
    assert TFLOAT32.field_bits == 19
    assert TFLOAT32.epsilon == FLOAT16.epsilon
    return "false", "19 bits are used: float32's exponent and float16's mantissa (machine epsilon 2^-10)"


def e4m3_end() -> tuple[str, str]:
    assert torch.finfo(torch.float8_e4m3fn).max == FLOAT8_E4M3FN.max == 448
    assert torch.finfo(torch.float8_e4m3fnuz).max == FLOAT8_E4M3FNUZ.max == 240
    return (
        "true if it is fnuz",
        "OCP's E4M3, torch.float8_e4m3fn, ends at 448; float8_e4m3fnuz, of older AMD cards, at 240",
    )


def e4m3_overflow() -> tuple[str, str]:
    assert cast(float("inf"), torch.float8_e4m3fn) == 448
    assert math.isnan(round_scalar(1000.0, FLOAT8_E4M3FN))
    return (
        "depends on the library",
        f"torch {torch.__version__.partition('+')[0]} saturates, and even infinity becomes 448; ml_dtypes gives NaN; here "
        "it is an argument",
    )


def compiled_cast() -> tuple[str, str]:
    fault = next(row for row in record("peer_faults-*.json")["results"] if row["library"] == "torch.compile")
    assert fault["verdict"] == "fault"
    return (
        "false",
        f"torch.compile drops the pair of casts: 1/3 comes back as {fault['theirs']}, eager gives {fault['right']}",
    )


def bench_ratios(label: str) -> tuple[list[float], str]:
    run = record("bench_cpu-*.json")
    name, _, kernels = label.partition("/")
    ratios = [
        row["ratio_to_float32"]["median"]
        for case in run["cases"]
        if case["op"].startswith("matmul")
        for row in case["measurements"]
        if row["format"] == name and row["kernels"] == (kernels or "torch")
    ]
    return ratios, f"{run['name']}, torch {run['facts']['torch']}"


def cpu_bfloat16() -> tuple[str, str]:
    ratios, machine = bench_ratios("bfloat16")
    steps = record("cpu_lowprec_avx2-*.json")["results"].values()
    avx2 = {row["name"]: row["ratio"] for timings in steps for row in timings[::-1]}
    assert median(ratios) < 1 < avx2[STOCK]
    return (
        "true of some",
        f"{machine}, which has bfloat16 units: products take {median(ratios):.2f} of float32's time; limited to AVX2, a training "
        f"step takes {avx2[STOCK]:.0f} times",
    )


def cpu_float16() -> tuple[str, str]:
    ratios, machine = bench_ratios("float16")
    ours, _ = bench_ratios("float16/mezzotint")
    assert min(ratios) > 2
    return (
        "false here",
        f"{machine}: torch's float16 products take {median(ratios):.0f} times float32's time ({min(ratios):.0f} to "
        f"{max(ratios):.0f}), mezzotint's {median(ours):.2f}",
    )


def cpu_float8() -> tuple[str, str]:
    ratios, machine = bench_ratios("float8_e4m3fn")
    assert min(ratios) > 1 > max(bench_ratios("bfloat16")[0])
    return (
        "false on a CPU",
        f"{machine}: products take {median(ratios):.1f} times float32's time ({min(ratios):.1f} to {max(ratios):.1f})",
    )


def demo_arms() -> tuple[Any, Any]:
    """Return the recorded demo's arms: float32 and the mixed policy."""
    arms = record("demo.json")["arms"]
    return arms[0], arms[1]


def twice_as_fast() -> tuple[str, str]:
    ratios, machine = bench_ratios("bfloat16")
    step = demo_arms()[1]["time_ratio"]
    assert 1.8 < 1 / median(ratios) < 2.5
    assert 1 / step < 1.8
    return (
        "true of products, less of training",
        f"{machine}: products {1 / median(ratios):.1f} times as fast, a whole training step of a 3M-parameter model "
        f"{1 / step:.1f} times",
    )


def half_the_memory() -> tuple[str, str]:
    plain, mixed = demo_arms()
    activations = mixed["step_memory"]["activations_bytes"] / plain["step_memory"]["activations_bytes"]
    assert activations < 0.75
    kept = [sum(value for key, value in arm["state_memory"].items() if key.endswith("bytes")) for arm in (plain, mixed)]
    assert kept[1] == kept[0]
    return (
        "false as a whole",
        f"a 3M-parameter model under bf16-mixed: activations {activations:.2f} of float32's, weights and optimizer "
        f"states {kept[1] / kept[0]:.2f}",
    )


def no_loss() -> tuple[str, str]:
    plain, mixed = demo_arms()
    assert abs(mixed["validation_loss"] - plain["validation_loss"]) < 0.01
    return (
        "not refuted by one pair of runs",
        f"validation loss {mixed['validation_loss']:.3f} against {plain['validation_loss']:.3f} after the same steps from "
        "the same start; one pair proves nothing",
    )


CLAIMS = (
    Claim(
        text="float16 overflows above 65504",
        command="mezzotint formats 65504 65519 65520 --format float16",
        check=float16_ends,
    ),
    Claim(
        text="bfloat16 cannot overflow", command="mezzotint formats 3.4e38 --format bfloat16", check=bfloat16_overflow
    ),
    Claim(text="bfloat16 has float32's range", command="mezzotint formats", check=same_range),
    Claim(text="bfloat16 keeps two decimal digits", command="mezzotint formats 9.87 --format bfloat16", check=digits),
    Claim(text="float16 is more precise than bfloat16", command="mezzotint formats 1/3", check=more_precise),
    Claim(
        text="bfloat16 weights stop moving when updates are small",
        command="mezzotint formats 1.001 --format bfloat16",
        check=small_updates,
    ),
    Claim(
        text="float16 loses small gradients, so the loss must be scaled",
        command="mezzotint formats 2.9e-8 1e-6 --format float16",
        check=float16_gradients,
    ),
    Claim(
        text="A cast to bfloat16 cuts off the lower 16 bits",
        command="mezzotint formats 1.006 --format bfloat16",
        check=truncation,
    ),
    Claim(text="TF32 is a 32-bit format", command="mezzotint formats 1/3 --format tfloat32", check=tf32_bits),
    Claim(text="float8 E4M3 ends at 240", command="mezzotint formats 240 448 --format e4m3", check=e4m3_end),
    Claim(text="float8 overflow gives NaN", command="mezzotint formats 1000 --format e4m3", check=e4m3_overflow),
    Claim(
        text="Casting to bfloat16 and back does the same under torch.compile",
        command="python benchmarks/peer_faults.py",
        check=compiled_cast,
    ),
    Claim(text="CPUs have no bfloat16", command="mezzotint doctor --device cpu", check=cpu_bfloat16),
    Claim(
        text="float16 is a fast format on every device",
        command="mezzotint bench --device cpu --ops matmul --formats float16",
        check=cpu_float16,
    ),
    Claim(
        text="float8 is faster than bfloat16",
        command="mezzotint bench --device cpu --ops matmul --formats float8_e4m3fn",
        check=cpu_float8,
    ),
    Claim(text="bfloat16 is about twice as fast", command="mezzotint bench --ops matmul", check=twice_as_fast),
    Claim(text="Mixed precision halves the memory", command="mezzotint demo", check=half_the_memory),
    Claim(text="Mixed precision loses no quality", command="mezzotint demo", check=no_loss),
)


def page() -> str:
    """Return docs/claims.md."""
    lines = [
        "# Claims",
        "",
        "What is said about number formats and mixed precision, tested. Exact claims are computed whenever this page is",
        "made (`python scripts/generate_docs.py`); speeds and memory are those of the dated records in",
        "`benchmarks/records`, on the machine that each names, and yours will differ: run the command. No figure here was",
        "taken on a GPU.",
        "",
        "| claim | verdict | figure | test it |",
        "|---|---|---|---|",
    ]
    for claim in CLAIMS:
        verdict, figure = claim.check()
        lines.append(f"| {claim.text} | {verdict} | {figure} | `{claim.command}` |")
    return "\n".join([*lines, "", *rounding_faults(), ""])


def rounding_faults() -> list[str]:
    """Return the record of other libraries' rounding, as a table."""
    found = record("peer_faults-*.json")
    facts = ", ".join(f"{name} {found['machine'][name]}" for name in found["machine"] if name in VERSIONED)
    lines = [
        "## How libraries round",
        "",
        f"Suspected faults, each tried on {found['date']} by `python benchmarks/peer_faults.py` ({facts}).",
        "",
        "| library | suspected | input | right | theirs | mezzotint | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = ("library", "what", "source", "right", "theirs", "ours", "verdict")
    return [*lines, *("| " + " | ".join(row[key] for key in keys) + " |" for row in found["results"])]


VERSIONED = ("torch", "ml_dtypes", "torchao", "qtorch", "gfloat", "pychop", "unit-scaling")
