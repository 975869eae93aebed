"""`make fuzz`: every fuzz target on new random examples, each for its share of the time, and what was found.

python tests/fuzz/campaign.py --minutes 60 [--target test_fuzz_engine] [--record FILE.json]

Prints for each target how many examples ran in how many seconds and how many failed, with the input that fails.
Exits with 1 where anything failed.
"""

import argparse
import functools
import importlib
import json
import os
import platform
import random
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ["MEZZOTINT_FUZZ"] = "1"  # before the targets are made

from hypothesis import seed

from mezzotint.version import package_version

MOST_FAILURES = 3  # of one target; more are likely the same


def targets(wanted: list[str]) -> dict[str, Callable[[], None]]:
    """Return the tests over drawn examples, by file and name."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_fuzz_*.py")):
        module = importlib.import_module(path.stem)
        for name, test in vars(module).items():
            label = f"{path.stem}::{name}"
            if hasattr(test, "hypothesis") and (not wanted or any(word in label for word in wanted)):
                found[label] = test
    return found


def counted(test: Any) -> tuple[Any, list[int]]:
    """Return the test with a counter of its examples."""
    count = [0]
    inner = test.hypothesis.inner_test

    @functools.wraps(inner)
    def counting(*args: Any, **kwargs: Any) -> None:
        count[0] += 1
        inner(*args, **kwargs)

    test.hypothesis.inner_test = counting
    return test, count


def fuzz(label: str, test: Any, seconds: float) -> dict[str, Any]:
    """Run a target for so many seconds; return what there is to say."""
    test, count = counted(test)
    start = time.monotonic()
    failures: list[str] = []
    while time.monotonic() - start < seconds and len(failures) < MOST_FAILURES:
        number = random.SystemRandom().randrange(1 << 32)
        try:
            seed(number)(test)()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"seed {number}\n{told(error)}")
            print(f"FAILED {label}, {failures[-1]}", flush=True)
    taken = time.monotonic() - start
    print(f"{count[0]:8} examples {taken:7.1f} s {len(failures):2} failures  {label}", flush=True)
    return {"target": label, "examples": count[0], "seconds": round(taken, 1), "failures": failures}


def told(error: BaseException) -> str:
    """Return where an error came from, what it says and the input that made it."""
    errors = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
    parts = []
    for one in errors:
        parts += traceback.format_tb(one.__traceback__)[-5:]
        parts += [
            f"{type(one).__name__}: {str(one)[:2000]}\n",
            *(note[:4000] for note in getattr(one, "__notes__", ())),
        ]
    return "".join(parts)


def facts() -> dict[str, Any]:
    """Return the versions and the machine that the examples ran on."""
    import hypothesis
    import numpy
    import torch

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "mezzotint": package_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "hypothesis": hypothesis.__version__,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--target", action="append", default=[], help="a word of a target's name; repeatable")
    parser.add_argument("--record", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    found = targets(options.target)
    start = time.monotonic()
    results = []
    for number, (label, test) in enumerate(found.items()):
        left = options.minutes * 60 - (time.monotonic() - start)
        results.append(fuzz(label, test, left / (len(found) - number)))
    num_failures = sum(len(one["failures"]) for one in results)
    total = {"examples": sum(one["examples"] for one in results), "seconds": round(time.monotonic() - start, 1)}
    print(f"{total['examples']:8} examples {total['seconds']:7.1f} s {num_failures:2} failures  in all", flush=True)
    if options.record is not None:
        command = f"make fuzz MINUTES={options.minutes:g}"
        body = {"what": "fuzzing", "command": command, **facts(), **total, "num_failures": num_failures}
        options.record.write_text(json.dumps({**body, "targets": results}, indent=1) + "\n", encoding="utf-8")
    return 1 if num_failures or not found else 0


if __name__ == "__main__":
    sys.exit(main())
