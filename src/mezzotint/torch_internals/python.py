"""Private names of Python's standard library, which is no steadier there than torch."""

import atexit
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from mezzotint.patches import Patches
from mezzotint.process import HardExit, exit_now, guarded
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


def end_after_script(code: int) -> NoReturn:
    """Exit with a code that exit functions and threads which a script left behind cannot change, nor delay.

    The interpreter is not torn down. The worker threads of a process group that the script left open (gloo's hold
    tensors) abort a process when they ask for a lock of an interpreter that is going away:
    https://github.com/pytorch/pytorch/issues/190489.
    """
    report = sys.unraisablehook
    # the interpreter would print how an exit function that calls os._exit was stopped
    sys.unraisablehook = lambda found: None if isinstance(found.exc_value, HardExit) else report(found)
    with suppress(BaseException), guarded():
        run_exit_functions()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    exit_now(code)
