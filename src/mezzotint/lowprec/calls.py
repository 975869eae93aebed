"""How often each operation took which way while a gate was open; what fell back to torch's kernel is told once."""

import warnings
from collections import Counter
from collections.abc import Mapping

from mezzotint.lowprec.choice import Path

_counts: Counter[tuple[str, Path]] = Counter()
_told: set[str] = set()


def count(operation: str, path: Path) -> None:
    """Add one call of an operation."""
    _counts[operation, path] += 1


def fall_back(operation: str, why: str) -> None:
    """Add one call that torch's own, slow kernel computes; the first of each operation is told as a warning."""
    _counts[operation, Path.STOCK] += 1
    if operation not in _told:
        _told.add(operation)
        warnings.warn(f"{operation} runs on torch's own kernel, which is slow on this CPU: {why}", stacklevel=3)


def call_counts() -> Mapping[tuple[str, Path], int]:
    """Return the calls since the process began, by operation and way."""
    return dict(_counts)
