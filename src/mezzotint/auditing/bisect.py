"""The smallest set of modules that must stay in float32 for an error to be within a tolerance.

Delta debugging (Zeller and Hildebrandt, "Simplifying and Isolating Failure-Inducing Input", 2002) over the tree of
modules: first among the children of the model, then each guilty module is replaced by those of its children that are
guilty. The result is 1-minimal: leaving out any one of its modules brings the error back. Errors need not be monotone;
every step that is taken was measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

Kept = tuple[str, ...]


class Ending(StrEnum):
    """How a search ended."""

    FOUND = "found"
    NOT_NEEDED = "not needed"  # the error is within the tolerance as it is
    NOT_ENOUGH = "not enough"  # all modules in float32 leave the error beyond it
    BUDGET = "budget"  # the set is good, but smaller ones were not all tried


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One measurement: the error with these modules in float32."""

    keep: Kept
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectResult:
    """What a search found: `keep` brings the error from `error_before` to `error_after`; `error_all` is that of all."""

    ending: Ending
    keep: Kept
    error_before: float
    error_all: float
    error_after: float
    tolerance: float
    evaluations: tuple[Evaluation, ...]


@dataclass(slots=True)
class Candidate:
    """A module by its path, and the modules below it."""

    path: str
    children: list["Candidate"] = field(default_factory=list)


def candidate_tree(paths: Sequence[str]) -> list[Candidate]:
    """Return modules as a forest, in the order given."""
    nodes = {path: Candidate(path) for path in paths}
    roots: list[Candidate] = []
    for path, node in nodes.items():
        parent = path.rpartition(".")[0]
        while parent and parent not in nodes:
            parent = parent.rpartition(".")[0]
        (nodes[parent].children if parent else roots).append(node)
    return roots


class _BudgetError(Exception):
    """No measurement is left."""


class _Search:
    def __init__(
        self,
        error: Callable[[Kept], float],
        tolerance: float,
        budget: int,
        on_evaluation: Callable[[Evaluation], None] | None,
    ) -> None:
        self._error = error
        self._tolerance = tolerance
        self._budget = budget
        self._on_evaluation = on_evaluation
        self.known: dict[frozenset[str], float] = {}
        self.evaluations: list[Evaluation] = []
        self.best: Kept = ()

    def measure(self, keep: Sequence[str]) -> float:
        """Return the error with these modules kept, measured once."""
        key = frozenset(keep)
        if key not in self.known:
            if len(self.evaluations) >= self._budget:
                raise _BudgetError
            value = self._error(tuple(keep))
            self.known[key] = value
            found = Evaluation(keep=tuple(keep), error=value)
            self.evaluations.append(found)
            if self._on_evaluation is not None:
                self._on_evaluation(found)
        return self.known[key]

    def is_good(self, keep: Sequence[str]) -> bool:
        """Whether these modules in float32 suffice (NaN is no success); remembers the last set that did."""
        if self.measure(keep) <= self._tolerance:
            self.best = tuple(keep)
            return True
        return False

    def reduce(self, names: Sequence[str], others: Sequence[str]) -> list[str]:
        """Return a 1-minimal part of `names` that is good together with `others`; all of `names` is."""
        names = list(names)
        parts = 2
        while len(names) >= 2:
            size = -(-len(names) // parts)
            chunks = [names[start : start + size] for start in range(0, len(names), size)]
            chosen = next((chunk for chunk in chunks if self.is_good([*others, *chunk])), None)
            if chosen is not None:
                names, parts = chosen, 2
                continue
            rests = [[name for name in names if name not in chunk] for chunk in chunks]
            chosen = next((rest for rest in rests if len(chunks) > 2 and self.is_good([*others, *rest])), None)
            if chosen is not None:
                names, parts = chosen, max(2, parts - 1)
                continue
            if parts >= len(names):
                break
            parts = min(len(names), 2 * parts)
        if len(names) == 1 and self.is_good(others):
            return []
        return names


def bisect(
    candidates: Sequence[Candidate],
    error: Callable[[Kept], float],
    *,
    tolerance: float,
    budget: int = 200,
    on_evaluation: Callable[[Evaluation], None] | None = None,
) -> BisectResult:
    """Search the modules to keep in float32 so that `error(keep)` is at most `tolerance`.

    At most `budget` measurements are made, each reported to `on_evaluation`. Deterministic if `error` is.
    """
    search = _Search(error, tolerance, budget, on_evaluation)
    nodes: dict[str, Candidate] = {}

    def add(nodes_below: Sequence[Candidate]) -> None:
        for node in nodes_below:
            nodes[node.path] = node
            add(node.children)

    add(candidates)
    everything = tuple(node.path for node in candidates)
    before = search.measure(())
    if before <= tolerance:
        return _result(search, Ending.NOT_NEEDED, (), before, before, tolerance)
    total = search.measure(everything)
    if not total <= tolerance:
        return _result(search, Ending.NOT_ENOUGH, (), before, total, tolerance)
    search.best = everything
    try:
        kept = _descend(search, nodes, search.reduce(everything, ()))
        ending = Ending.FOUND
    except _BudgetError:
        kept, ending = list(search.best), Ending.BUDGET
    return _result(search, ending, tuple(kept), before, total, tolerance)


def _descend(search: _Search, nodes: dict[str, Candidate], kept: list[str]) -> list[str]:
    """Replace each kept module by the guilty ones among its children, where those suffice; then leave out any spare."""
    waiting = list(kept)
    while waiting:
        path = waiting.pop(0)
        children = [child.path for child in nodes[path].children]
        others = [name for name in kept if name != path]
        if not children or not search.is_good([*others, *children]):
            continue  # the module itself is needed: its own operations count
        found = search.reduce(children, others)
        kept = [*others, *found]
        waiting.extend(found)
    for path in list(kept):  # what one level made superfluous at another
        rest = [name for name in kept if name != path]
        if len(kept) > 1 and search.is_good(rest):
            kept = rest
    order = {name: number for number, name in enumerate(nodes)}
    return sorted(kept, key=order.__getitem__)


def _result(search: _Search, ending: Ending, keep: Kept, before: float, total: float, tolerance: float) -> BisectResult:
    after = search.known.get(frozenset(keep), before)
    return BisectResult(
        ending=ending,
        keep=keep,
        error_before=before,
        error_all=total,
        error_after=after,
        tolerance=tolerance,
        evaluations=tuple(search.evaluations),
    )
