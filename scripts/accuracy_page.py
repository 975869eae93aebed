"""docs/accuracy.md: every published row that plans were compared with, and the errors, misses included."""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


CONTRADICTED = {
    "sq-222": "386.6 ms on an H100, and 382.6 ms for the same step on an RTX 4090 (sq-232) with 0.3 of its bandwidth; so "
    "are 493.9 and 486.6 ms with checkpoints (sq-224, sq-234): that H100 was slowed down, or was none",
}
"""Rows that other rows contradict, and how."""


def page() -> str:
    """Return the page, from the newest record."""
    path = max((ROOT / "benchmarks" / "records").glob("plan_accuracy-*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    memory = [one for one in record["results"] if one["metric"] == "peak_memory_GiB" and not one["is_reserved"]]
    time = [one for one in record["results"] if one["metric"] == "step_ms"]
    eager = [one for one in time if not one["is_compiled"] and one["quality"] != "C"]
    vague = [one for one in time if not one["is_compiled"] and one["quality"] == "C"]
    families = sorted({one["family"] for one in record["results"]})
    bound = [one for one in eager if one["limit"] == "gpu"]
    either = [one for one in eager if one["limit"] == "either"]
    host = [one for one in eager if one["limit"] == "host"]
    lines = [
        "# How accurate plans are",
        "",
        f"Made from `{path.relative_to(ROOT)}` by `python scripts/generate_docs.py` (torch {record['torch']}, "
        f"`{record['command']}`).",
        "Every row is a measurement that somebody published. Constants of kernels come from microbenchmarks, none was fitted",
        "to these rows; but they had been seen when mechanisms were added and when the microseconds that a host needs for an",
        "operation were chosen, so only rows that nobody here has seen are a fair test. Rows of torchtitan, litgpt and nanoGPT",
        "were corrected where their sources say otherwise (units, batch, what is compiled), each with the reason in its notes.",
        "Recordings were kept between runs of the script (`--runs`), those of CS336 from a commit shortly before. The programs of CS336 are",
        "the course's own code, and another solution's where that was measured, those of torchtitan are written after its",
        "code; the rest are Hugging Face's models of the same shapes, so differences between programs count as errors too. "
        f"{record['rows_without_a_program']} other rows of one GPU have no program here.",
        "",
        "Eager programs:",
        "",
        *_lines("Peak memory", [one for one in memory if not one["is_compiled"]], "peak_GiB", families),
        *_lines("Time where the GPU is the limit even with a slow host", bound, "ms", families),
        *_lines("Time where the host may be the limit, or the GPU", either, "ms", families),
        *_lines("Time where the GPU waits for a usual host", host, "ms", families),
        *_lines("All of these where the GPU needs longer than a usual host", [*bound, *either], "ms", families),
        f"- **Ratio of mixed precision to float32 or TF32** ({_ratio_text(eager)}.",
        *_lines("Time of rows whose configuration is not told in full", vague, "ms", families),
        "",
        "Programs under `torch.compile`:",
        "",
        *_lines("Peak memory", [one for one in memory if one["is_compiled"]], "peak_GiB", families),
        *_lines("Time", [one for one in time if one["is_compiled"]], "ms", families),
        "",
        "Hosts are three times apart, so only the interval counts where the host is the limit. Memory is good to use where",
        "the program is the one that was measured; a trainer and another library's Llama took 15 to 48 % more than the model",
        "itself. Time of eager programs is good to use where the GPU is the limit, less so for BERT and ResNet. Compiled",
        "programs are planned as if all was fused that can be, so the interval counts: it ends where nothing is. torchtitan's",
        "graph trainer compiles FlexAttention alone; the kind of its H100, with 95 GiB, is not told, and the usual one is",
        "taken (torchtitan's of 2024 had 2.4 TB/s and 500 W). Not told in full are lengths that vary within a batch",
        "(BERT's pretraining), batches that were a script's default, and the implementation of attention; the collector of",
        "the rows marked them so.",
        *_impossible(time),
        "",
        "## Peak memory, GiB",
        "",
        "| row | model | card | batch x length | precision | scope | measured | planned | error |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {_cells(one)} | {one['measured']:.2f} | {one['peak_GiB']:.2f} | {_error(one, 'peak_GiB'):+.1%} |"
            for one in memory
        ),
        "",
        "## Time, ms",
        "",
        "| row | model | card | batch x length | precision | scope | limit | measured | planned | interval | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {_cells(one)} | {one['limit']} | {one['measured']:.1f} | {one['ms']:.1f} | "
            f"{one['low_ms']:.1f} to {one['high_ms']:.1f} | {_error(one, 'ms'):+.1%} |"
            for one in time
        ),
        "",
        *_several(),
        "## Sources",
        "",
        *(f"- {source}" for source in sorted({one["source"] for one in record["results"]})),
        "",
    ]
    return "\n".join(lines)


