"""MZ20x: numbers in a format that is too coarse for what they mean: losses, log-probabilities, positions."""

from collections.abc import Iterator
from math import floor, log2

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView, is_product, is_relay, spec
from mezzotint.trace.record import Call, Kind, Operation, Phase

_FORWARD = (Phase.FORWARD, Phase.OTHER)
_COARSE_BITS = 10  # bfloat16 has 8 significant bits, float16 11
_INTEGERS = frozenset({"int64", "int32", "int16", "uint8", "int8"})
_COUNTED = frozenset({"arange", "cumsum", "nonzero", "linspace"})
_PROBABILITIES = frozenset({"_softmax", "softmax", "sigmoid", "_safe_softmax"})
_SQUARES = frozenset({"mul", "pow", "square", "mul_", "pow_"})
_COMPARED = frozenset({"ne", "eq", "gt", "ge", "lt", "le", "logical_not"})
_BCE = "binary_cross_entropy"
_ANGLE_ERROR = 0.05  # radians
_SHIFTED = frozenset({"add", "sub", "add_", "sub_", "rsub", "neg", "floor", "round", "remainder", "clamp", "minimum"})
_SUMMED = frozenset(
    {"sum", "mean", "neg", "mul", "div", "clamp", "clamp_min", "clamp_max", "where", "mul_", "div_", "cumsum"}
)
_TERMS = frozenset({"add", "sub", "add_", "sub_", "rsub"})
_REDUCTIONS = frozenset(
    {"sum", "mean", "norm", "linalg_vector_norm", "logsumexp", "prod", "amax", "amin", "max", "min", "var", "std",
     "dot", "vdot", "binary_cross_entropy", "dist"}
)  # fmt: skip
_LOGARITHMS = frozenset(
    {"_log_softmax", "log_softmax", "log", "logsumexp", "log_sigmoid_forward", "log1p", "nll_loss_forward"}
)


def _is_summed(call: Call) -> bool:
    """Whether a loss passes on its way: casts, views, sums and factors of single numbers."""
    is_single = bool(call.outputs) and all(meta.numel == 1 for meta in call.outputs)
    return is_single and (is_relay(call) or call.name in _SUMMED or call.name in _TERMS)


def _is_low_sum(call: Call) -> bool:
    """Whether a call makes one number of a tensor in low precision; an activation of one element is no sum."""
    return (
        bool(call.outputs)
        and bool(call.inputs)
        and call.outputs[0].shape == ()
        and call.outputs[0].is_low
        and (call.name in _REDUCTIONS or "loss" in call.name)
    )


def _spacing(dtype: str, magnitude: float) -> float:
    """Return the distance between neighbours of a format at a magnitude."""
    return spec(dtype).epsilon * 2.0 ** floor(log2(magnitude)) if magnitude > 0 else 0.0


def _amax(operation: Operation) -> float:
    return max((tally.amax for tally in operation.call.tallies if tally is not None), default=0.0)


def _low_loss(view: TraceView) -> Iterator[Finding]:
    """The scalar that backward starts from, or a sum on its way, was computed in a compact format."""
    seen: set[int] = set()
    for event in view.events("backward"):
        if event.facts["is_nested"] or not all(shape in ((), (1,)) for shape in event.facts["shapes"]):
            continue
        for maker in event.facts["makers"]:
            root = view.operation(maker)
            if root is None:
                continue
            chain = [root, *view.ancestors(root, through=_is_summed)]
            low = [one for one in chain if _is_low_sum(one.call)]
            if root.call.outputs and root.call.outputs[0].is_low and root.call.kind is not Kind.CAST:
                low = low or ([root] if not is_product(root.call) and root.call.kind is not Kind.VIEW else [])
            if not low or low[-1].call.index in seen:
                continue
            found = low[-1]
            seen.add(found.call.index)
            dtype = found.call.outputs[0].dtype
            bits = spec(dtype).significant_bits
            is_scaled = bool(event.facts["is_scaled"])
            limit = " and a loss scale of 65536 overflows it at once" if dtype == "float16" and is_scaled else ""
            yield view.finding(
                LOW_LOSS.code,
                Severity.WARNING,
                f"the loss is computed in {dtype} by {found.call.name}: it has {bits} significant bits, its gradient "
                f"starts in {dtype}{limit}",
                operation=found,
                advice="cast to float32 before the loss: criterion(logits.float(), target), or x.float().mean()",
                evidence={"dtype": dtype, "significant_bits": bits, "backward": _line(view, event.site)},
            )


