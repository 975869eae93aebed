"""Write the generated parts of README.md: the recorded demo and the table of policies.

    python scripts/generate_docs.py            write
    python scripts/generate_docs.py --check    exit 1 where a file is stale

The demo's record is `benchmarks/records/demo.json`, the output of `mezzotint demo --json`.
"""

import json
import re
import sys
from io import StringIO
from pathlib import Path

from rich.console import Console

from mezzotint.cli.demo import CAVEAT, comparison
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


def main() -> int:
    """Write the files, or with --check compare them."""
    before = README.read_text(encoding="utf-8")
    after = filled(before)
    if "--check" in sys.argv:
        return int(before != after)
    README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
