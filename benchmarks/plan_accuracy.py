"""How far plans are from published measurements of training steps on one GPU.

Rows of `benchmarks/data/gpu_measurements.csv` that state their configuration are run on a ghost of the card that they
were measured on: the language models of CS336 with the course's own code, other models with Hugging Face's of the same
shapes. No constant is fitted to these rows. Rows without a program here are counted.
Writes `benchmarks/records/plan_accuracy-DATE.json`.

    python benchmarks/plan_accuracy.py
"""

import argparse
import csv
import hashlib
import json
import pickle
import re
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import PlanError
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.memory import plan_memory
from mezzotint.plan.recording import GhostRun, Recording
from mezzotint.plan.roofline import plan_time
from mezzotint.trace.recorder import Recorder
from plan_programs import cs336, cs336_onehot, families

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "data" / "gpu_measurements.csv"
CARDS = {"RTX4090-48GB(modified)": "RTX4090"}
GROUPS = {"no": 0, "every block": 1, "every 4 blocks": 4}
# how a source's program differs: another model, or a wait for the GPU after each phase instead of each step
STYLES = {"GAOYUEtianc": "onehot", "A2-P submission 16": "phase"}
FAMILIES = {
    "llama": "Llama", "qwen3": "Qwen3", "gpt2": "GPT-2", "gpt2-by-hand": "GPT-2", "bert-mlm": "BERT",
    "bert-squad": "BERT", "resnet": "ResNet", "torchtitan-llama": "Llama", "torchtitan-qwen3": "Qwen3",
}  # fmt: skip
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
    style = next((style for source, style in STYLES.items() if source in row["source"]), "step")
    return card.name, config, int(row["batch_per_gpu"]), row["dtype_mode"], scope, group, style


def make_cs336(
    _card: str, config: tuple[int, ...], batch: int, mode: str, scope: str, group: int, style: str
) -> Callable[[], None]:
    """Return the step of a configuration."""
    if style == "onehot":
        return cs336_onehot.make_step(config, batch, mode, scope)
    return cs336.make_step(config, batch, mode, scope, group, waits=style)


def recorded(card: str, mode: str, make: Callable[[], Callable[[], None]]) -> tuple[GhostRun, list[int]]:
    """Run two steps on the ghost; return what they did and where each begins and ends."""
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
    return recording.run(recorder.trace()), marks


def kept(key: object, folder: Path | None, card: str, mode: str, make: Callable[[], Callable[[], None]]) -> Any:
    """Return what was recorded, from a folder of earlier runs if it is there."""
    if folder is None:
        return recorded(card, mode, make)
    path = folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.pkl"
    if not path.exists():
        path.write_bytes(pickle.dumps(recorded(card, mode, make)))
    return pickle.loads(path.read_bytes())


def predict(run: GhostRun, marks: list[int]) -> dict[str, object]:
    """Plan the second step."""
    memory = plan_memory(run, first=marks[1], end=marks[2])
    time = plan_time(run, first=marks[1], end=marks[2])
    limit = "gpu" if time.is_gpu_bound else "host" if time.is_host_bound else "either"
    return {
        "peak_GiB": memory.peak_allocated / 2**30,
        "reserved_GiB": memory.peak_reserved / 2**30,
        "ms": time.seconds * 1e3,
        "low_ms": time.low * 1e3,
        "high_ms": time.high * 1e3,
        "limit": limit,
        "teraflops": time.flops / 1e12,
    }


def step_ms(row: dict[str, str], samples: int, tokens: int) -> float | None:
    """Return a row's time of a step in ms, whatever rate it states; None for another metric."""
    value = float(row["value"])
    return {
        "step_ms": value, "samples_per_s": samples / value * 1e3, "tokens_per_s_per_gpu": tokens / value * 1e3,
    }.get(row["metric"])  # fmt: skip


def main() -> int:
    """Predict, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="keep what programs did here, and plan what is here again")
    folder = parser.parse_args().runs
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    known: dict[object, dict[str, object]] = {}
    results, left = [], 0
    with ROWS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["gpus"] == "1" and note_of(row, "scope") != "op"]
    for row in rows:
        key: object = configuration(row)
        program = families.program_of(row, note_of(row, "scope")) if key is None else None
        if key is not None:
            card, config, batch, mode, scope = key[:5]
            length, make = config[5], partial(make_cs336, *key)
            samples, is_compiled, family = batch, False, "CS336"
        elif program is not None:
            key, card, mode, scope, length = program, program.card, program.mode, program.scope, program.length
            samples, is_compiled, make = program.samples, program.is_compiled, partial(families.make_step, program)
            family = FAMILIES[program.kind]
        measured = None if key is None else step_ms(row, samples, samples * length)
        if key is None or (measured is None and row["metric"] != "peak_memory_GiB"):
            left += 1
            continue
        if key not in known:
            try:
                known[key] = predict(*kept(key, folder, card, mode, make))
            except PlanError as error:
                print(row["id"], error, file=sys.stderr)
                left += 1
                continue
        results.append(
            {
                "id": row["id"], "source": row["source"].split(";")[0], "model": row["model"], "gpu": row["gpu"],
                "card": card,
                "batch": row["batch_per_gpu"], "length": length, "mode": row["dtype_mode"], "scope": scope,
                "checkpointing": row["activation_checkpointing"], "is_compiled": is_compiled, "family": family,
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
