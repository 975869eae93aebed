"""Where a command writes: results to standard output, everything else to standard error.

With `--json` a command prints one JSON object and nothing else on standard output. rich honours NO_COLOR.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console

from mezzotint.process import guarded

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def result_console() -> Console:
    """Return a console on standard output, for the result of a command."""
    return Console(file=sys.stdout, highlight=False)


def progress_console() -> Console:
    """Return a console on standard error, for progress, logs and warnings."""
    return Console(file=sys.stderr, highlight=False)


def print_json(command: str, payload: Mapping[str, Any]) -> None:
    """Print the one JSON object of `command`, schema `mezzotint.<command>/1`; NaN and infinity become strings."""
    body = {"schema": f"mezzotint.{command}/1", **payload}
    sys.stdout.write(json.dumps(_finite(body), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Return `value` with floats that JSON cannot write (NaN, infinities) spelled as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextmanager
def script_output(*, is_result: bool) -> Iterator[None]:
    """Run a script guarded; what it prints passes, or goes to standard error where stdout is for our JSON."""
    with guarded():
        if not is_result:
            os.dup2(2, 1)
            sys.stdout = sys.stderr
        yield
