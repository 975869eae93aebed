"""Numbers that a program asks of a ghost tensor, which has none: what it was told, and where.

A number that is known is told truly: a scalar made by `full`, `zeros` or `ones`, or moved from the CPU, keeps its value
until something writes to it, and a gradient scaler's "found infinity" reads 0. Everything else is assumed, and counted
by the line that asked: each is also a synchronisation on a real GPU.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import GhostError

MAX_ASKED = 1000
"""How often one line may ask before it is taken for a loop that waits for a value."""

_KEPT_BY = frozenset(
    {"_to_copy", "clone", "detach", "alias", "lift_fresh", "view", "_unsafe_view", "squeeze", "expand"}
)
_FILLED = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "zero_": 0, "new_zeros": 0, "new_ones": 1}
_UNCHANGED = frozenset({"_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"})


class Values:
    """What is known of scalars, and what was assumed. `assumed` counts by (file, line, kind)."""

    def __init__(self) -> None:
        self.assumed: Counter[tuple[str, int, str]] = Counter()

    def follow(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note what an operation makes known or unknown."""
        if isinstance(out, Tensor) and out.numel() == 1:
            value = self._value_of(name, args)
            out._ghost_value = value  # type: ignore[attr-defined]
            return
        if name.endswith("_") and name not in _UNCHANGED and args:
            first = args[0]
            for one in first if isinstance(first, (list, tuple)) else (first,):
                if getattr(one, "_ghost_value", None) is not None:
                    one._ghost_value = None

    def _value_of(self, name: str, args: Any) -> float | None:
        if name in _FILLED:
            return _FILLED[name]
        if name in ("full", "full_like", "fill_", "new_full"):
            given = args[-1] if len(args) > 1 else None
            return given if isinstance(given, (int, float)) else None
        if name in ("scalar_tensor",):
            return args[0] if isinstance(args[0], (int, float)) else None
        if name in _UNCHANGED or name in _KEPT_BY:
            return known(args[0]) if args else None
        return None

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
            value = False if dtype is torch.bool else 1
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


def known(tensor: Any) -> float | None:
    """Return the value of a one-element tensor, if it is known."""
    value = getattr(tensor, "_ghost_value", None)
    return value if isinstance(value, (int, float)) else None


def user_frame(frame: FrameType | None) -> FrameType | None:
    """Return the innermost frame outside torch, this package and installed libraries; else outside torch."""
    fallback = None
    while frame is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and "/mezzotint/" not in path and not path.startswith("<"):
            if "-packages/" not in path:
                return frame
            fallback = fallback or frame
        frame = frame.f_back
    return fallback
