"""How far plans are from published measurements: the language models of CS336, as 21 groups of students measured them.

Every eager row of one GPU in `benchmarks/data/gpu_measurements.csv` that states its configuration is run on a ghost of
the card it was measured on. Nothing is fitted on these rows. Rows of other families have no program here yet and are
counted. Writes `benchmarks/records/plan_accuracy-DATE.json`.

    python benchmarks/plan_accuracy.py
"""

import csv
import json
import re
import sys
from datetime import date
from pathlib import Path

import torch

from mezzotint.errors import PlanError
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.memory import plan_memory
from mezzotint.plan.recording import Recording
from mezzotint.plan.roofline import plan_time
from mezzotint.trace.recorder import Recorder
from plan_programs import cs336

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "data" / "gpu_measurements.csv"
CARDS = {"RTX4090-48GB(modified)": "RTX4090"}
GROUPS = {"no": 0, "every block": 1, "every 4 blocks": 4}
SHAPE = re.compile(r"L(\d+) d(\d+) h(\d+) ffn(\d+) .*vocab(\d+) seq(\d+)")


def note_of(row: dict[str, str], key: str) -> str:
    """Return a `key=value` of a row's notes."""
    found = re.search(rf"(?:^|; ){key}=([^;]+)", row["notes"])
    return found[1].strip() if found else ""


def configuration(row: dict[str, str]) -> tuple[object, ...] | None:
    """Return what determines the program of a row; None where it has none here."""
    shape = SHAPE.match(row["architecture_details"])
    group = GROUPS.get(row["activation_checkpointing"])
    is_ours = row["model"].startswith("CS336") and row["torch_compile"] == "no" and row["gpus"] == "1"
    scope = note_of(row, "scope")
    if shape is None or group is None or not is_ours or scope not in ("fwd", "fwd_bwd", "train_step"):
        return None
    if row["dtype_mode"] not in ("fp32", "tf32", "amp-bf16"):
        return None
    try:
        card = find_gpu(CARDS.get(row["gpu"], row["gpu"]))
    except PlanError:
        return None
    config = tuple(int(size) for size in shape.groups())
    return card.name, config, int(row["batch_per_gpu"]), row["dtype_mode"], scope, group


def predict(card: str, config: tuple[int, ...], batch: int, mode: str, scope: str, group: int) -> dict[str, object]:
    """Run two steps on the ghost and plan the second."""
    recording, recorder = Recording(card), Recorder(has_ranges=False)
    marks = []
    with recording.within(recorder), recorder:
        torch.backends.cuda.matmul.allow_tf32 = mode != "fp32"
        step = cs336.make_step(config, batch, mode, scope, group)
        for _ in range(2):
            marks.append(recorder.num_operations)
            step()
        marks.append(recorder.num_operations)
        del step
    run = recording.run(recorder.trace())
    memory = plan_memory(run, first=marks[1], end=marks[2])
    time = plan_time(run, first=marks[1], end=marks[2])
    return {
        "peak_GiB": memory.peak_allocated / 2**30,
        "reserved_GiB": memory.peak_reserved / 2**30,
        "ms": time.seconds * 1e3,
        "low_ms": time.low * 1e3,
        "high_ms": time.high * 1e3,
        "is_host_bound": time.is_host_bound,
    }


def main() -> int:
    """Predict, compare, record."""
    known: dict[tuple[object, ...], dict[str, object]] = {}
    results, left = [], 0
    with ROWS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] in ("peak_memory_GiB", "step_ms")]
    for row in rows:
        key = configuration(row)
        if key is None:
            left += row["gpus"] == "1" and row["torch_compile"] == "no"
            continue
        if key not in known:
            known[key] = predict(*key)
        results.append(
            {
                "id": row["id"], "source": row["source"].split(";")[0], "model": row["model"], "gpu": row["gpu"],
                "batch": row["batch_per_gpu"], "length": key[1][5], "mode": row["dtype_mode"], "scope": key[4],
                "checkpointing": row["activation_checkpointing"], "metric": row["metric"],
                "quality": note_of(row, "q"), "is_reserved": "RESERVED" in row["notes"],
                "measured": float(row["value"]), **known[key],
            }
        )  # fmt: skip
        print(len(results), row["id"], row["metric"], file=sys.stderr)
    record = {
        "date": date.today().isoformat(), "torch": torch.__version__, "command": "python benchmarks/plan_accuracy.py",
        "eager_rows_without_a_program": left, "results": results,
    }  # fmt: skip
    path = ROOT / "benchmarks" / "records" / f"plan_accuracy-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
