"""MZ25x: autocast regions that are too wide, too narrow, or in the wrong thread."""

from collections.abc import Iterator

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView, is_product
from mezzotint.trace.places import user_line
from mezzotint.trace.record import Call, Event, Kind, Operation, Phase

# what autocast lowers on CPUs and on CUDA alike
_CASTABLE = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "linear", "mkldnn_linear"})
_SENSITIVE = frozenset(
    {"_softmax", "_log_softmax", "exp", "log", "log1p", "logsumexp", "pow", "sum", "cumsum", "prod", "rsqrt", "norm",
     "linalg_vector_norm", "nll_loss_forward", "mse_loss", "var", "var_mean", "std", "cdist", "_cdist_forward",
     "linalg_inv_ex", "linalg_cholesky_ex", "softplus", "reciprocal", "expm1"}
)  # fmt: skip


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


def _without_effect(view: TraceView) -> Iterator[Finding]:
    """Regions are open, and yet every product of the training runs in float32."""
    regions = [one for one in view.events("autocast.enter") if one.facts["dtype"] is not None]
    if not regions or any(
        one.facts["dtype"] is None and one.facts["depth"] > 1 for one in view.events("autocast.enter")
    ):
        return  # somebody switched it off for a part on purpose
    trained = [
        one
        for one in view.first.values()
        if one.call.phase in (Phase.FORWARD, Phase.RECOMPUTE)
        and one.call.name in _CASTABLE
        and not one.call.is_in_place
    ]
    wide = [one for one in trained if one.call.format == "float32" and _reads_weight(view, one)]
    if not wide or any(_is_low_product(one) for one in view.first.values()):
        return
    if not any(event.name == "backward" for event in view.trace.events):
        return
    inside = next((one for one in wide if one.call.autocast is not None), None)
    region = regions[0]
    reason = (
        f"inside the region: it is one for the device {region.facts['device']!r}"
        if inside is not None
        else "outside it: the region surrounds something else"
    )
    yield view.finding(
        WITHOUT_EFFECT.code,
        Severity.WARNING,
        f"the {region.facts['dtype']} autocast region has no effect: {(inside or wide[0]).call.name} of "
        f"{(inside or wide[0]).call.module or 'the program'} and every other product run in float32, {reason}",
        event=region,
        module=(inside or wide[0]).call.module,
        advice="open the region around the model's forward pass, with the device type of its tensors",
        evidence={"region_device": region.facts["device"], "products": len(wide)},
    )


def _is_low_product(operation: Operation) -> bool:
    return is_product(operation.call) and any(meta.is_low for meta in operation.call.inputs)


def _reads_weight(view: TraceView, operation: Operation) -> bool:
    """Whether a product multiplies a weight as it is stored."""
    if any(producer < -1 for producer in operation.producers):
        return True
    sources = view.ancestors(operation, through=lambda call: call.kind is Kind.VIEW, depth=3)
    return any(one.call.kind is Kind.VIEW and any(number < -1 for number in one.producers) for one in sources)


def _uncast_island(view: TraceView) -> Iterator[Finding]:
    """A region that switches autocast off, in which compact tensors are summed and exponentiated all the same."""
    stack: list[Event] = []
    islands: list[tuple[int, int, Event, str]] = []
    for event in view.events("autocast.enter", "autocast.exit"):
        if event.thread != 0 or event.facts.get("in_backward"):
            continue
        if event.name == "autocast.enter":
            stack.append(event)
        elif stack:
            entered = stack.pop()
            outer = next((one.facts["dtype"] for one in reversed(stack) if one.facts["dtype"] is not None), None)
            if entered.facts["dtype"] is None and outer is not None:
                islands.append((entered.operation, event.operation, entered, outer))
    seen: set[object] = set()
    for first, end, entered, outer in islands:
        if entered.site in seen:
            continue
        inside = view.trace.operations[first:end]
        found = next((one for one in inside if one.thread == 0 and _is_sensitive_and_low(one.call)), None)
        if found is None or any(
            one.call.kind is Kind.CAST and one.call.outputs[0].dtype == "float32" for one in inside
        ):
            continue  # somebody thinks of dtypes here: what stays compact is meant to
        if any(_reads_low_weight(view, one) for one in inside):
            continue  # a module that is compact itself: its dtype is what the island is for
        seen.add(entered.site)
        dtype = next(meta.dtype for meta in found.call.inputs if meta.is_low)
        yield view.finding(
            UNCAST_ISLAND.code,
            Severity.WARNING,
            f"autocast is switched off around {found.call.name}, which runs in {dtype} all the same: what the outer "
            f"{outer} region made stays {outer} until it is cast",
            operation=found,
            advice="cast what enters the island: x = x.float()",
            evidence={"island": _place_of(entered), "dtype": dtype},
        )


