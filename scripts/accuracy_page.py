"""docs/accuracy.md: every published row that plans were compared with, and the errors, misses included."""

import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def page() -> str:
    """Return the page, from the newest record."""
    path = max((ROOT / "benchmarks" / "records").glob("plan_accuracy-*.json"))
    record = json.loads(path.read_text(encoding="utf-8"))
    memory = [one for one in record["results"] if one["metric"] == "peak_memory_GiB" and not one["is_reserved"]]
    time = [one for one in record["results"] if one["metric"] == "step_ms"]
    bound = [one for one in time if not one["is_host_bound"]]
    host = [one for one in time if one["is_host_bound"]]
    lines = [
        "# How accurate plans are",
        "",
        f"Made from `{path.relative_to(ROOT)}` by `python scripts/generate_docs.py` (torch {record['torch']}, "
        f"`{record['command']}`).",
        "Every row is a measurement that somebody published; nothing was fitted on any of them. One family of programs",
        "is compared so far, the language models of CS336, in forward, forward and backward, and whole steps;",
        f"{record['eager_rows_without_a_program']} other eager rows of one GPU, and all that count samples or tokens a "
        "second, have no program here yet.",
        "",
        f"- **Peak memory** ({len(memory)} rows): {_spread([_error(one, 'peak_GiB') for one in memory])}.",
        f"- **Time where the GPU is the limit** ({len(bound)} rows): {_spread([_error(one, 'ms') for one in bound])}; "
        f"{_inside(bound)} within the interval.",
        f"- **Time where the GPU waits for the host** ({len(host)} rows): {_inside(host)} within the interval; the usual "
        f"machine's figure has a {_spread([_error(one, 'ms') for one in host])}.",
        f"- **Ratio of mixed precision to float32 or TF32** ({_ratio_text(time)}.",
        "",
        "Memory is good to use. Time is not yet: the interval is honest for small models, and too narrow where the GPU is",
        "the limit.",
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
        "| row | model | card | batch x length | precision | scope | measured | planned | interval | error |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {_cells(one)} | {one['measured']:.1f} | {one['ms']:.1f}{' (host)' if one['is_host_bound'] else ''} | "
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
        low = modes.get("amp-bf16")
        if base is not None and low is not None:
            errors.append((low["ms"] / base["ms"]) / (low["measured"] / base["measured"]) - 1)
    return f"{len(errors)} pairs): {_spread(errors)}" if errors else "no pairs"
