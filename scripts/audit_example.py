"""What `mezzotint audit` prints of a script with a fault, for the README, and what watching costs, for docs/audit.md."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """\
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler("cpu")

for step in range(1000):
    x, y = torch.randn(16, 32), torch.randint(0, 8, (16,))
    with torch.autocast("cpu", dtype=torch.float16):
        logits = model(x)
        loss = nn.functional.cross_entropy(logits, y)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
"""


def block() -> str:
    """Return verdict and findings of the script, as the terminal shows them."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text(SCRIPT, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "mezzotint", "audit", "--no-report", "train.py"],
            cwd=folder,
            env={**os.environ, "NO_COLOR": "1", "COLUMNS": "110", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1, done.stderr
    shown = done.stdout.split("\nphase ")[0]
    shown = re.sub(r"\n\n(?=\S+: MZ\d+ info)(?s:.*)", "", shown)
    return "\n".join(f"    {line}".rstrip() for line in shown.strip().splitlines())


def cost_block() -> str:
    """Return the newest record of what watching costs."""
    lines = ["In units of the same steps unwatched, everything that is installed and taken back included.", ""]
    for name in ("audit_overhead", "watch_overhead"):
        path = max((ROOT / "benchmarks" / "records").glob(f"{name}-*.json"))
        record = json.loads(path.read_text(encoding="utf-8"))
        for title, timings in record["results"].items():
            lines += [f"{title}:", "", "| | ratio |", "|---|---|"]
            lines += [f"| {one['name']} | {one['ratio']:.3f} ± {one['ratio_spread']:.3f} |" for one in timings]
            lines.append("")
        machine, place = record["machine"], path.relative_to(ROOT).with_suffix(".md")
        lines += [f"({machine['cpu']}, torch {machine['torch']}, {record['date']}; `{place}`)", ""]
    return "\n".join(lines).strip()
