"""A trace in figures: formats by module and phase, casts by place, the course of a step. Pure and small.

Modules form a tree by their paths; what children do counts for their parents. Layers that are alike are one row.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mezzotint.trace.places import user_line
from mezzotint.trace.record import Call, Frame, Kind, Phase, Trace

SHOWN_PHASES = (Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD)
MAX_BINS = 400


@dataclass(slots=True)
class Work:
    """Operations, FLOPs and bytes of one format in one place; `uncovered` operations have no formula."""

    operations: int = 0
    flops: int = 0
    nbytes: int = 0
    uncovered: int = 0

    def add(self, other: "Work") -> None:
        """Add another place's work."""
        self.operations += other.operations
        self.flops += other.flops
        self.nbytes += other.nbytes
        self.uncovered += other.uncovered


FormatWork = dict[str, Work]


@dataclass(slots=True)
class ModuleNode:
    """A module with all below it: work by phase and format. `alike` counts the modules that this one stands for."""

    path: str
    kind: str
    children: list["ModuleNode"] = field(default_factory=list)
    work: dict[Phase, FormatWork] = field(default_factory=dict)
    alike: int = 1
    last: str = ""

    def signature(self) -> object:
        """Return what must be equal for two modules to be alike."""
        work = tuple(
            (phase, dtype, one.operations, one.flops)
            for phase, formats in self.work.items()
            for dtype, one in formats.items()
        )
        return self.kind, work, tuple((child.path.rpartition(".")[2], child.signature()) for child in self.children)


def format_work(trace: Trace) -> dict[Phase, FormatWork]:
    """Return the work of the whole trace by phase and format, views aside."""
    found: dict[Phase, FormatWork] = {}
    counts = trace.counts()
    for call in trace.calls:
        if call.kind is not Kind.VIEW and call.format is not None:
            _add(found, call, counts.get(call.index, 0))
    return {phase: work for phase, work in found.items() if any(one.operations for one in work.values())}


def _add(found: dict[Phase, FormatWork], call: Call, count: int) -> None:
    assert call.format is not None
    work = found.setdefault(call.phase, {}).setdefault(call.format, Work())
    work.add(
        Work(
            operations=count,
            flops=count * (call.flops or 0),
            nbytes=count * call.nbytes,
            uncovered=count if call.flops is None else 0,
        )
    )


def module_tree(trace: Trace) -> list[ModuleNode]:
    """Return the modules that ran, as a forest, with layers that are alike folded into the first of them."""
    counts = trace.counts()
    nodes: dict[str, ModuleNode] = {}
    for call in trace.calls:
        if call.phase in SHOWN_PHASES and call.kind is not Kind.VIEW and call.format is not None:
            for path in _path_and_parents(call.module or "(outside modules)"):
                node = nodes.setdefault(path, ModuleNode(path, trace.modules.get(path, "")))
                _add(node.work, call, counts.get(call.index, 0))
    roots: list[ModuleNode] = []
    for path, node in nodes.items():
        parent = nodes.get(path.rpartition(".")[0])
        (parent.children if parent is not None else roots).append(node)
    return _folded(roots)


def _path_and_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _folded(nodes: list[ModuleNode]) -> list[ModuleNode]:
    """Merge neighbours with numbers for names (the layers of a stack) that are alike."""
    kept: list[ModuleNode] = []
    for node in nodes:
        node.children = _folded(node.children)
        last = kept[-1] if kept else None
        if (
            last is not None
            and node.path.rpartition(".")[2].isdigit()
            and last.path.rpartition(".")[2].isdigit()
            and node.path.rpartition(".")[0] == last.path.rpartition(".")[0]
            and node.signature() == last.signature()
        ):
            last.alike += 1
            last.last = node.path.rpartition(".")[2]
        else:
            kept.append(node)
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class CastRow:
    """Casts from one dtype to another at one line: how often a step, and how many bytes they read and write.

    `repeated` casts had been made before in the same step, of the same tensor to the same dtype.
    """

    source: str
    target: str
    module: str
    line: Frame | None
    per_step: float
    bytes_per_step: float
    repeated: int


def cast_rows(trace: Trace) -> list[CastRow]:
    """Return the casts, most bytes first."""
    steps = max(1, len(trace.steps))
    counts = trace.counts()
    repeated: Counter[int] = Counter()
    made: set[tuple[int, int, str]] = set()
    for operation in trace.operations[: trace.steps[-1].end if trace.steps else None]:
        if operation.call.kind is Kind.CAST and operation.producers and operation.producers[0] != -1:
            key = (operation.step, operation.producers[0], operation.call.outputs[0].dtype)
            if key in made:
                repeated[operation.call.index] += 1
            made.add(key)
    rows: dict[tuple[str, str, str, Frame | None], list[float]] = {}
    for call in trace.calls:
        if call.kind is Kind.CAST and call.inputs and call.outputs and call.index in counts:
            place = call.inputs[-1].dtype, call.outputs[0].dtype, call.module, user_line(call.site)
            row = rows.setdefault(place, [0.0, 0.0, 0.0])
            count = counts.get(call.index, 0)
            row[0] += count / steps
            row[1] += count * call.nbytes / steps
            row[2] += repeated[call.index]
    found = [
        CastRow(source=s, target=t, module=m, line=line, per_step=n, bytes_per_step=b, repeated=int(r))
        for (s, t, m, line), (n, b, r) in rows.items()
    ]
    return sorted(found, key=lambda row: row.bytes_per_step, reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCourse:
    """A step as bins of equal numbers of operations: the phase and the format that most of each bin's bytes have."""

    index: int
    phases: tuple[str, ...]
    formats: tuple[str, ...]
    marks: tuple[tuple[float, str], ...]


_MARKED = frozenset({"backward", "grad", "scaler.unscale", "clip", "optimizer.step", "scaler.update", "save"})


def step_courses(trace: Trace) -> list[StepCourse]:
    """Return the course of each step; `marks` are events at their place, from 0 to 1."""
    courses = []
    for step in trace.steps:
        operations = trace.operations[step.first : step.end]
        size = max(1, -(-len(operations) // MAX_BINS))
        phases, formats = [], []
        for start in range(0, len(operations), size):
            part = operations[start : start + size]
            phases.append(Counter(str(one.call.phase) for one in part).most_common(1)[0][0])
            weights: Counter[str] = Counter()
            for one in part:
                weights[one.call.format or "other"] += one.call.nbytes + 1
            formats.append(weights.most_common(1)[0][0])
        length = max(1, step.end - step.first)
        marks = tuple(
            ((event.end - step.first) / length, event.name)
            for event in trace.events
            if event.name in _MARKED and step.first < event.end <= step.end and not event.facts.get("is_nested")
        )
        courses.append(StepCourse(index=step.index, phases=tuple(phases), formats=tuple(formats), marks=marks))
    return courses


def shares(work: FormatWork) -> Sequence[tuple[str, float]]:
    """Return the share of each format, by FLOPs where there are any, else by operations; largest first."""
    total = sum(one.flops for one in work.values())
    if total:
        found = [(dtype, one.flops / total) for dtype, one in work.items()]
    else:
        operations = sum(one.operations for one in work.values())
        found = [(dtype, one.operations / operations) for dtype, one in work.items() if operations]
    return sorted((one for one in found if one[1] > 0), key=lambda one: one[1], reverse=True)
