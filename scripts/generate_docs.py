"""Write what is generated: parts of README.md, docs/formats.md and docs/claims.md.

    python scripts/generate_docs.py            write
    python scripts/generate_docs.py --check    exit 1 where a file is stale

The demo's record is `benchmarks/records/demo.json`, the output of `mezzotint demo --json`.
"""

import json
import re
import sys
from io import StringIO
from pathlib import Path

import claims
from rich.console import Console

from mezzotint.cli.demo import CAVEAT, comparison
from mezzotint.formats.catalog import BLOCK_FORMATS, FORMATS
from mezzotint.formats.rounding import default_overflow
from mezzotint.kernels.tensors import dtype_of
from mezzotint.policy.presets import PRESET_NOTES
from mezzotint.training.pair import Arm

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
STOCK = "bfloat16, torch's kernels"
RECORD = ROOT / "benchmarks" / "records" / "demo.json"


def demo_block() -> str:
    """Return the demo's output as it was recorded."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    out = StringIO()
    console = Console(file=out, width=90, highlight=False)
    console.print(comparison([Arm.from_json(arm) for arm in record["arms"]]))
    console.print()
    console.print(CAVEAT)
    lines = [f"    {line}".rstrip() for line in out.getvalue().splitlines()]
    machine = record["machine"]
    facts = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {record['date']}"
    return "\n".join([*lines, "", f"({facts}; `benchmarks/records/demo.json`)"])


def avx2_sentence() -> str:
    """Return what the newest record says about a processor without native bfloat16."""
    path = max((ROOT / "benchmarks" / "records").glob("cpu_lowprec_avx2-*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    ratios = {timing["name"]: timing["ratio"] for timing in record["results"]}
    return (
        f"Limited to AVX2, as most laptops are, the same processor takes {ratios['bfloat16, fast_cpu']:.2f} times "
        f"float32's time for a bfloat16 step\nof the 10M-parameter recipe with mezzotint's kernels, and "
        f"{ratios[STOCK]:.0f} times with torch's own"
        f"\n(`{path.relative_to(ROOT).with_suffix('.md')}`)."
    )


def policy_rows() -> str:
    """Return a row per preset."""
    rows = [f"| `{name}` | {note} |" for name, note in PRESET_NOTES.items()]
    return "\n".join(["| policy | what it is |", "|---|---|", *rows])


def filled(text: str) -> str:
    """Return `text` with its generated parts made anew."""
    for mark, block in (("demo", demo_block()), ("avx2", avx2_sentence()), ("policies", policy_rows())):
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


def pages() -> dict[Path, str]:
    """Return every generated file as it should be."""
    return {
        README: filled(README.read_text(encoding="utf-8")),
        ROOT / "docs" / "formats.md": formats_page(),
        ROOT / "docs" / "claims.md": claims.page(),
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
