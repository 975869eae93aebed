"""Attributes of foreign modules and classes, replaced for a while and put back; and the guard of what only observes."""

import logging
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

logger = logging.getLogger("mezzotint")
_ABSENT = object()
_MAX_TEXT = 200


class Guard:
    """Keeps faults of observing code away from the program that it observes.

    The first exception ends the observation: it is logged as a warning and kept in `fault`, `on_fault` is called, and
    from then on guarded hooks do nothing and guarded wrappers only call what they wrap. `what` names the observation.
    Exceptions of the program itself, and those that are no `Exception` (KeyboardInterrupt), pass unchanged.

    As a context it guards a block: an exception in it is a fault, and goes no further.
    """

    def __init__(self, what: str, on_fault: Callable[[], None] | None = None) -> None:
        self._what = what
        self._on_fault = on_fault
        self.fault: str | None = None

    def fail(self, error: Exception) -> None:
        """Take note of a fault; the first one is said."""
        if self.fault is not None:
            return
        frames = traceback.extract_tb(error.__traceback__)
        place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        text = f"{type(error).__name__}: {error}"[:_MAX_TEXT]
        self.fault = f"{self._what} has ended after an error ({text}{place}); the program goes on without it"
        logger.warning(self.fault)
        if self._on_fault is not None:
            try:
                self._on_fault()
            except Exception:
                logger.debug("ending after a fault failed too", exc_info=True)

    def hook(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a hook that does nothing, and returns None, once there is a fault."""

        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.fault is not None:
                return None
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self.fail(error)
                return None

        return guarded

    def __enter__(self) -> None:
        """Begin a guarded block."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        """Take an exception for a fault."""
        if isinstance(error, Exception):
            self.fail(error)
            return True
        return False


class _Once:
    """A function of the program that is called within a wrapper, and how its last call ended."""

    __slots__ = ("error", "function", "is_done", "result")

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.is_done = True
        try:
            self.result = self.function(*args, **kwargs)
        except BaseException as error:
            self.error = error
            raise
        return self.result


class _Layer:
    """One replacement: what `owner` held before, what it was given, and what a wrapper calls."""

    __slots__ = ("before", "is_live", "name", "original", "owner", "value")

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.before = vars(owner).get(name, _ABSENT)
        self.original: Any = getattr(owner, name, None)
        self.value: Any = None
        self.is_live = True


_layers: list[_Layer] = []  # of everybody, in the order in which they were made


class Patches:
    """Replacements in the order they were made; `undo` takes them back, in whatever order their owners end.

    `guard` keeps faults of the wrappers away from what they wrap.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        self._guard = guard
        self._made: list[_Layer] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, remembering what `owner` itself (not its bases) held."""
        self._add(_Layer(owner, name), value)

    def _add(self, layer: _Layer, value: Any) -> None:
        layer.value = value
        setattr(layer.owner, layer.name, value)
        self._made.append(layer)
        _layers.append(layer)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace a function by one that calls `around(original, *args, **kwargs)`; absent names are left alone."""
        layer, guard = _Layer(owner, name), self._guard
        if layer.original is None:
            return

        @wraps(layer.original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            original = layer.original
            if not layer.is_live or (guard is not None and guard.fault is not None):
                return original(*args, **kwargs)
            if guard is None:
                return around(original, *args, **kwargs)
            once = _Once(original)
            try:
                return around(once, *args, **kwargs)
            except Exception as error:
                if error is once.error:
                    raise
                guard.fail(error)
            if once.error is not None:
                raise once.error
            return once.result if once.is_done else original(*args, **kwargs)

        self._add(layer, wrapper)

    def undo(self) -> None:
        """Take everything back. What others have put on top stays, and calls what was there before."""
        while self._made:
            layer = self._made.pop()
            layer.is_live = False
            _layers.remove(layer)
            above = next((one for one in _layers if one.before is layer.value and one.owner is layer.owner), None)
            if above is not None:
                above.before, above.original = layer.before, layer.original
            elif layer.before is _ABSENT:
                if layer.name in vars(layer.owner):
                    delattr(layer.owner, layer.name)
            else:
                setattr(layer.owner, layer.name, layer.before)