def _line(view: TraceView, site: object) -> str | None:
    from mezzotint.trace.places import user_line

    frame = user_line(site)  # type: ignore[arg-type]
    return f"{frame.path}:{frame.line}" if frame else None


def _low_log_softmax(view: TraceView) -> Iterator[Finding]:
    """log_softmax in a coarse format."""
    for operation in view.calls("_log_softmax", "log_softmax", phases=_FORWARD):
        call = operation.call
        if not call.inputs[0].is_low or not call.outputs[0].is_low:
            continue
        dtype = call.outputs[0].dtype
        is_coarse = spec(dtype).significant_bits < _COARSE_BITS
        amax = _amax(operation)
        yield view.finding(
            LOW_LOG_SOFTMAX.code,
            Severity.WARNING if is_coarse and call.autocast is None else Severity.INFO,
            f"log_softmax runs in {dtype}: log-probabilities near {amax or 5:.3g} are "
            f"{_spacing(dtype, amax or 5):.2g} apart",
            operation=operation,
            advice="pass logits.float()"
            + ("; CUDA's autocast does not cast them for F.cross_entropy either" if call.autocast else ""),
            evidence={"dtype": dtype, "spacing": _spacing(dtype, amax or 5.0), "amax": amax or None},
        )


def _low_log(view: TraceView) -> Iterator[Finding]:
    """The logarithm of probabilities that were rounded."""
    seen: set[object] = set()
    for operation in view.calls("log", "log_", "log2", "log10", phases=_FORWARD):
        call = operation.call
        through = lambda call: is_relay(call) or call.name in ("add", "clamp", "clamp_min", "add_", "where", "mul")  # noqa: E731
        makers = [one for one in view.ancestors(operation, through=through, depth=8) if one.call.name in _PROBABILITIES]
        low = next((one for one in makers if one.call.outputs[0].is_low), None)
        if low is None or call.site in seen:
            continue
        seen.add(call.site)
        dtype = low.call.outputs[0].dtype
        is_coarse = spec(dtype).significant_bits < _COARSE_BITS
        yield view.finding(
            LOW_LOG_SOFTMAX.code,
            Severity.WARNING if is_coarse and low.call.autocast is None else Severity.INFO,
            f"{call.name} of probabilities that {low.call.name.lstrip('_')} made in {dtype}: each is off by up to "
            f"{spec(dtype).epsilon / 2:.2g} of itself, and small ones become 0",
            operation=operation,
            advice="use log_softmax (logsigmoid) on logits.float()",
            evidence={"dtype": dtype},
        )


def _low_normalized(view: TraceView) -> Iterator[Finding]:
    """log_softmax written out, logits minus their logsumexp, in a coarse format."""
    for operation in view.calls("sub", "sub_", phases=_FORWARD):
        call = operation.call
        if len(operation.producers) != 2 or not call.outputs[0].is_low or not call.inputs[1].is_low:
            continue
        subtracted = view.operation(operation.producers[1])
        dtype = call.outputs[0].dtype
        if subtracted is None or spec(dtype).significant_bits >= _COARSE_BITS:
            continue
        through = lambda call: is_relay(call) or call.name in ("add", "amax", "max")  # noqa: E731
        if not any(
            one.call.name in ("logsumexp", "log") and one.call.outputs[0].numel < call.outputs[0].numel
            for one in (subtracted, *view.ancestors(subtracted, through=through, depth=6))
        ):
            continue
        amax = _amax(operation)
        yield view.finding(
            LOW_LOG_SOFTMAX.code,
            Severity.WARNING,
            f"log-probabilities are made in {dtype}, as logits minus their logsumexp: near {amax or 5:.3g} they are "
            f"{_spacing(dtype, amax or 5):.2g} apart",
            operation=operation,
            advice="use logits.float()",
            evidence={"dtype": dtype, "spacing": _spacing(dtype, amax or 5.0), "amax": amax or None},
        )


