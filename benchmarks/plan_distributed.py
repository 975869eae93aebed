"""How far extrapolations to several cards are from published runs: eager FSDP2 on Llama models.

The published runs are torchtitan's; planned are Hugging Face's models of the same shapes, so differences between the
two programs count as errors too. Writes `benchmarks/records/plan_distributed-DATE.json`.

    python benchmarks/plan_distributed.py
"""

import csv
import json
import re
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from mezzotint.auditing.planning import config_target, plan_target
from mezzotint.errors import PlanError
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.distributed import distribute
from mezzotint.plan.precision import find_precision

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "benchmarks" / "data" / "gpu_measurements.csv"
SHAPE = re.compile(r"L(\d+) d(\d+) h(\d+)(?: kv(\d+))? ffn(\d+) vocab(\d+) seq(\d+)")
CHECKPOINTING = {"no": False, "full": True}


def rows() -> list[dict[str, str]]:
    """Return the eager bfloat16 FSDP2 rows of Llama models that state their shapes."""
    with ROWS.open(encoding="utf-8") as file:
        return [
            row
            for row in csv.DictReader(file)
            if row["parallelism"] == "FSDP2"
            and row["torch_compile"] == "no"
            and row["dtype_mode"] == "amp-bf16"
            and row["activation_checkpointing"] in CHECKPOINTING
            and row["metric"] in ("tokens_per_s_per_gpu", "peak_memory_GiB")
            and SHAPE.match(row["architecture_details"])
        ]


def main() -> int:
    """Plan each configuration once, compare, record."""
    plans = {}
    results = []
    for row in rows():
        shape = SHAPE.match(row["architecture_details"])
        assert shape is not None
        try:
            card = find_gpu(row["gpu"])
        except PlanError:
            continue
        key = shape.groups(), card.name, row["batch_per_gpu"], row["gpus"], row["activation_checkpointing"]
        if key not in plans:
            layers, d, heads, kv, ffn, vocab, length = (int(one or 0) for one in shape.groups())
            with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
                json.dump(
                    {
                        "model_type": "llama", "num_hidden_layers": layers, "hidden_size": d,
                        "num_attention_heads": heads, "num_key_value_heads": kv or heads, "intermediate_size": ffn,
                        "vocab_size": vocab, "max_position_embeddings": length,
                    },
                    file,
                )  # fmt: skip
            target = config_target(
                Path(file.name), batch=int(row["batch_per_gpu"]), length=length,
                is_checkpointed=CHECKPOINTING[row["activation_checkpointing"]],
            )  # fmt: skip
            (plan,) = plan_target(target, [card], lambda _card: [find_precision("bf16")])
            plans[key] = distribute(plan, int(row["gpus"]), "fsdp")
        found = plans[key]
        is_rate = row["metric"] == "tokens_per_s_per_gpu"
        items = found.plan.items or 0
        results.append(
            {
                "id": row["id"], "source": row["source"], "model": row["model"], "gpu": card.name,
                "world": found.world, "batch": row["batch_per_gpu"], "length": shape[7],
                "checkpointing": row["activation_checkpointing"], "metric": row["metric"],
                "measured": float(row["value"]),
                "planned": items / found.seconds if is_rate else found.peak_reserved / 2**30,
                "low": items / found.high if is_rate else found.peak_allocated / 2**30,
                "high": items / found.low if is_rate else found.peak_reserved / 2**30,
            }
        )  # fmt: skip
        print(results[-1], file=sys.stderr)
    record = {
        "date": date.today().isoformat(), "torch": torch.__version__,
        "command": "python benchmarks/plan_distributed.py", "results": results,
    }  # fmt: skip
    path = ROOT / "benchmarks" / "records" / f"plan_distributed-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
