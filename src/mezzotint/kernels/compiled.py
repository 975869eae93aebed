"""The decorator of every compiled loop.

Loops are serial and release the interpreter's lock. They are compiled on first use for the processor they run on, and
kept beside the source or in the user's cache folder; where neither can be written, each process compiles anew.
Indices run over whole slices (`for i in range(part.size)`): an index with an offset might be negative for all that the
compiler knows, and the test for it keeps a loop from being vectorised.
"""

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled, its machine code cached on disk where that is possible."""
    try:
        loop: Callable[..., Any] = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # "no locator available": no folder to write to
        loop = njit(nogil=True)(function)
    return loop