def _low_log_probabilities(view: TraceView) -> Iterator[Finding]:
    yield from _low_log_softmax(view)
    yield from _low_normalized(view)
    yield from _low_log(view)


def _difference_of_squares(view: TraceView) -> Iterator[Finding]:
    """A variance as mean of squares minus square of mean, in a compact format."""
    for operation in view.calls("sub", "sub_", "rsub", phases=_FORWARD):
        call = operation.call
        if len(operation.producers) != 2 or not all(meta.is_low for meta in call.inputs):
            continue
        first, second = (view.operation(one) for one in operation.producers)
        if (
            first is None
            or second is None
            or not _is_mean_of_squares(view, first)
            or not _is_square_of_mean(view, second)
        ):
            continue
        dtype = call.outputs[0].dtype
        amax, result = _amax(first), _amax(operation)
        yield view.finding(
            DIFFERENCE_OF_SQUARES.code,
            Severity.WARNING,
            f"a variance is the difference of two {dtype} numbers"
            + (
                f" up to {amax:.3g}, which are {_spacing(dtype, amax):.2g} apart: it comes out as {result:.3g}"
                if amax
                else ""
            )
            + "; where the mean is larger than the deviation, nothing of it is left, and it can be negative",
            operation=operation,
            advice="compute it in float32, or as the mean of (x - mean) squared",
            evidence={"dtype": dtype, "mean_of_squares": amax or None, "difference": result or None},
        )
        return


def _is_mean_of_squares(view: TraceView, operation: Operation) -> bool:
    found = _through_views(view, operation)
    return found.call.name in ("mean", "sum") and any(
        one.call.name in _SQUARES for one in view.ancestors(found, through=is_relay, depth=3)
    )


def _is_square_of_mean(view: TraceView, operation: Operation) -> bool:
    found = _through_views(view, operation)
    return found.call.name in _SQUARES and any(
        one.call.name in ("mean", "sum") for one in view.ancestors(found, through=is_relay, depth=3)
    )


def _through_views(view: TraceView, operation: Operation) -> Operation:
    """Return what made the numbers that an operation hands on."""
    for _ in range(6):
        source = view.operation(operation.producers[0]) if operation.producers and is_relay(operation.call) else None
        if source is None:
            break
        operation = source
    return operation


def _low_ratio(view: TraceView) -> Iterator[Finding]:
    """exp of a difference of log-probabilities that were rounded."""
    for operation in view.calls("exp", "expm1", "exp2", phases=_FORWARD):
        through = lambda call: is_relay(call) or call.name in _SUMMED  # noqa: E731
        differences = [
            one
            for one in [operation, *view.ancestors(operation, through=through)]
            if one.call.name in ("sub", "sub_", "rsub") and len(one.call.inputs) == 2
        ]
        for difference in differences:
            low = [meta for meta in difference.call.inputs if meta.is_low and meta.numel > 1]
            if not low or not _has_logarithm(view, difference):
                continue
            dtype = low[0].dtype
            is_coarse = spec(dtype).significant_bits < _COARSE_BITS or len(low) == 2
            sources = [view.operation(one) for one in difference.producers]
            amax = max((_amax(one) for one in sources if one is not None), default=0.0) or 5.0
            yield view.finding(
                LOW_RATIO.code,
                Severity.WARNING if is_coarse else Severity.INFO,
                f"{operation.call.name} of a difference of log-probabilities held in {dtype}: near {amax:.3g} they are "
                f"{_spacing(dtype, amax):.2g} apart, which is the relative error of each ratio",
                operation=difference,
                advice="compute log-probabilities from logits.float() and keep stored ones in float32",
                evidence={"dtype": dtype, "spacing": _spacing(dtype, amax), "amax": amax},
            )
            break


def _has_logarithm(view: TraceView, operation: Operation) -> bool:
    through = lambda call: is_relay(call) or call.name in _SHIFTED  # noqa: E731
    return any(one.call.name in _LOGARITHMS for one in view.ancestors(operation, through=through))


def _collapsed_integers(view: TraceView) -> Iterator[Finding]:
    """Counted positions in a format that cannot tell them apart."""
    for operation in view.first.values():
        call = operation.call
        if not call.outputs or not call.outputs[0].is_low or call.phase in (Phase.BACKWARD, Phase.OPTIMIZER):
            continue
        dtype = call.outputs[0].dtype
        limit = 2.0 ** spec(dtype).significant_bits
        if call.name == "arange":
            if not all(float(number).is_integer() for number in operation.numbers):
                continue
            largest, is_counted = _amax(operation) or float(call.outputs[0].numel), True
        elif call.kind is Kind.CAST:
            largest = _amax(operation) or _bound(view, operation)
            is_counted = _is_counted(view, operation) or _becomes_index(view, operation)
            if call.inputs[0].dtype not in _INTEGERS and not is_counted:
                continue
        elif call.name == "cumsum":
            largest, is_counted = _amax(operation), True
            if not _is_whole(view, operation):
                continue
        else:
            continue
        if largest <= limit:
            continue
        spacing = _spacing(dtype, largest)
        yield view.finding(
            COLLAPSED_INTEGERS.code,
            Severity.WARNING if is_counted else Severity.INFO,
            f"positions or ids up to {largest:.0f} are held in {dtype}, which tells integers apart up to {limit:.0f} "
            f"only: near the end they are {spacing:.0f} apart",
            operation=operation,
            advice="keep positions in int64 or float32; where autocast casts them for a product, compute it under "
            "torch.autocast(device, enabled=False)",
            evidence={"dtype": dtype, "largest": largest, "exact_up_to": limit, "spacing": spacing},
        )


def _bound(view: TraceView, operation: Operation) -> float:
    """Return how far the positions count that an operation hands on, where nothing was measured; 0 if unknown."""
    for one in view.ancestors(operation, through=is_relay, depth=10):
        if one.call.name == "arange" and one.numbers:
            return max(abs(float(number)) for number in one.numbers[:2]) - 1
    return 0.0


def _becomes_index(view: TraceView, operation: Operation) -> bool:
    """Whether what a cast rounded is made whole numbers again: ids, positions."""
    if operation.call.inputs[0].dtype not in _INTEGERS:
        return False
    level = [operation.index]
    for _ in range(6):
        following: list[int] = []
        for index in level:
            for use in view.consumers.get(index, ()):
                found = view.operation(use)
                if found is None:
                    continue
                if found.call.kind is Kind.CAST and found.call.outputs[0].dtype in _INTEGERS:
                    return True
                if is_relay(found.call) or found.call.name in _SHIFTED:
                    following.append(use)
        level = following
    return False


def _is_whole(view: TraceView, operation: Operation) -> bool:
    """Whether a running sum adds whole numbers: ones, a mask."""
    makers = view.ancestors(operation, through=is_relay, depth=8)
    return any(
        one.call.name in ("ones", "ones_like", "new_ones", *_COMPARED)
        or (one.call.kind is Kind.CAST and one.call.inputs[0].dtype in (*_INTEGERS, "bool"))
        for one in makers
    )


def _is_counted(view: TraceView, operation: Operation) -> bool:
    """Whether the numbers come from counting, unchanged but for casts, views and shifts."""
    through = lambda call: is_relay(call) or call.name in _SHIFTED  # noqa: E731
    return any(one.call.name in _COUNTED for one in view.ancestors(operation, through=through))


def _coarse_angles(view: TraceView) -> Iterator[Finding]:
    """Sine or cosine of positions times frequencies, in a coarse format."""
    for operation in view.calls("sin", "cos", "sin_", "cos_", phases=(*_FORWARD, Phase.RECOMPUTE)):
        call = operation.call
        if not call.inputs[0].is_low:
            continue
        through = lambda call: is_relay(call) or call.name in (*_SHIFTED, "mul", "outer", "div") or is_product(call)  # noqa: E731
        sources = list(view.ancestors(operation, through=through))
        if not any(one.call.name in _COUNTED or _is_from_integers(one.call) for one in sources):
            continue
        amax = max((_amax(one) for one in sources[:1]), default=0.0)
        dtype = call.inputs[0].dtype
        error = _spacing(dtype, amax) / 2
        if error < _ANGLE_ERROR:
            continue
        yield view.finding(
            COARSE_ANGLES.code,
            Severity.WARNING,
            f"{call.name} of angles held in {dtype}: angles up to {amax:.4g} are off by up to {error:.2g} radians",
            operation=operation,
            advice="compute positions, frequencies and angles in float32 and cast the sine and cosine",
            evidence={"dtype": dtype, "largest_angle": amax, "error_radians": error},
        )


