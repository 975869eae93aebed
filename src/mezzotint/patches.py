"""Attributes of foreign modules and classes, replaced for a while and put back exactly as they were."""

from collections.abc import Callable
from functools import wraps
from typing import Any

_ABSENT = object()


class Patches:
    """Replacements in the order they were made; `undo` takes them back in reverse."""

    def __init__(self) -> None:
        self._made: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Set `owner.name`, remembering what `owner` itself (not its bases) held."""
        self._made.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Replace a function by one that calls `around(original, *args, **kwargs)`; absent names are left alone."""
        original = getattr(owner, name, None)
        if original is None:
            return

        @wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        self.replace(owner, name, wrapper)

    def undo(self) -> None:
        """Put everything back."""
        while self._made:
            owner, name, value = self._made.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