def _lines(name: str, rows: list[dict[str, Any]], key: str, families: list[str]) -> list[str]:
    """Return a line about rows and, where there are several, one for each family of models."""
    if not rows:
        return []
    found = [f"- **{name}** ({_count(rows)}): {_summary(rows, key)}."]
    parts = [(one, [row for row in rows if row["family"] == one]) for one in families]
    parts = [(one, part) for one, part in parts if part]
    if len(parts) > 1:
        found += [f"  - {one}, {_count(part)}: {_summary(part, key)}." for one, part in parts]
    return found


def _count(rows: list[dict[str, Any]]) -> str:
    return "1 row" if len(rows) == 1 else f"{len(rows)} rows"


def _summary(rows: list[dict[str, Any]], key: str) -> str:
    return _spread([_error(one, key) for one in rows]) + (
        f"; {_inside(rows)} within the interval" if key == "ms" else ""
    )


def _impossible(rows: list[dict[str, Any]]) -> list[str]:
    """Return what cannot be as published: rows above their card's peak, rows that others contradict."""
    from mezzotint.errors import PlanError
    from mezzotint.hardware.gpus import find_gpu

    found = []
    for one in rows:
        if one["id"] in CONTRADICTED:
            found.append(f"- {one['id']}: {CONTRADICTED[one['id']]}.")
        format_name = {"fp32": "float32", "tf32": "tfloat32"}.get(one["mode"], "float16")
        try:
            peak = find_gpu(one["card"]).peak_flops_per_second(format_name)
        except PlanError:
            continue
        speed = one["teraflops"] / one["measured"] * 1e15
        if peak and speed > peak:
            found.append(
                f"- {one['id']}: {speed / 1e12:.0f} TFLOP/s in {one['mode']}, where {one['card']} has {peak / 1e12:.1f} "
                "at most: more cards or a smaller batch than the row says."
            )
    if not found:
        return []
    return ["", "Rows that cannot be as published; they count above:", "", *found]


def _several() -> list[str]:
    """Return the section about several cards, from the newest record."""
    path = max((ROOT / "benchmarks" / "records").glob("plan_distributed-*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    unit = {"tokens_per_s_per_gpu": "tokens/s of a card", "peak_memory_GiB": "peak, GiB (allocated to reserved)"}
    return [
        "## Several cards",
        "",
        f"Extrapolated (`--world`), from `{path.relative_to(ROOT)}`: FSDP2 in torchtitan's eager runs against Hugging Face's",
        "models of the same shapes, all such rows. Three programs are no statistics.",
        "",
        "| row | model | cards | batch x length | checkpointing | what | measured | planned | interval |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {one['id']} | {one['model']} | {one['world']} x {one['gpu']} | {one['batch']} x {one['length']} | "
            f"{one['checkpointing']} | {unit[one['metric']]} | {one['measured']:,.4g} | {one['planned']:,.4g} | "
            f"{one['low']:,.4g} to {one['high']:,.4g} |"
            for one in record["results"]
        ),
        "",
    ]


def _cells(one: dict[str, Any]) -> str:
    scope = one["scope"] + (f", {one['checkpointing']} checkpointed" if one["checkpointing"] != "no" else "")
    scope += ", compiled" if one["is_compiled"] else ""
    return " | ".join((one["id"], one["model"], one["gpu"], f"{one['batch']} x {one['length']}", one["mode"], scope))


def _error(one: dict[str, Any], key: str) -> float:
    return float(one[key] / one["measured"] - 1)


def _spread(errors: list[float]) -> str:
    off = sorted(abs(error) for error in errors)
    return (
        f"median error {statistics.median(off):.1%}, 90th percentile {off[int(len(off) * 0.9)]:.1%}, bias "
        f"{statistics.median(errors):+.1%}"
    )


def _inside(rows: list[dict[str, Any]]) -> str:
    return f"{sum(one['low_ms'] <= one['measured'] <= one['high_ms'] for one in rows)} of {len(rows)}"


def _ratio_text(rows: list[dict[str, Any]]) -> str:
    """Compare ratios of the same program in two precisions on one card, by one source."""
    found = {}
    for one in rows:
        key = one["source"], one["model"], one["gpu"], one["batch"], one["length"], one["scope"], one["checkpointing"]
        found.setdefault(key, {})[one["mode"]] = one
    errors = []
    for modes in found.values():
        base = modes.get("fp32") or modes.get("tf32")
        low = modes.get("amp-bf16") or modes.get("amp-fp16")
        if base is not None and low is not None:
            errors.append((low["ms"] / base["ms"]) / (low["measured"] / base["measured"]) - 1)
    return f"{len(errors)} pairs): {_spread(errors)}" if errors else "no pairs"
