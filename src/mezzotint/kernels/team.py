"""Compiled tasks on the OpenMP team that torch computes with.

After each operation torch's worker threads wait in a loop on their cores for the next one. Threads of anybody else, be
they Python's or numba's own, compete with them for those cores and a training step takes 1.4 times as long. So tasks
run as a parallel region of the very library that torch has loaded: `GOMP_parallel` of its libgomp, called through
ctypes, which also releases the interpreter's lock. Where torch runs on another OpenMP, there is no team.

A task takes the address of a block of int64 words. Word 0 counts the units of work handed out: each thread takes the
next until all are done.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

_MAPS = Path("/proc/self/maps")
_OTHER_RUNTIMES = ("libiomp5", "libomp")
_BLOCK = types.CPointer(types.int64)


def task(function: Callable[..., Any]) -> Any:
    """Return the function, which takes a block's address, compiled as one that C can call; cached where possible."""
    try:
        return cfunc(types.void(_BLOCK), cache=True)(function)
    except RuntimeError:  # "no locator available": no folder to write to
        return cfunc(types.void(_BLOCK))(function)


def counter(word: int) -> Any:
    """Return a step that adds 1 to a word of the block and returns what it was; what was written before is seen."""

    @intrinsic
    def take(_context: Any, block: Any) -> Any:
        signature = types.int64(_BLOCK)

        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            place = builder.gep(args[0], [ir.IntType(64)(word)])
            return builder.atomic_rmw("add", place, ir.IntType(64)(1), "acq_rel")

        return signature, generate

    return take


# the next unit of work, and the number of the thread that asks, each counted from 0 in a word of the block
take_unit, take_thread = counter(0), counter(1)


def has_team() -> bool:
    """Return whether tasks can run on torch's threads; without, they run on the caller's alone."""
    return _gomp_parallel() is not None


def run(compiled_task: Any, block: int, num_threads: int) -> None:
    """Call a task on `num_threads` threads with the block at an address; return when all of them are done."""
    parallel = _gomp_parallel() if num_threads > 1 else None
    if parallel is None:
        _callable(compiled_task)(block)
    else:
        parallel(compiled_task.address, block, num_threads, 0)


@cache
def _callable(compiled_task: Any) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled_task.address)


@cache
def _gomp_parallel() -> Any:
    """Return the entry of the one OpenMP library in this process, or None where there are others, or none."""
    try:
        mapped = {line.split()[-1] for line in _MAPS.read_text().splitlines() if "/" in line}
    except OSError:
        return None
    names = {path: Path(path).name for path in mapped}
    found = [path for path, name in names.items() if name.startswith("libgomp")]
    if any(name.startswith(_OTHER_RUNTIMES) for name in names.values()):
        return None
    # wheels bring a copy of their own, under a changed name; another package may bring a second one
    torchs = [path for path in found if "/torch/" in path or "/torch.libs/" in path] or found
    if len(torchs) != 1:
        return None
    try:
        parallel = ctypes.CDLL(torchs[0]).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel
