"""The variables of a running frame, read without a trace in the program."""

import inspect
import sys
from types import FrameType
from typing import Any

# what hands the dict of a frame's variables to the program, which reading them would change before Python 3.13
_GIVE_LOCALS = frozenset({"locals", "vars", "f_locals", "eval", "exec"})


def variables_of(frame: FrameType) -> dict[str, Any]:
    """Return a frame's variables by name; none of a function that may hold the dict of its variables itself."""
    is_copy = sys.version_info < (3, 13) and bool(frame.f_code.co_flags & inspect.CO_OPTIMIZED)
    if is_copy and not _GIVE_LOCALS.isdisjoint(frame.f_code.co_names):
        return {}
    found = dict(frame.f_locals)
    if is_copy:  # the frame keeps the copy that it has just made, and with it the tensors among them
        frame.f_locals.clear()
    return found
