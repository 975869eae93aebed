"""docs/claims.md, and the recorded figures that the command quotes (src/mezzotint/claims/recorded.json).

The figures are distilled from the dated records in `benchmarks/records` and from the published measurements in
`benchmarks/data/gpu_measurements.csv`; claims and verdicts are the package's own (`mezzotint.claims`). A record whose
figures give another verdict than the one that is published stops the page from being made.
"""

import csv
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from mezzotint.claims.catalog import CLAIMS
from mezzotint.claims.claim import Claim, Family, Outcome
from mezzotint.claims.evaluate import outcome_of
from mezzotint.claims.loss_scaling import weights_after_updates
from mezzotint.claims.quality import proof_figures
from mezzotint.claims.recorded import read_records
from mezzotint.claims.speed import published_peaks
from mezzotint.parity.result import Proof

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
PUBLISHED = ROOT / "benchmarks" / "data" / "gpu_measurements.csv"
RECORDED = ROOT / "src" / "mezzotint" / "claims" / "recorded.json"
STOCK = "bfloat16, torch's kernels"
VERSIONED = ("torch", "ml_dtypes", "torchao", "qtorch", "gfloat", "pychop", "unit-scaling")
INTRODUCTION = """\
# Claims

What is said about mixed precision and its number formats, tested. `mezzotint claims` prints this list, `mezzotint
claims WORD --run` measures on your machine what can be measured there. Exact claims and those about torch are tried
anew whenever this page is made (`python scripts/generate_docs.py`) or the command runs; figures of speed, memory and
quality are those of the dated records in `benchmarks/records`. Nothing here was measured by us on a GPU: CUDA's rules
are asked of the installed torch on a simulated GPU, which needs none, and speeds and memory of GPUs are those that
others published (`benchmarks/data/gpu_measurements.csv`, with sources).
"""


def newest(pattern: str) -> tuple[Any, str]:
    """Return the newest record of a pattern and its path."""
    path = max(RECORDS.glob(pattern))
    return json.loads(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))


def entry(figures: dict[str, Any], source: str, path: str) -> dict[str, Any]:
    return {"figures": figures, "source": source, "path": path}


def recorded() -> str:
    """Return recorded.json."""
    found = {**_bench(), **_demo(), **_faults(), **_published(), **_computed(), **_proofs()}
    return json.dumps(dict(sorted(found.items())), indent=1) + "\n"


def _bench() -> dict[str, Any]:
    bench, path = newest("bench_cpu-*.json")
    avx2, _ = newest("cpu_lowprec_avx2-2*.json")
    demo, _ = _demo_costs()
    machine = f"{bench['name']}, torch {bench['facts']['torch']}"
    source = f"measured on {bench['facts']['date'][:10]}, {machine}"

    def ratios(label: str) -> list[float]:
        name, _, kernels = label.partition("/")
        return sorted(
            row["ratio_to_float32"]["median"]
            for case in bench["cases"]
            if case["op"].startswith("matmul")
            for row in case["measurements"]
            if row["format"] == name and row["kernels"] == (kernels or "torch")
        )

    step_avx2 = {row["name"]: row["ratio"] for timings in avx2["results"].values() for row in timings[::-1]}[STOCK]
    float16 = {"machine": machine, "torch": ratios("float16"), "mezzotint": ratios("float16/mezzotint")}
    return {
        "twice-as-fast": entry(
            {
                "machine": machine,
                "bfloat16": ratios("bfloat16"),
                "step": demo["step_time"],
                "step_avx2": step_avx2,
                "model": "a 3M-parameter model",
            },
            source,
            path,
        ),
        "cpus-have-no-bfloat16": entry(
            {"machine": machine, "bfloat16": ratios("bfloat16"), "step_avx2": step_avx2}, source, path
        ),
        "float16-on-cpus": entry(float16, source, path),
        "float16-everywhere": entry(float16, source, path),
        "float8-is-faster": entry(
            {"machine": machine, "float8_e4m3fn": ratios("float8_e4m3fn"), "float8": _peaks()}, source, path
        ),
    }


def _peaks() -> dict[str, float]:
    return dict(published_peaks()["float8"])


def _demo_costs() -> tuple[dict[str, float], tuple[Proof, str]]:
    """Return the ratios of the recorded demo, bf16-mixed to float32, by name; the proof, and where it is."""
    record, path = newest("demo.json")
    proof = Proof.from_json(record)
    return {cost.name: cost.ratio.mean for cost in proof.results[0].costs}, (proof, path)


def _demo() -> dict[str, Any]:
    costs, (proof, path) = _demo_costs()
    waits = {
        arm.name: sum(run.memory_bytes["activations"] + run.memory_bytes["cast_cache"] for run in runs)
        for arm in proof.experiment.arms
        if (runs := [run for run in proof.runs if run.arm == arm.name])
    }
    plain, mixed = waits.values()
    figures = {
        "activations": mixed / plain,
        "peak": costs["peak_memory"],
        "state": costs["state_per_parameter"],
        "model": "a 3M-parameter model",
    }
    machine = f"{proof.machine['processor']}, torch {proof.machine['torch']}"
    return {"half-the-memory": entry(figures, f"measured on {proof.date}, {machine}", path)}


def _faults() -> dict[str, Any]:
    record, path = newest("peer_faults-*.json")
    fault = next(row for row in record["results"] if row["library"] == "torch.compile")
    figures = {
        "compiled": float(fault["theirs"]),
        "eager": float(fault["right"]),
        "version": record["machine"]["torch"],
    }
    return {"compiled-cast": entry(figures, f"measured on {record['date']}, torch {record['machine']['torch']}", path)}


