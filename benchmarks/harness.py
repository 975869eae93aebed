"""What every benchmark shares: interleaved rounds in one process, medians with their spread, dated records.

Ratios are taken round by round, between samples that lie next to each other in time, so that a machine whose speed
drifts does not move them. The spread is half the interquartile range.
"""

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Samples of one contestant in seconds, and their ratios to the first contestant of the same rounds."""

    name: str
    median_seconds: float
    spread_seconds: float
    ratio: float
    ratio_spread: float
    extra_seconds: float
    num_samples: int


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Run all contestants in turn, `rounds` times, and compare each with the first.

    Every other round runs in reverse order, so that no contestant always follows the same neighbour.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in range(warmup):
        for name in order:
            contestants[name]()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for name in order if index % 2 == 0 else reversed(order):
                start = clock()
                contestants[name]()
                samples[name].append(clock() - start)
    finally:
        gc.enable()
    base = samples[order[0]]
    return [_timing(name, samples[name], base) for name in order]


def _timing(name: str, ours: Sequence[float], base: Sequence[float]) -> Timing:
    ratios = [a / b for a, b in zip(ours, base, strict=True)]
    return Timing(
        name=name,
        median_seconds=statistics.median(ours),
        spread_seconds=half_iqr(ours),
        ratio=statistics.median(ratios),
        ratio_spread=half_iqr(ratios),
        extra_seconds=statistics.median(a - b for a, b in zip(ours, base, strict=True)),
        num_samples=len(ours),
    )


def half_iqr(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2


def machine() -> dict[str, Any]:
    """Return the facts that a figure depends on."""
    import torch

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "load_before": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--record", type=Path, help="folder to write a dated record into")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write_record(folder: Path, name: str, tables: Mapping[str, str], results: Any, facts: Mapping[str, Any]) -> Path:
    """Write NAME-DATE.md for people and the same as .json for programs; return the first."""
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    command = " ".join(["python", *sys.argv])
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"# {name}, {today}", "", f"`{command}`", ""]
    lines += [", ".join(f"{key} {value}" for key, value in facts.items() if value is not None), ""]
    for title, table in tables.items():
        lines += [f"## {title}", "", table]
    path = folder / f"{name}-{today}.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    body = {"name": name, "date": today, "command": command, "machine": dict(facts), "results": results}
    path.with_suffix(".json").write_text(json.dumps(body, indent=2, default=_plain) + "\n", encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    return asdict(value) if hasattr(value, "__dataclass_fields__") else str(value)
