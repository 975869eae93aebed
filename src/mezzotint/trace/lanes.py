"""What is under way in each thread: the modules being called, the autocast regions, the update; and where ops were.

Autograd gives each node of the graph a number that counts up within a thread, before the operation that made the node
reaches the recorder. So the recorder can note "node n was made here", and find its place again when backward runs n.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from mezzotint.torch_internals.autograd import next_sequence_number
from mezzotint.trace.record import Site

_KEPT_PLACES = 1_000_000


class Place(NamedTuple):
    """Module path and program lines of an operation."""

    module: str
    site: Site


NOWHERE = Place("", ())


@dataclass(slots=True, eq=False)
class Region:
    """An autocast region that is open: `dtype` is None where it switches autocast off."""

    device: str
    dtype: str | None
    has_cache: bool
    site: Site
    is_default_dtype: bool
    updated: bool = False


@dataclass(slots=True, eq=False)
class Lane:
    """One thread's state. `base` is the number of modules that were being called when backward or an update began."""

    thread: int
    modules: list[str] = field(default_factory=list)
    owners: list[object] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    base: int = 0
    update_depth: int = 0
    pause_depth: int = 0
    next_node: int = 0
    first_place: int = 0
    places: list[Place] = field(default_factory=list)

    def remember(self, next_node: int, place: Place) -> None:
        """Note that all nodes below `next_node` that have no place yet were made here."""
        if not self.places:
            self.first_place = max(self.next_node, next_node - 1)
        missing = next_node - self.first_place - len(self.places)
        if missing > 0:
            self.places.extend([place] * missing)
        self.next_node = next_node
        if len(self.places) > _KEPT_PLACES:
            self.first_place += len(self.places) // 2
            del self.places[: len(self.places) // 2]

    def place_of(self, node: int) -> Place | None:
        """Return where an autograd node was made, if it was made in this thread."""
        index = node - self.first_place
        return self.places[index] if 0 <= index < len(self.places) else None

    @property
    def region(self) -> Region | None:
        """The innermost autocast region."""
        return self.regions[-1] if self.regions else None

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Make operations count as part of the update."""
        base, self.base = self.base, len(self.modules)
        self.update_depth += 1
        try:
            yield
        finally:
            self.update_depth -= 1
            self.base = base

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the operations of this thread unrecorded."""
        self.pause_depth += 1
        try:
            yield
        finally:
            self.pause_depth -= 1


class Lanes:
    """The lanes of all threads that were seen."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._lock = threading.Lock()
        self.all: list[Lane] = []

    def mine(self) -> Lane:
        """Return the calling thread's lane."""
        try:
            lane: Lane = self._local.lane
        except AttributeError:
            with self._lock:
                # nodes that exist already were not made by the operation that is seen first
                lane = self._local.lane = Lane(len(self.all), next_node=next_sequence_number())
                self.all.append(lane)
        return lane

    def place_of(self, node: int, lane: Lane) -> Place:
        """Return where an autograd node was made: in this lane, else in the first that knows (a GPU's backward)."""
        place = lane.place_of(node)
        if place is not None:
            return place
        return next((found for other in self.all if (found := other.place_of(node)) is not None), NOWHERE)
