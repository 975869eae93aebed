"""Numbers that a program asks of a ghost tensor, which has none: what it was told, and where.

A number that is known is told truly (`twins.py`), and a gradient scaler's "found infinity" reads 0. Everything else is
assumed, and counted by the line that asked: each is also a synchronisation on a real GPU.
"""

import operator
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import STANDARD_LIBRARY, GhostError, is_machinery
from mezzotint.ghost.twins import twin_of
from mezzotint.torch_internals.dispatch import disable_torch_dispatch, disable_torch_function

MAX_ASKED = 10_000
"""How often one line may ask before it is taken for a loop that waits for a value."""

_GUESSES = {"all": True, "_is_all_true": True, "any": False, "_is_any_true": False}
"""What a yes-or-no question of all elements is taken for: training goes well, and masks keep something."""
_KEEP_GUESS = frozenset(
    {"_to_copy", "clone", "detach", "alias", "lift_fresh", "view", "_unsafe_view", "squeeze", "expand", "unsqueeze"}
)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "logical_and": lambda a, b: bool(a) and bool(b), "logical_or": lambda a, b: bool(a) or bool(b),
}  # fmt: skip
_COMPARE |= {
    "mul": _COMPARE["logical_and"], "bitwise_and": _COMPARE["logical_and"], "bitwise_or": _COMPARE["logical_or"],
}  # fmt: skip


class Values:
    """What is known of scalars, and what was assumed. `assumed` counts by (file, line, kind)."""

    def __init__(self) -> None:
        self.assumed: Counter[tuple[str, int, str]] = Counter()

    def follow(self, name: str, args: Any, out: Any) -> None:
        """Note how an answer of one boolean would be guessed: as its numbers are."""
        if not isinstance(out, Tensor) or out.dtype is not torch.bool or out.numel() != 1 or not args:
            return
        if name in _GUESSES:
            guess = _GUESSES[name]
            if args[0].numel() == 1 and args[0].dtype is torch.bool and not name.startswith("_is"):
                guess = bool(_guessed(args[0]))
        elif name in ("logical_not", "bitwise_not"):
            guess = not _guessed(args[0])
        elif name in _KEEP_GUESS:
            guess = bool(_guessed(args[0]))
        elif name in _COMPARE and len(args) > 1:
            guess = bool(_COMPARE[name](_guessed(args[0]), _guessed(args[1])))
        else:
            return
        out._ghost_guess = guess  # type: ignore[attr-defined]

    def item(self, tensor: Tensor) -> Any:
        """Return the number of a one-element ghost. Raises GhostError where one line asks without end."""
        value = known(tensor)
        dtype = tensor.dtype
        if value is None:
            path, line = self.note("item")
            if self.assumed[path, line, "item"] > MAX_ASKED:
                raise GhostError(
                    f"{path}:{line} asked {MAX_ASKED} times for a number that only a real run computes; a ghost GPU "
                    "answers 1.0, 1 or False, and this loop waits for something else"
                )
            value = _guessed(tensor)
        if dtype is torch.bool:
            return bool(value)
        if dtype.is_complex:
            return complex(value)
        return float(value) if dtype.is_floating_point else int(value)

    def note(self, kind: str) -> tuple[str, int]:
        """Count one assumption at the user's line, and return that line."""
        frame = user_frame(sys._getframe(1))
        place = (frame.f_code.co_filename, frame.f_lineno) if frame is not None else ("", 0)
        self.assumed[(*place, kind)] += 1
        return place


def known(tensor: Any) -> Any:
    """Return the number of a one-element tensor, if it is known."""
    twin = twin_of(tensor) if isinstance(tensor, Tensor) and tensor.numel() == 1 else None
    if twin is None:
        return None
    with disable_torch_dispatch(), disable_torch_function():
        return twin.item()


def _guessed(value: Any) -> Any:
    """Return what a number is taken for: itself if it is known, else 1, and False for a boolean without a guess."""
    if not isinstance(value, Tensor):
        return value
    found = known(value)
    if found is None:
        found = getattr(value, "_ghost_guess", value.dtype is not torch.bool)
        return found if value.dtype is torch.bool else 1
    return found


def user_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame outside torch, this package and installed libraries; else outside torch."""
    fallback = None
    while frame is not None:
        path = frame.f_code.co_filename
        if not is_machinery(path):
            if "-packages/" not in path and not path.startswith(STANDARD_LIBRARY):
                return frame
            fallback = fallback or frame
        frame = frame.f_back
    return fallback


def here() -> str:
    """Return the user's line as the beginning of a sentence."""
    frame = user_frame(sys._getframe(1))
    return f"{frame.f_code.co_filename}:{frame.f_lineno}: " if frame is not None else ""
