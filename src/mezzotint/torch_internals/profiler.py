"""The kinds of events that torch's profiler records."""

from typing import Any

from mezzotint.torch_internals.registry import Feature, find, value

_KIND = "torch._C._profiler._EventType"
value(_KIND, "the allocator's events, of which memory figures are made", needed_by=(Feature.MEMORY,))


def allocation() -> Any:
    """Return the kind of the allocator's events."""
    return find(f"{_KIND}.Allocation")