def _is_from_integers(call: Call) -> bool:
    """Whether a call makes floating-point numbers of integers: drawn timesteps, ids."""
    return call.kind is Kind.CAST and bool(call.inputs) and call.inputs[-1].dtype in _INTEGERS


def _unsafe_bce(view: TraceView) -> Iterator[Finding]:
    """Binary cross-entropy on probabilities that were rounded."""
    for event in view.events("error"):
        is_refused = event.facts["error_class"] == "RuntimeError" and _BCE in (
            event.facts["raised_in"],
            event.facts["called"],
        )
        if is_refused and any(one.facts["dtype"] is not None for one in view.events("autocast.enter")):
            yield view.finding(
                UNSAFE_BCE.code,
                Severity.ERROR,
                "binary cross-entropy on probabilities is refused inside CUDA's autocast: a rounded sigmoid is "
                "exactly 0 or 1 too early",
                event=event,
                advice="return logits and use binary_cross_entropy_with_logits (BCEWithLogitsLoss)",
                evidence={"error": event.facts["error"]},
            )
            return
    for operation in view.calls("binary_cross_entropy", phases=_FORWARD):
        sources = view.ancestors(operation, through=is_relay)
        is_rounded = any(one.call.name == "sigmoid" and one.call.outputs[0].is_low for one in sources)
        autocast = operation.call.autocast
        if not is_rounded and autocast is None:
            continue
        yield view.finding(
            UNSAFE_BCE.code,
            Severity.WARNING,
            "binary cross-entropy on probabilities "
            + (
                "inside autocast, which CUDA refuses with a RuntimeError"
                if autocast
                else "that a compact format rounded"
            )
            + ": a rounded sigmoid is exactly 0 or 1 too early",
            operation=operation,
            advice="return logits and use binary_cross_entropy_with_logits (BCEWithLogitsLoss)",
            evidence={"autocast": autocast},
        )


def _other_recompute(view: TraceView) -> Iterator[Finding]:
    """A recomputed forward in another format than the first."""
    forward: dict[str, set[str]] = {}
    for operation in view.first.values():
        if operation.call.phase is Phase.FORWARD and is_product(operation.call) and operation.call.format:
            forward.setdefault(operation.call.module, set()).add(operation.call.format)
    seen: set[str] = set()
    for operation in view.first.values():
        call = operation.call
        if call.phase is not Phase.RECOMPUTE or not is_product(call) or call.format is None or call.module in seen:
            continue
        before = forward.get(call.module)
        if before is None or call.format in before:
            continue
        seen.add(call.module)
        yield view.finding(
            OTHER_RECOMPUTE.code,
            Severity.WARNING,
            f"{call.module or call.name} ran in {' and '.join(sorted(before))} and is recomputed in {call.format} for "
            "backward: the gradient belongs to another function",
            operation=operation,
            advice="recompute under torch.autocast with the dtype of the forward pass: "
            "torch.get_autocast_dtype(device_type); torch.utils.checkpoint does that",
            evidence={"forward": sorted(before), "recompute": call.format},
        )