def _is_sensitive_and_low(call: Call) -> bool:
    return (
        call.name in _SENSITIVE
        and call.phase is Phase.FORWARD
        and bool(call.inputs)
        and call.inputs[0].is_low
        and call.outputs[0].is_low
    )


def _reads_low_weight(view: TraceView, operation: Operation) -> bool:
    metas = zip(operation.producers, operation.call.inputs, strict=False)
    return any(producer < -1 and meta.is_low for producer, meta in metas)


def _place_of(event: Event) -> str | None:
    frame = user_line(event.site)
    return f"{frame.path}:{frame.line}" if frame else None


def _two_formats(view: TraceView) -> Iterator[Finding]:
    """Products of one training in float16 and in bfloat16."""
    found: dict[str, Operation] = {}
    for operation in view.first.values():
        call = operation.call
        if call.phase is not Phase.FORWARD or not is_product(call) or call.format not in ("float16", "bfloat16"):
            continue
        if (call.module, call.site, call.format) in view.backward_places:
            found.setdefault(call.format, operation)
    if len(found) < 2:
        return
    regions = [
        one for one in view.events("autocast.enter") if one.facts["dtype"] in found and one.facts["is_default_dtype"]
    ]
    odd = found[regions[0].facts["dtype"]] if regions else list(found.values())[1]
    other = next(dtype for dtype in found if dtype != odd.call.format)
    yield view.finding(
        TWO_FORMATS.code,
        Severity.WARNING,
        f"{odd.call.name} of {odd.call.module or 'the program'} runs in {odd.call.format} and other products in "
        f"{other}"
        + (
            f": the region at {_place_of(regions[0])} names no dtype, and autocast's default is float16 on CUDA and "
            "bfloat16 on the CPU"
            if regions
            else ""
        ),
        operation=odd,
        advice="give every region the same dtype: torch.autocast(device, dtype=torch.get_autocast_dtype(device))",
        evidence={"formats": {dtype: one.call.module for dtype, one in found.items()}},
    )


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
WITHOUT_EFFECT = Rule(
    code="MZ256",
    name="region-without-effect",
    summary="an autocast region in which nothing is lowered",
    severity=Severity.WARNING,
    why="A region for another device, one that surrounds only the loss, or one around a generator that runs after it "
    "leaves every product in float32: no memory is saved and no time.",
    bad="out = model(x)\nwith torch.autocast('cuda'): loss = criterion(out, y)",
    good="with torch.autocast('cuda'):\n    out = model(x)\n    loss = criterion(out, y)",
    fix="Open the region around the model's forward pass, with the device type of its tensors.",
    check=_without_effect,
)
UNCAST_ISLAND = Rule(
    code="MZ257",
    name="island-without-a-cast",
    summary="autocast is switched off and its tensors stay compact",
    severity=Severity.WARNING,
    why="enabled=False stops casts and undoes none: a tensor that the outer region made in bfloat16 is computed with "
    "in bfloat16, without the float32 list that protects it outside.",
    bad="with torch.autocast('cuda', enabled=False):\n    p = torch.softmax(scores, -1)  # scores are bfloat16",
    good="with torch.autocast('cuda', enabled=False):\n    p = torch.softmax(scores.float(), -1)",
    fix="Cast what enters the island to float32.",
    sources=("https://pytorch.org/docs/stable/amp.html#torch.autocast",),
    check=_uncast_island,
)
TWO_FORMATS = Rule(
    code="MZ258",
    name="two-compact-formats",
    summary="one training runs products in float16 and in bfloat16",
    severity=Severity.WARNING,
    why="A region that was made without dtype runs in float16 on CUDA, in the middle of a bfloat16 one too: its range "
    "ends at 65504, and nobody scales the loss for it.",
    bad="amp = torch.autocast('cuda')  # float16\nwith torch.autocast('cuda', dtype=torch.bfloat16):\n"
    "    with amp: y = block(x)",
    good="with torch.autocast('cuda', dtype=torch.bfloat16): y = block(x)",
    fix="Give every region the same dtype.",
    sources=("https://github.com/pytorch/pytorch/issues/105682",),
    check=_two_formats,
)
RULES = (
    STALE_CACHE, BACKWARD_INSIDE, OTHER_THREAD, NO_GPU, UNCAST, WITHOUT_EFFECT, UNCAST_ISLAND, TWO_FORMATS,
)  # fmt: skip
