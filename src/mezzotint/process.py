"""Keeping a process usable while it runs somebody's script: the script cannot end it, nor take away what we need after.

`guarded` surrounds a script. `os._exit` and `os.exec*` raise `HardExit` in it, a SystemExit, so that they end the
script and not the command. Afterwards streams, file descriptors 1 and 2, `sys.modules`, `builtins`, the functions of
`os`, `time` and `json`, the working directory and the signal handlers are what they were.
"""

import builtins
import importlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

exit_now = os._exit  # ends the process, also where a script runs
_RESTORED: tuple[ModuleType, ...] = (builtins, os, time, json)
_ENDINGS = ("_exit", "execv", "execve")
_scripts: list[int] = []  # the process of each script that was run


class HardExit(SystemExit):
    """A script called `os._exit` or replaced its process."""


def has_run_script() -> bool:
    """Return whether this process has run somebody's script."""
    return os.getpid() in _scripts


@contextmanager
def guarded() -> Iterator[None]:
    """Run a script: it cannot end the process silently, and what it changed of the process is restored."""
    _scripts.append(os.getpid())
    modules, known = sys.modules, dict(sys.modules)
    namespaces = [(module, dict(vars(module))) for module in _RESTORED]
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.excepthook)
    folder, limit = _folder(), sys.getrecursionlimit()
    handlers = _handlers()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    saved = [(number, _duplicate(number)) for number in (1, 2)]
    _refuse_endings()
    try:
        yield
    finally:
        for module, namespace in namespaces:
            vars(module).update(namespace)
        _restore_endings()
        for name, loaded in known.items():
            modules.setdefault(name, loaded)
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
        for one, handler in handlers.items():
            if signal.getsignal(one) is not handler:
                signal.signal(one, handler)


def _refuse_endings() -> None:
    """Make `os._exit` and `os.exec*` raise in this process; processes that it forks end as they ask."""
    process = os.getpid()
    system = importlib.import_module("nt" if os.name == "nt" else "posix")

    def ending(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> NoReturn:
            if os.getpid() != process:
                original(*args, **kwargs)
            if threading.current_thread() is not threading.main_thread():
                os.write(2, f"mezzotint: error: a thread of the script called os.{name}\n".encode())
                exit_now(2)
            code = (args or tuple(kwargs.values()) or (None,))[0] if name == "_exit" else f"os.{name}"
            raise HardExit(code)

        return refused

    for name in _ENDINGS:
        original = getattr(os, name, None)
        if original is not None:
            replacement = ending(name, original)
            setattr(os, name, replacement)
            _system_endings.setdefault(name, getattr(system, name))
            setattr(system, name, replacement)


def _restore_endings() -> None:
    system = importlib.import_module("nt" if os.name == "nt" else "posix")
    for name, original in _system_endings.items():
        setattr(system, name, original)


_system_endings: dict[str, Callable[..., Any]] = {}


def _handlers() -> dict[int, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
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


def _usable(stream: Any, number: int) -> Any:
    """Return the stream, or a new one on its descriptor where a script closed or detached it."""
    try:
        stream.write("")
        stream.flush()
    except (ValueError, OSError, AttributeError):
        return open(number, "w", encoding="utf-8", closefd=False)
    return stream
