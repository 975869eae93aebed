"""Write what is generated: parts of README.md, and docs/formats.md, autocast.md, cpu.md, claims.md, rules.md,
and the figures that `mezzotint claims` quotes.

    python scripts/generate_docs.py            write
    python scripts/generate_docs.py --check    exit 1 where a file is stale

The demo's record is `benchmarks/records/demo.json`, the output of `mezzotint demo --json`.
"""

import json
import re
import sys
from io import StringIO
from pathlib import Path

import accuracy_page
import audit_example
import autocast_page
import claims_page
import cpu_page
import plan_example
import prove_page
import rules_page
from rich.console import Console

from mezzotint.formats.catalog import BLOCK_FORMATS, FORMATS
from mezzotint.formats.rounding import default_overflow
from mezzotint.kernels.tensors import dtype_of
from mezzotint.parity.result import Proof
from mezzotint.policy.presets import PRESET_NOTES
from mezzotint.report.proof_text import print_proof
from mezzotint.torch_internals.registry import declared

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
STOCK = "bfloat16, torch's kernels"
RECORD = ROOT / "benchmarks" / "records" / "demo.json"


def demo_block() -> str:
    """Return the demo's output as it was recorded."""
    proof = Proof.from_json(json.loads(RECORD.read_text(encoding="utf-8")))
    out = StringIO()
    print_proof(Console(file=out, width=90, highlight=False), proof, report_path="runs/demo/report.html")
    lines = [f"    {line}".rstrip() for line in out.getvalue().splitlines()]
    machine = proof.machine
    facts = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {proof.date}"
    return "\n".join([*lines, "", f"({facts}; `benchmarks/records/demo.json`)"])


