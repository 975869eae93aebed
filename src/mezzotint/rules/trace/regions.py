"""MZ25x: autocast regions that are too wide, too narrow, or in the wrong thread."""

from collections.abc import Iterator

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView, is_product
from mezzotint.trace.record import Kind, Operation, Phase


def _stale_cache(view: TraceView) -> Iterator[Finding]:
    """A product after an update that still reads the cast made before it."""
    for event in view.events("optimizer.step"):
        if event.facts["autocast"] is None or not event.facts["has_cache"]:
            continue
        end = next(
            (
                one.operation
                for one in view.events("autocast.exit")
                if one.thread == event.thread and one.operation >= event.end and one.facts["depth"] == 0
            ),
            len(view.trace.operations),
        )
        for operation in view.trace.operations[event.end : end]:
            if operation.call.phase is not Phase.FORWARD or not is_product(operation.call):
                continue
            cast = _weight_cast(view, operation)
            if cast is not None and cast.index < event.operation:
                yield view.finding(
                    STALE_CACHE.code,
                    Severity.ERROR,
                    f"{operation.call.name} after {event.facts['optimizer']}.step() still multiplies the weights from "
                    "before it: autocast keeps its cast of a weight until the outermost region ends",
                    operation=operation,
                    advice="enter autocast anew for each forward pass, or pass cache_enabled=False",
                    evidence={"step": event.facts["optimizer"], "cast_made_by_operation": cast.index},
                )
                return


def _weight_cast(view: TraceView, operation: Operation) -> Operation | None:
    """Return the cast of a weight that a product reads."""
    for one in view.ancestors(operation, through=lambda call: call.kind is Kind.VIEW, depth=6):
        if one.call.kind is Kind.CAST and any(producer < -1 for producer in one.producers):
            return one
    return None


def _backward_inside(view: TraceView) -> Iterator[Finding]:
    for event in view.events("backward"):
        if event.facts["autocast"] is not None and not event.facts["is_nested"]:
            yield view.finding(
                BACKWARD_INSIDE.code,
                Severity.WARNING,
                f"backward runs inside the {event.facts['autocast']} autocast region: hooks and Python backward "
                "functions are cast again, on the CPU, and torch.compile differs from eager",
                event=event,
                advice="end the autocast region before loss.backward()",
                evidence={"autocast": event.facts["autocast"]},
            )
            return


def _other_thread(view: TraceView) -> Iterator[Finding]:
    """Products of another thread in float32 while a region is open in the main one."""
    opened: list[tuple[int, int, str]] = []
    stack: list[tuple[int, str]] = []
    for event in view.events("autocast.enter", "autocast.exit"):
        if event.thread != 0:
            continue
        if event.name == "autocast.enter":
            stack.append((event.operation, str(event.facts["dtype"])))
        elif stack:
            first, dtype = stack.pop()
            if dtype != "None":
                opened.append((first, event.operation, dtype))
    if not opened:
        return
    for operation in view.trace.operations:
        call = operation.call
        if operation.thread == 0 or call.phase is not Phase.FORWARD or call.autocast is not None:
            continue
        if not is_product(call) or call.format != "float32":
            continue
        region = next((dtype for first, end, dtype in opened if first <= operation.index < end), None)
        if region is not None:
            yield view.finding(
                OTHER_THREAD.code,
                Severity.WARNING,
                f"{call.name} runs in float32 in another thread, although {region} autocast is on in the thread that "
                "started it: the state of autocast belongs to a thread",
                operation=operation,
                advice="decorate forward with @torch.autocast(...), or enter the region inside the thread",
                evidence={"autocast": region},
            )
            return


def _no_effect(view: TraceView) -> Iterator[Finding]:
    """A region in which nothing ran lower than outside."""
    for event in view.events("autocast.enter"):
        if event.facts["device"] == "cuda" and event.facts["dtype"] is None and not event.facts["in_backward"]:
            yield view.finding(
                NO_GPU.code,
                Severity.INFO,
                "autocast('cuda') switches itself off on a machine without CUDA: this run says nothing about the "
                "dtypes on a GPU",
                event=event,
                advice="make the device type follow the device: torch.autocast(device.type, ...)",
            )
            return


def _uncast(view: TraceView) -> Iterator[Finding]:
    """In-place and out= products, which autocast leaves alone."""
    for operation in view.first.values():
        call = operation.call
        if call.autocast is None or call.phase not in (Phase.FORWARD, Phase.OTHER) or not is_product(call):
            continue
        if call.is_in_place and call.format == "float32":
            yield view.finding(
                UNCAST.code,
                Severity.INFO,
                f"{call.name} writes into an existing tensor and therefore runs in float32 inside {call.autocast} "
                "autocast",
                operation=operation,
                advice="use the form that returns a new tensor",
            )
            return


STALE_CACHE = Rule(
    code="MZ251",
    name="stale-autocast-cache",
    summary="a forward pass uses weights from before the update",
    severity=Severity.ERROR,
    why="autocast casts each float32 weight once per outermost region; an update inside the region does not reach the "
    "cast. The loss stays exactly constant, or diverges.",
    bad="with torch.autocast('cuda'):\n    for batch in data: step(batch)",
    good="for batch in data:\n    with torch.autocast('cuda'): loss = f(batch)\n    update(loss)",
    fix="Enter autocast for each forward pass.",
    check=_stale_cache,
)
BACKWARD_INSIDE = Rule(
    code="MZ252",
    name="backward-inside-autocast",
    summary="backward runs inside an autocast region",
    severity=Severity.WARNING,
    why="Backward operations already run in the dtypes of forward; PyTorch advises against the region around them.",
    bad="with torch.autocast('cuda'):\n    loss = f(x)\n    loss.backward()",
    good="with torch.autocast('cuda'):\n    loss = f(x)\nloss.backward()",
    fix="End the region before backward.",
    sources=("https://pytorch.org/docs/stable/amp.html#torch.autocast",),
    check=_backward_inside,
)
OTHER_THREAD = Rule(
    code="MZ253",
    name="autocast-in-another-thread",
    summary="forward runs in a thread where autocast is off",
    severity=Severity.WARNING,
    why="torch.nn.DataParallel and hand-made threads start without the caller's autocast state.",
    bad="with torch.autocast('cuda'): Thread(target=model, args=(x,)).start()",
    good="@torch.autocast('cuda')\ndef forward(self, x): ...",
    fix="Enter autocast inside the thread.",
    check=_other_thread,
)
NO_GPU = Rule(
    code="MZ254",
    name="autocast-without-its-device",
    summary="autocast for a device that is not there",
    severity=Severity.INFO,
    why="torch.autocast('cuda') warns and does nothing without CUDA, so a dry run on a CPU runs in float32.",
    bad="with torch.autocast('cuda'): ...  # on a CPU",
    good="with torch.autocast(device.type): ...",
    fix="Let the device type follow the device.",
    check=_no_effect,
)
UNCAST = Rule(
    code="MZ255",
    name="in-place-product",
    summary="an in-place or out= product stays in float32",
    severity=Severity.INFO,
    why="autocast leaves operations alone that write into a given tensor.",
    bad="out.addmm_(a, b)",
    good="out = torch.addmm(out, a, b)",
    fix="Use the form that returns a new tensor.",
    check=_uncast,
)
RULES = (STALE_CACHE, BACKWARD_INSIDE, OTHER_THREAD, NO_GPU, UNCAST)
