"""Private names of Python's standard library, which is no steadier there than torch."""

import atexit
import threading
from collections.abc import Callable
from typing import Any

from mezzotint.patches import Patches
from mezzotint.torch_internals.registry import Feature, Internal, declare

_RUN_THREAD = "_bootstrap_inner"
declare(
    Internal(
        f"threading.Thread.{_RUN_THREAD}",
        "what runs in threads that a program starts",
        noted_in=(Feature.RECORDING,),
        lost="operations in threads that the program started could not be watched",
        unknown="they are not in the figures, and MZ253 is not judged",
    )
)
declare(Internal("atexit._run_exitfuncs", "what a script registered for its end"))


def wrap_threads(patches: Patches, around: Callable[..., Any]) -> None:
    """Make what runs in a new thread go through `around`."""
    patches.wrap(threading.Thread, _RUN_THREAD, around)


def run_exit_functions() -> None:
    """Run what was registered by `atexit`."""
    run = getattr(atexit, "_run_exitfuncs", None)
    if run is not None:
        run()