def _published() -> dict[str, Any]:
    """Pairs of published rows that differ in the precision alone."""
    groups: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    rows = list(csv.DictReader(PUBLISHED.open(encoding="utf-8")))
    alike = [key for key in rows[0] if key not in ("id", "dtype_mode", "value", "notes")]
    metrics = ("step_ms", "samples_per_s", "tokens_per_s_per_gpu", "peak_memory_GiB")
    for row in rows:
        if row["value"] and row["metric"] in metrics and "profiler attached" not in row["notes"]:
            scope = re.search(r"scope=(\w+)", row["notes"])
            key = (*(row[name] for name in alike), scope[1] if scope else "")
            groups[key][row["dtype_mode"]].append(float(row["value"]))
    speed: dict[str, list[float]] = {"fp32": [], "tf32": []}
    memory: dict[str, list[float]] = {"train_step": [], "fwd_bwd": [], "fwd": []}
    cards: dict[str, Counter[str]] = {"fp32": Counter(), "tf32": Counter()}
    slower, num_timed, largest = [], 0, {"mixed": 0.0}
    for key, modes in groups.items():
        facts = dict(zip((*alike, "scope"), key, strict=True))
        scope, is_memory = facts["scope"], facts["metric"] == "peak_memory_GiB"
        for base, mode in ((base, mode) for base in ("fp32", "tf32") for mode in ("amp-fp16", "amp-bf16")):
            if not len(modes[base]) == len(modes[mode]) == 1 or scope not in ("train_step", "fwd", "fwd_bwd"):
                continue
            plain, mixed = modes[base][0], modes[mode][0]
            if is_memory:
                if scope in memory:
                    memory[scope].append(round(mixed / plain, 3))
                if scope == "fwd" and mixed > max(plain, largest["mixed"]):
                    largest = {"mixed": mixed, "plain": plain, "model": facts["model"], "gpu": facts["gpu"]}
                continue
            speedup = round(plain / mixed if facts["metric"] == "step_ms" else mixed / plain, 3)
            num_timed += 1
            if scope == "train_step":
                speed[base].append(speedup)
                cards[base][facts["gpu"].partition("-")[0]] += 1
            if speedup < 1:
                slower.append({"model": facts["model"], "gpu": facts["gpu"], "speedup": speedup})
    path = str(PUBLISHED.relative_to(ROOT))
    source = "measured by others, as published"
    return {
        "twice-as-fast-on-gpus": entry(
            {
                "over_float32": sorted(speed["fp32"]),
                "over_tf32": sorted(speed["tf32"]),
                "float32_cards": dict(cards["fp32"].most_common()),
                "tf32_cards": dict(cards["tf32"].most_common()),
            },
            source,
            path,
        ),
        "always-faster": entry({"slower": slower, "num_pairs": num_timed}, source, path),
        "half-the-memory-on-gpus": entry(
            {"train_steps": sorted(memory["train_step"]), "without_update": sorted(memory["fwd_bwd"])}, source, path
        ),
        "never-more-memory": entry({"forward_only": sorted(memory["fwd"]), "largest": largest}, source, path),
    }


def _computed() -> dict[str, Any]:
    """What is exact, but takes too long to be computed at every call of the command."""
    import torch

    return {
        "master-weights": entry(
            dict(weights_after_updates()),
            f"computed with torch {torch.__version__.partition('+')[0]}",
            "scripts/claims_page.py",
        )
    }


def _proofs() -> dict[str, Any]:
    record, path = newest("prove_claims-*.json")
    source = f"measured on {record['date']}, {record['machine']['cpu']}, torch {record['machine']['torch']}"
    figures = dict(proof_figures(record["results"]))
    return {name: entry(figures, source, path) for name in ("no-quality-loss", "bfloat16-trains-worse")}


def page(text: str) -> str:
    """Return docs/claims.md, with the recorded figures of `text`."""
    records = read_records(text)
    outcomes = [checked(outcome_of(claim, recorded=records)) for claim in CLAIMS]
    lines = [INTRODUCTION]
    for family in Family:
        lines += [
            f"## {family}",
            "",
            "| claim | verdict | figure | how it is known | test it |",
            "|---|---|---|---|---|",
        ]
        lines += [_row(one) for one in outcomes if one.claim.family is family]
        lines.append("")
    lines += ["## Who says it", "", *(f"- {claim.text}: {claim.where}" for claim in CLAIMS), ""]
    return "\n".join([*lines, *rounding_faults(), ""])


def checked(outcome: Outcome) -> Outcome:
    """Return the outcome; refuse to print a verdict that its figures do not give."""
    claim = outcome.claim
    if not outcome.is_as_published:
        raise SystemExit(f"{claim.name}: the figures say {outcome.answer.words}, the claim says {claim.verdict}")
    return outcome


def _row(outcome: Outcome) -> str:
    claim: Claim = outcome.claim
    cells = (claim.text, outcome.answer.words, outcome.answer.figure, outcome.source, f"`{claim.command}`")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def rounding_faults() -> list[str]:
    """Return the record of other libraries' rounding, as a table."""
    found, _ = newest("peer_faults-*.json")
    facts = ", ".join(f"{name} {found['machine'][name]}" for name in found["machine"] if name in VERSIONED)
    lines = [
        "## How libraries round",
        "",
        f"Suspected faults, each tried on {found['date']} by `python benchmarks/peer_faults.py` ({facts}).",
        "",
        "| library | suspected | input | right | theirs | mezzotint | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = ("library", "what", "source", "right", "theirs", "ours", "verdict")
    return [*lines, *("| " + " | ".join(row[key] for key in keys) + " |" for row in found["results"])]