def avx2_sentence() -> str:
    """Return what the newest record says about a processor without native bfloat16."""
    path = max((ROOT / "benchmarks" / "records").glob("cpu_lowprec_avx2-*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    ratios = {t["name"]: t["ratio"] for timings in record["results"].values() for t in timings[::-1]}
    step = next(iter(record["results"].values()))
    ours = {t["name"]: t["ratio"] for t in step}
    return (
        f"Limited to AVX2, as most laptops are, the same processor takes {ours['bfloat16, packed']:.2f} times float32's "
        f"time for a step\nof the 10M-parameter recipe in bfloat16, {ours['float16, packed']:.2f} in float16, "
        f"{ours['fp8-mixed']:.2f} in emulated float8 and {ours['mxfp8']:.2f} in MXFP8; torch's own kernels take\n"
        f"{ratios[STOCK]:.0f} times in bfloat16 ([docs/cpu.md](docs/cpu.md), `{path.relative_to(ROOT).with_suffix('.md')}`)."
    )


def kernels_block() -> str:
    """Return the newest records of rounding and statistics as a table: 16M elements, one thread."""
    records = ROOT / "benchmarks" / "records"
    rounding_path, stats_path = max(records.glob("rounding-*.json")), max(records.glob("stats-*.json"))
    rounding = json.loads(rounding_path.read_text(encoding="utf-8"))
    stats = json.loads(stats_path.read_text(encoding="utf-8"))
    header = "| 64k / 16M elements | mezzotint | torch | torch.compile | best other library |\n|---|---|---|---|---|"
    rows = [header]
    known = ("mezzotint", "torch", "torch.compile")
    for name in ("bfloat16", "float16", "float8_e4m3fn", "mxfp8_e4m3", "bfloat16, stochastic"):
        by_size = [
            {row["name"]: row["ratio"] for row in rounding["results"][size][name]} for size in ("65536", "16777216")
        ]
        ours_too = ("copy", "torch, codes")
        others = [
            min(
                (v for k, v in sized.items() if not k.startswith("mezzotint") and k not in (*known, *ours_too)),
                default=None,
            )
            for sized in by_size
        ]
        cells = [" / ".join("-" if k not in sized else f"{sized[k]:.3g}" for sized in by_size) for k in known]
        cells.append(" / ".join("-" if value is None else f"{value:.3g}" for value in others))
        rows.append(
            f"| round to {name}, in copies | " + " | ".join(cell.replace("- / -", "-") for cell in cells) + " |"
        )
    by_size = [
        {row["name"]: row["ratio"] for row in stats["results"][size]["normal"]} for size in ("65536", "16777216")
    ]
    names = ("mezzotint, full", "torch expressions, full", "torch.compile, full")
    cells = [" / ".join(f"{sized[k]:.3g}" for sized in by_size) for k in names]
    rows.append("| full range statistics, in reads | " + " | ".join(cells) + " | - |")
    machine = rounding["machine"]
    note = (
        f"A copy is one of the float32 tensor into another, a read its `sum`, in the same run, on one thread; 64k elements\n"
        f"lie in a cache, 16M in memory ({machine['cpu']}, torch {machine['torch']}, {rounding['date']};\n"
        f"`{rounding_path.relative_to(ROOT).with_suffix('.md')}`, `{stats_path.relative_to(ROOT).with_suffix('.md')}`). All 2^32\n"
        f"float32 numbers round to bfloat16, float16, TF32 and the 8-, 6- and 4-bit formats as torch, numpy and ml_dtypes round\n"
        f"them ({exhaustive_count()} formats, no difference)."
    )
    return "\n".join([*rows, "", note])


def exhaustive_count() -> int:
    """Return how many formats were compared on every float32 number; refuse to print a record with differences."""
    path = max((ROOT / "benchmarks" / "records").glob("exhaustive_rounding-*.json"))
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert all(found["differing"] == 0 and found["inputs"] == 1 << 32 for found in results.values())
    return len(results)


def policy_rows() -> str:
    """Return a row per preset."""
    rows = [f"| `{name}` | {note} |" for name, note in PRESET_NOTES.items()]
    return "\n".join(["| policy | what it is |", "|---|---|", *rows])


def filled(text: str) -> str:
    """Return `text` with its generated parts made anew."""
    blocks = {
        "demo": demo_block,
        "avx2": avx2_sentence,
        "policies": policy_rows,
        "kernels": kernels_block,
        "internals": internals_block,
        "audit": audit_example.block,
        "audit cost": audit_example.cost_block,
        "plan": plan_example.block,
        "plan world": plan_example.world_block,
        "plan cost": plan_example.cost_block,
        "error rates": prove_page.error_rates,
        "findings": prove_page.findings,
        "sacrifices": prove_page.sacrifices,
    }
    for mark, make in blocks.items():
        if f"<!-- {mark} -->" not in text:
            continue
        block = make()
        pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
        text = pattern.sub(lambda match, b=block: f"{match[1]}\n{b}\n\n{match[2]}", text)
    return text


def formats_page() -> str:
    """Return docs/formats.md: every table comes from the catalogue."""
    lines = [
        "# Number formats",
        "",
        "Made from `mezzotint.formats.catalog` by `python scripts/generate_docs.py`; `mezzotint formats` prints the same,",
        "and `mezzotint formats VALUE` what becomes of a value. Limits are derived from the field widths, the bias and the",
        "special codes, and are tested against `torch.finfo` and ml_dtypes.",
        "",
        "## Fields and limits",
        "",
        "| format | bits | sign, exponent, mantissa | bias | largest | smallest normal | smallest subnormal | epsilon | digits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {fmt.name} | {fmt.bits} | {int(fmt.is_signed)}, {fmt.exponent_bits}, {fmt.mantissa_bits} | {fmt.bias} | "
        f"{fmt.max:.6g} | {fmt.smallest_normal:.4g} | {'none' if not fmt.has_zero else f'{fmt.smallest_subnormal:.4g}'} | "
        f"2^{-fmt.mantissa_bits} | {fmt.decimal_digits} |"
        for fmt in FORMATS
    ]
    lines += [
        "",
        "Epsilon is the distance from 1 to the next number; digits is how many decimal digits every normal number keeps.",
        "",
        "## Special codes, overflow, source",
        "",
        "| format | infinities | NaN codes | negative zero | overflow becomes | torch dtype | specification |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {fmt.name} | {'yes' if fmt.has_infinity else 'no'} | {fmt.num_nans} | "
        f"{'yes' if fmt.has_negative_zero else 'no'} | {default_overflow(fmt)} | "
        f"{f'`{dtype_of(fmt)}`' if dtype_of(fmt) else 'none'} | {fmt.specification} |"
        for fmt in FORMATS
    ]
    lines += [
        "",
        "Overflow is an argument wherever numbers are rounded (`infinity`, `saturate`, `nan`); the table has what is taken",
        "when nothing is said. torch's cast to float8_e4m3fn saturates instead.",
        "",
        "## Block formats",
        "",
        "| format | element | scale | block | tensor scale | bits an element | specification |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {fmt.name} | {fmt.element.name} | {fmt.scale.name} | {fmt.block_size} | "
        f"{'float32' if fmt.has_tensor_scale else 'none'} | {fmt.bits:g} | {fmt.specification} |"
        for fmt in BLOCK_FORMATS
    ]
    return "\n".join([*lines, ""])


def internals_block() -> str:
    """Return the private names in use as a table."""
    rows = ["| name | what for | without it |", "|---|---|---|"]
    for one in declared():
        parts = [f"{', '.join(one.needed_by)}: refused"] if one.needed_by else []
        parts += [f"{', '.join(one.noted_in)}: a note, {one.lost}"] if one.noted_in else []
        purpose, _, fallback = one.purpose.partition("; ")
        rows.append(f"| `{one.path}` | {purpose} | {'; '.join(parts) or fallback or 'the same results'} |")
    return "\n".join(rows)


def pages() -> dict[Path, str]:
    """Return every generated file as it should be."""
    recorded = claims_page.recorded()
    return {
        README: filled(README.read_text(encoding="utf-8")),
        ROOT / "docs" / "architecture.md": filled((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")),
        ROOT / "docs" / "audit.md": filled((ROOT / "docs" / "audit.md").read_text(encoding="utf-8")),
        ROOT / "docs" / "plan.md": filled((ROOT / "docs" / "plan.md").read_text(encoding="utf-8")),
        ROOT / "docs" / "prove.md": filled((ROOT / "docs" / "prove.md").read_text(encoding="utf-8")),
        ROOT / "docs" / "accuracy.md": accuracy_page.page(),
        ROOT / "docs" / "autocast.md": autocast_page.page(),
        ROOT / "docs" / "formats.md": formats_page(),
        ROOT / "docs" / "claims.md": claims_page.page(recorded),
        claims_page.RECORDED: recorded,
        ROOT / "docs" / "cpu.md": cpu_page.page(),
        ROOT / "docs" / "rules.md": rules_page.page(),
    }


def main() -> int:
    """Write the files, or with --check compare them."""
    wanted = pages()
    if "--check" in sys.argv:
        stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is stale")
        return int(bool(stale))
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
