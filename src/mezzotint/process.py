"""Keeping a process usable while it runs somebody's script: the script cannot end it, nor take away what we need after.

`guarded` surrounds a script. `os._exit`, `os.exec*` and C's exit functions through ctypes raise `HardExit` in it, a
SystemExit, so that they end the script and not the command. Only a signal, or a C extension that exits, still ends the
process. Afterwards streams, file descriptors 1 and 2, `sys.modules`, `builtins`, the functions of
`os`, `time` and `json`, the working directory and the signal handlers are what they were.
"""

import builtins
import ctypes
import importlib
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

exit_now = os._exit  # ends the process, also where a script runs
_RESTORED: tuple[ModuleType, ...] = (builtins, os, time, json)
_ENDINGS = ("_exit", "execv", "execve")
_C_ENDINGS = frozenset(("_exit", "_Exit", "exit", "quick_exit", "Py_Exit"))
_scripts: dict[int, int] = {}  # how many scripts a process has run, by process; a forked one begins at 0
_known: list[dict[str, ModuleType]] = []  # the modules from before the script, of each guard that is open


class HardExit(SystemExit):
    """A script called `os._exit`, or replaced its process; `call` is the function's name."""

    def __init__(self, call: str, code: object) -> None:
        super().__init__(code)
        self.call = call


def exit_call(error: SystemExit) -> str:
    """Return what a script called to end itself, as it would be written: `sys.exit(0)`."""
    call = error.call if isinstance(error, HardExit) else "sys.exit"
    return f"{call}({str(error.code)[:200]})"


def num_scripts() -> int:
    """Return how many times this process has entered somebody's script."""
    return _scripts.get(os.getpid(), 0)


def has_run_script(since: int = 0) -> bool:
    """Return whether this process has run somebody's script since `num_scripts()` was `since`."""
    return num_scripts() > since


@contextmanager
def guarded() -> Iterator[None]:
    """Run a script: it cannot end the process silently, and what it changed of the process is restored."""
    _scripts[os.getpid()] = num_scripts() + 1
    modules = sys.modules
    _known.append(_known[0] if _known else dict(modules))  # those that a script loads are its own
    namespaces = [(module, dict(vars(module))) for module in _RESTORED]
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.excepthook)
    folder, limit = _folder(), sys.getrecursionlimit()
    handlers = _handlers()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    saved = [(number, _duplicate(number)) for number in (1, 2)]
    endings = _refuse_endings()
    sys.stdout, sys.stderr = _lent(sys.stdout), _lent(sys.stderr)
    try:
        yield
    finally:
        for module, namespace in namespaces:
            vars(module).update(namespace)
        for owner, name, original in endings:
            setattr(owner, name, original)
        modules.update({name: loaded for name, loaded in _known.pop().items() if modules.get(name) is None})
        modules.update({"sys": sys, "builtins": builtins})
        sys.modules = modules
        for number, copy in saved:
            _flush(sys.stdout if number == 1 else sys.stderr)
            if copy is not None:
                os.dup2(copy, number)
                os.close(copy)
        sys.stdin, sys.stdout, sys.stderr, sys.excepthook = streams
        sys.stdout, sys.stderr = _usable(sys.stdout, 1), _usable(sys.stderr, 2)
        sys.setrecursionlimit(limit)
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)
        changed = [one for one, handler in handlers.items() if signal.getsignal(one) is not handler]
        if (
            getattr(signal, "SIGALRM", None) in changed
        ):  # a timer of the script would end the process by its signal's default
            signal.setitimer(signal.ITIMER_REAL, 0)
        for one in changed:
            signal.signal(one, handlers[one])


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep what libraries log and warn while we import them, which says nothing to our user, out of our output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _refuse_endings() -> list[tuple[Any, str, Any]]:
    """Make `os._exit`, `os.exec*` and C's own raise in this process; return what they were, by owner and name.

    Processes that the script forks end as they ask.
    """
    process = os.getpid()

    def ending(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> NoReturn:
            if os.getpid() != process:
                original(*args, **kwargs)
            if threading.current_thread() is not threading.main_thread():
                os.write(2, f"mezzotint: error: a thread of the script called {name}\n".encode())
                exit_now(2)
            raise HardExit(name, next(iter((*args, *kwargs.values())), None))

        return refused

    find_in_library = ctypes.CDLL.__getitem__

    def of_library(library: ctypes.CDLL, name: Any) -> Any:
        found = find_in_library(library, name)
        return ending(str(name), found) if name in _C_ENDINGS else found

    system = importlib.import_module("nt" if os.name == "nt" else "posix")
    before = [
        (owner, name, getattr(owner, name)) for owner in (os, system) for name in _ENDINGS if hasattr(owner, name)
    ]
    for owner, name, original in before:
        setattr(owner, name, ending(f"os.{name}", original))
    ctypes.CDLL.__getitem__ = of_library  # type: ignore[method-assign]
    return [*before, (ctypes.CDLL, "__getitem__", find_in_library)]


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {one: signal.getsignal(one) for one in signal.valid_signals()}
    return {one: handler for one, handler in found.items() if handler is not None}


def _folder() -> Path | None:
    try:
        return Path.cwd()
    except OSError:
        return None


def _duplicate(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:  # closed before the command began
        return None


def _flush(stream: Any) -> None:
    with suppress(Exception):
        stream.flush()


class _Lent(io.BufferedIOBase):
    """Another stream's buffer, which stays open when this one is closed or detached."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return int(self._buffer.write(data))

    def flush(self) -> None:
        self._buffer.flush()

    def fileno(self) -> int:
        return int(self._buffer.fileno())

    def isatty(self) -> bool:
        return bool(self._buffer.isatty())


def _lent(stream: Any) -> Any:
    """Return a stream for a script, which may close or detach it; other kinds of streams are lent as they are."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    with suppress(ValueError):  # closed
        stream.flush()
        return io.TextIOWrapper(
            _Lent(stream.buffer),
            encoding=stream.encoding, errors=stream.errors, newline="", line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )  # fmt: skip
    return stream


def _usable(stream: Any, number: int) -> Any:
    """Return the stream, or a new one on its descriptor where a script closed or detached it."""
    try:
        stream.write("")
        stream.flush()
    except (ValueError, OSError, AttributeError):
        return open(number, "w", encoding="utf-8", closefd=False)
    return stream
