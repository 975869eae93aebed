"""How far plans are from published measurements of training steps on one GPU.

Rows of `benchmarks/data/gpu_measurements.csv` that state their configuration are run on a ghost of the card that they
were measured on: the language models of CS336 with the course's own code, other models with Hugging Face's of the same
shapes. Nothing is fitted on these rows. Rows without a program here are counted.
Writes `benchmarks/records/plan_accuracy-DATE.json`.

    python benchmarks/plan_accuracy.py
"""

import csv
import json
import re
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch

from mezzotint.errors import PlanError
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.memory import plan_memory
from mezzotint.plan.recording import Recording
from mezzotint.plan.roofline import plan_time
from mezzotint.trace.recorder import Recorder
from plan_programs import cs336, families

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


def predict(card: str, mode: str, make: Callable[[], Callable[[], None]]) -> dict[str, object]:
    """Run two steps on the ghost and plan the second."""
    recording, recorder = Recording(card), Recorder(has_ranges=False)
    marks = []
    with recording.within(recorder), recorder:
        # torch's defaults but for what a row says: convolutions may use TF32 unless it says float32
        torch.backends.cuda.matmul.allow_tf32 = mode != "fp32"
        torch.backends.cudnn.allow_tf32 = mode != "fp32"
        step = make()
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


def step_ms(row: dict[str, str], samples: int, tokens: int) -> float | None:
    """Return a row's time of a step in ms, whatever rate it states; None for another metric."""
    value = float(row["value"])
    return {
        "step_ms": value, "samples_per_s": samples / value * 1e3, "tokens_per_s_per_gpu": tokens / value * 1e3,
    }.get(row["metric"])  # fmt: skip


def main() -> int:
    """Predict, compare, record."""
    known: dict[object, dict[str, object]] = {}
    results, left = [], 0
    with ROWS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["gpus"] == "1" and note_of(row, "scope") != "op"]
    for row in rows:
        key: object = configuration(row)
        program = families.program_of(row, note_of(row, "scope")) if key is None else None
        if key is not None:
            card, config, batch, mode, scope, group = key
            length, make = config[5], partial(cs336.make_step, config, batch, mode, scope, group)
            samples, is_compiled = batch, False
        elif program is not None:
            key, card, mode, scope, length = program, program.card, program.mode, program.scope, program.length
            samples, is_compiled, make = program.samples, program.is_compiled, partial(families.make_step, program)
        measured = None if key is None else step_ms(row, samples, samples * length)
        if key is None or (measured is None and row["metric"] != "peak_memory_GiB"):
            left += 1
            continue
        if key not in known:
            try:
                known[key] = predict(card, mode, make)
            except PlanError as error:
                print(row["id"], error, file=sys.stderr)
                left += 1
                continue
        results.append(
            {
                "id": row["id"], "source": row["source"].split(";")[0], "model": row["model"], "gpu": row["gpu"],
                "batch": row["batch_per_gpu"], "length": length, "mode": row["dtype_mode"], "scope": scope,
                "checkpointing": row["activation_checkpointing"], "is_compiled": is_compiled,
                "is_exact_program": program is None,
                "metric": "peak_memory_GiB" if measured is None else "step_ms", "quality": note_of(row, "q"),
                "is_reserved": "RESERVED" in row["notes"],
                "measured": float(row["value"]) if measured is None else measured, **known[key],
            }
        )  # fmt: skip
        print(len(results), row["id"], row["metric"], file=sys.stderr)
    record = {
        "date": date.today().isoformat(), "torch": torch.__version__, "command": "python benchmarks/plan_accuracy.py",
        "rows_without_a_program": left, "results": results,
    }  # fmt: skip
    path = ROOT / "benchmarks" / "records" / f"plan_accuracy-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