LOW_LOSS = Rule(
    code="MZ201",
    name="low-precision-loss",
    summary="the loss is computed in a compact format",
    severity=Severity.WARNING,
    why="The loss is a sum over the batch and the start of every gradient. bfloat16 keeps 2 to 3 digits of it, and a "
    "float16 loss cannot take the usual initial scale of 65536.",
    bad="loss = F.cross_entropy(model_bf16(x), y)",
    good="loss = F.cross_entropy(model_bf16(x).float(), y)",
    fix="Cast what goes into the loss to float32.",
    sources=("https://arxiv.org/abs/1710.03740",),
    check=_low_loss,
)
LOW_LOG_SOFTMAX = Rule(
    code="MZ202",
    name="low-precision-log-softmax",
    summary="log_softmax runs in a compact format",
    severity=Severity.WARNING,
    why="Log-probabilities of -5 to -20 have neighbours 0.03 to 0.13 apart in bfloat16. On CUDA, F.cross_entropy calls "
    "log_softmax with an explicit dtype, which exempts it from autocast's float32 list.",
    bad="logp = torch.log_softmax(logits_bf16, -1)",
    good="logp = torch.log_softmax(logits_bf16.float(), -1)",
    fix="Cast the logits to float32.",
    check=_low_log_probabilities,
)
LOW_RATIO = Rule(
    code="MZ203",
    name="low-precision-ratio",
    summary="a probability ratio is made of rounded log-probabilities",
    severity=Severity.WARNING,
    why="exp(a - b) turns the absolute error of log-probabilities into the relative error of the ratio; over a "
    "sequence the errors multiply.",
    bad="ratio = (logp_bf16 - old_logp_bf16).exp()",
    good="ratio = (logp_fp32 - old_logp_fp32).exp()",
    fix="Keep log-probabilities in float32, stored ones too.",
    check=_low_ratio,
)
COLLAPSED_INTEGERS = Rule(
    code="MZ204",
    name="collapsed-positions",
    summary="positions in a format that cannot count that far",
    severity=Severity.WARNING,
    why="bfloat16 counts to 256 and float16 to 2048; beyond, neighbouring positions become equal.",
    bad="t = torch.arange(4096, dtype=torch.bfloat16)",
    good="t = torch.arange(4096)",
    fix="Keep positions in int64 or float32, and out of products under autocast.",
    check=_collapsed_integers,
)
COARSE_ANGLES = Rule(
    code="MZ205",
    name="coarse-angles",
    summary="sine and cosine of angles held in a compact format",
    severity=Severity.WARNING,
    why="An angle of 500 in bfloat16 is off by up to 1 radian: the embedding of far positions is noise.",
    bad="angles = torch.outer(t.to(torch.bfloat16), inv_freq.to(torch.bfloat16)); cos = angles.cos()",
    good="angles = torch.outer(t.float(), inv_freq.float()); cos = angles.cos().to(x.dtype)",
    fix="Compute angles in float32 and cast their sine and cosine.",
    check=_coarse_angles,
)
UNSAFE_BCE = Rule(
    code="MZ206",
    name="bce-on-probabilities",
    summary="binary cross-entropy on probabilities under autocast",
    severity=Severity.WARNING,
    why="A sigmoid in a compact format reaches exactly 0 or 1, where the gradient vanishes; CUDA's autocast raises.",
    bad="with autocast: loss = nn.BCELoss()(torch.sigmoid(logits), y)",
    good="with autocast: loss = nn.BCEWithLogitsLoss()(logits, y)",
    fix="Use the loss that takes logits.",
    check=_unsafe_bce,
)
OTHER_RECOMPUTE = Rule(
    code="MZ207",
    name="recompute-in-another-format",
    summary="activation checkpointing recomputes in another format",
    severity=Severity.WARNING,
    why="autocast's default dtype is float16 on CUDA and bfloat16 on CPUs: a recompute that stores only that autocast "
    "was on runs another function than the forward pass did.",
    bad="with torch.autocast('cuda', enabled=ctx.amp_on): out = ctx.fn(x)",
    good="with torch.autocast('cuda', dtype=ctx.amp_dtype, enabled=ctx.amp_on): out = ctx.fn(x)",
    fix="Store torch.get_autocast_dtype() in forward and pass it on.",
    check=_other_recompute,
)
DIFFERENCE_OF_SQUARES = Rule(
    code="MZ208",
    name="variance-by-difference",
    summary="a variance is the difference of two compact numbers",
    severity=Severity.WARNING,
    why="The mean of squares and the square of the mean share their leading digits, and a compact format has only two "
    "or three: where the mean is larger than the deviation, the difference is rounding.",
    bad="var = (x * x).mean(-1) - x.mean(-1) ** 2  # x is bfloat16",
    good="x = x.float()\nvar = (x - x.mean(-1, keepdim=True)).square().mean(-1)",
    fix="Compute it in float32, or from deviations.",
    check=_difference_of_squares,
)
RULES = (
    LOW_LOSS, LOW_LOG_SOFTMAX, LOW_RATIO, COLLAPSED_INTEGERS, COARSE_ANGLES, UNSAFE_BCE, OTHER_RECOMPUTE,
    DIFFERENCE_OF_SQUARES,
)  # fmt: skip
