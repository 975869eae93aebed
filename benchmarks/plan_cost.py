"""What planning costs: seconds and resident memory of one plan, each case in a process of its own.

GPT-2 124M from its script, and an 8B Llama with activation checkpointing from its Hugging Face config, at several
depths, so that growth with the number of operations shows. Seconds are those of two recorded steps and of the plan;
imports, of torch and transformers too, are not counted. Writes `benchmarks/records/plan_cost-DATE.json`.

    python benchmarks/plan_cost.py
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
CASES = {"GPT-2 124M, script": 0, **{f"Llama 8B shapes, {n} layers, checkpointed": n for n in (4, 8, 16, 32)}}


def measure(layers: int) -> dict[str, float]:
    """Plan once in this process."""
    from mezzotint.auditing.planning import config_target, plan_target
    from mezzotint.auditing.script import Target
    from mezzotint.hardware.gpus import find_gpu
    from mezzotint.plan.precision import find_precision

    if layers:
        import transformers.models.llama.modeling_llama  # noqa: F401  so that its import is not counted

        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump({**LLAMA, "num_hidden_layers": layers}, file)
        target = config_target(Path(file.name), batch=1, length=2048, is_checkpointed=True)
    else:
        target = Target(path=ROOT / "benchmarks" / "plan_programs" / "gpt2.py")
    begin = time.perf_counter()
    (plan,) = plan_target(target, [find_gpu("H100")], lambda _card: [find_precision("bf16")])
    return {
        "seconds": time.perf_counter() - begin,
        "resident_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "operations": len(plan.run.trace.operations),
    }


def main() -> int:
    """Run every case in processes of its own, and record."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return 0
    import torch

    results = []
    for name, layers in CASES.items():
        runs = [
            json.loads(
                subprocess.run(
                    [sys.executable, __file__, str(layers)], check=True, capture_output=True, text=True
                ).stdout.splitlines()[-1]
            )
            for _ in range(ROUNDS)
        ]
        seconds = sorted(one["seconds"] for one in runs)
        results.append(
            {
                "case": name, "seconds": statistics.median(seconds), "slowest": seconds[-1],
                "resident_MiB": max(one["resident_MiB"] for one in runs), "operations": runs[0]["operations"],
            }
        )  # fmt: skip
        print(results[-1], file=sys.stderr)
    record = {
        "date": date.today().isoformat(), "torch": torch.__version__, "command": "python benchmarks/plan_cost.py",
        "rounds": ROUNDS, "results": results,
    }  # fmt: skip
    path = ROOT / "benchmarks" / "records" / f"plan_cost-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
