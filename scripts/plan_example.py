"""What `mezzotint plan` prints of a GPT-2 training script, for README.md and docs/plan.md."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def block() -> str:
    """Return the table for one card and three precisions, and what is said under it."""
    return _run("--gpu", "H100,4090", "--policy", "float32,tf32,bf16", "--batch", "16")


def world_block() -> str:
    """Return the extrapolation to several cards."""
    shown = _run("--gpu", "H100,4090", "--policy", "bf16", "--world", "8", "--strategy", "ddp")
    lines = shown.splitlines()
    first = next(index for index, line in enumerate(lines) if "8 cards" in line)
    last = next(index for index, line in enumerate(lines[first:], first) if "of the GPU's time" in line)
    return "\n".join(lines[first:last])


@cache
def _run(*options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mezzotint", "plan", "--no-report", *options, "plan_programs/gpt2.py"],
        cwd=ROOT / "benchmarks",
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return "\n".join(f"    {line}".rstrip() for line in done.stdout.strip("\n").splitlines())


def cost_block() -> str:
    """Return what planning itself costs, from the newest record."""
    path = max((ROOT / "benchmarks" / "records").glob("plan_cost-*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    small, *_, large = record["results"]
    return (
        f"Two recorded steps and their plan take {small['seconds']:.1f} s for GPT-2 124M, and {large['seconds']:.1f} s and "
        f"{large['resident_MiB']:.0f} MiB for a Llama of\n8B parameters with activation checkpointing, imports not counted "
        f"(torch {record['torch']}, two cores;\n`{path.relative_to(ROOT)}`). No memory is taken for weights or activations."
    )
