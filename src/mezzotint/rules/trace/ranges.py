"""MZ21x: numbers beyond a format's range: overflow, constants that vanish, gradients that do."""

from collections.abc import Iterator

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView, is_relay, spec
from mezzotint.trace.record import Birth, Kind, Operation, Phase

_TAKES_CONSTANT = frozenset(
    {"clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "add", "add_", "sub", "sub_", "rsub",
     "full", "full_like", "new_full", "fill_", "fill", "masked_fill", "masked_fill_", "threshold", "maximum", "where",
     "_foreach_add_", "scalar_tensor"}
)  # fmt: skip
_STORES = frozenset({"full", "full_like", "new_full", "fill_", "scalar_tensor"})
_MASKS = frozenset({"masked_fill", "masked_fill_", "where", "full", "full_like", "new_full", "fill_", "mul", "rsub"})
_ALMOST_ONE = 0.9


def _overflow(view: TraceView) -> Iterator[Finding]:
    """An operation made infinities or NaN out of finite numbers, and float32 would not have."""
    for birth in view.trace.births:
        operation = view.operation(birth.operation)
        if operation is None:
            continue
        call = operation.call
        low = next((meta.dtype for meta in call.outputs if meta.is_low), None)
        if birth.wide == "not finite":
            severity, code = Severity.INFO, BORN_IN_FLOAT32.code
            rounded = next((meta.dtype for meta in call.inputs if meta.is_low), None)
            reason = (
                f"float32 would too, with the same {rounded} inputs: they may have been rounded to 0 or 1 before"
                if rounded
                else "and would in float32 too: it is no matter of the format"
            )
        elif low is None:
            continue
        else:
            code = OVERFLOW.code
            is_search = call.phase in (Phase.BACKWARD, Phase.OPTIMIZER) and _is_search(view, birth, low)
            severity = Severity.INFO if is_search else Severity.ERROR if birth.wide == "finite" else Severity.WARNING
            limit = spec(low).max
            reason = (
                f"the largest magnitude in float32 is {birth.wide_amax:.4g}, {low} ends at {limit:.6g}"
                if birth.wide == "finite" and birth.wide_amax is not None
                else f"{low} ends at {limit:.6g}"
            )
            if is_search:
                reason += "; the gradient scaler skips such steps while it searches its scale"
        what = " and ".join(
            f"{number} {name}" for number, name in ((birth.infinities, "infinities"), (birth.nans, "NaN")) if number
        )
        yield view.finding(
            code,
            severity,
            f"{call.name} makes {what} out of finite numbers; {reason}",
            operation=operation,
            advice=_advice(view, operation) if code == OVERFLOW.code else None,
            evidence={
                "inputs": [
                    {"dtype": dtype, "smallest": smallest, "amax": amax} for dtype, smallest, amax in birth.inputs
                ],
                "in_float32": birth.wide,
                "amax_in_float32": birth.wide_amax,
                "step": operation.step,
            },
        )


def _is_search(view: TraceView, birth: Birth, dtype: str) -> bool:
    """Whether a smaller loss scale would have kept these gradients within the format: a scaler finds it."""
    scales = [one.facts for one in view.events("scaler.scale") if one.operation <= birth.operation]
    if not scales or not scales[-1]["is_enabled"]:
        return False
    backward = [one for one in view.events("backward") if one.operation <= birth.operation]
    if backward and not backward[-1].facts["is_scaled"]:
        return False
    scale = scales[-1]["scale"]
    return scale is None or birth.wide_amax is None or birth.wide_amax <= spec(dtype).max * scale


def _advice(view: TraceView, operation: Operation) -> str:
    if operation.call.kind is Kind.CAST and any(
        one.call.name in _MASKS for one in view.ancestors(operation, through=is_relay, depth=8)
    ):
        dtype = operation.call.outputs[0].dtype
        return (
            "use a boolean mask, or fill it with the lowest number of its own dtype: "
            f"torch.finfo(mask.dtype).min with a mask that is {dtype} from the start"
        )
    return "cast its input to float32, or keep the module in float32: keep=..."


def _lost_constants(view: TraceView) -> Iterator[Finding]:
    """A constant that becomes 0 or infinity in the format of the tensor that it is used with."""
    for operation in view.calls(*_TAKES_CONSTANT):
        yield from _constants_of(view, operation)


def _constants_of(view: TraceView, operation: Operation) -> Iterator[Finding]:
    call = operation.call
    metas = [meta for meta in (*call.outputs, *call.inputs) if meta.is_floating]
    if not metas or not metas[0].is_low:
        return
    fmt = spec(metas[0].dtype)
    for number in operation.numbers:
        magnitude = abs(number)
        if 0 < magnitude <= fmt.smallest_subnormal / 2:
            yield view.finding(
                LOST_CONSTANT.code,
                Severity.WARNING,
                f"{call.name} uses the constant {number:g}, which is 0 in {fmt.name} (its smallest number is "
                f"{fmt.smallest_subnormal:.2g}): a guard against division by 0 is gone",
                operation=operation,
                advice=f"compute in float32, or pass a constant of at least {fmt.smallest_normal:.1g}",
                evidence={"constant": number, "dtype": fmt.name, "smallest": fmt.smallest_subnormal},
            )
        elif call.name in _STORES and _ALMOST_ONE < magnitude < 1 and 1 - magnitude <= fmt.epsilon / 4:
            yield view.finding(
                LOST_CONSTANT.code,
                Severity.WARNING,
                f"{call.name} stores the constant {number:g}, which is 1 in {fmt.name}: as a decay it keeps "
                "everything, and 1 minus it is 0",
                operation=operation,
                advice="keep it a Python number, or in float32",
                evidence={"constant": number, "dtype": fmt.name, "below_one": 1 - fmt.epsilon / 2},
            )
        elif fmt.max * (1 + fmt.epsilon / 4) <= magnitude < float("inf"):
            yield view.finding(
                LOST_CONSTANT.code,
                Severity.ERROR,
                f"{call.name} uses the constant {number:g}, beyond {fmt.name}'s largest number, {fmt.max:g}",
                operation=operation,
                advice="use torch.finfo(x.dtype).min for masks, or a boolean mask with scaled_dot_product_attention",
                evidence={"constant": number, "dtype": fmt.name, "largest": fmt.max, "error": operation.error},
            )


def _weak_gradients(view: TraceView) -> Iterator[Finding]:
    """Gradients that are mostly subnormal in float16."""
    worst: tuple[float, Operation] | None = None
    for operation in view.first.values():
        call = operation.call
        if call.phase is not Phase.BACKWARD:
            continue
        for tally in call.tallies:
            if tally is None or tally.dtype != "float16" or tally.count - tally.zeros < 16:
                continue
            fmt = spec("float16")
            below = sum(tally.exponents[: fmt.min_exponent + 127]) - tally.zeros
            share = below / (tally.count - tally.zeros)
            if share > 0.5 and (worst is None or share > worst[0]):
                worst = share, operation
    if worst is not None:
        share, operation = worst
        yield view.finding(
            WEAK_GRADIENTS.code,
            Severity.INFO,
            f"{share:.0%} of this gradient's numbers other than 0 are subnormal in float16 (below 6.1e-05): they keep "
            "fewer than 11 bits, and smaller ones become 0",
            operation=operation,
            advice="a larger loss scale lifts them; torch.amp.GradScaler finds it",
            evidence={"share_subnormal": share},
        )


OVERFLOW = Rule(
    code="MZ211",
    name="overflow",
    summary="an operation leaves the range of its format",
    severity=Severity.ERROR,
    why="float16 ends at 65504: squares of 256, sums of 65505 ones and exp(11.1) are infinite. What follows is NaN, or "
    "silently 0, as in 1 / infinity.",
    bad="ms = (h * h).mean(-1)  # h float16, 300 somewhere",
    good="ms = (h.float() * h.float()).mean(-1)",
    fix="Compute this operation in float32.",
    check=_overflow,
)
BORN_IN_FLOAT32: Rule[TraceView] = Rule(
    code="MZ212",
    name="not-finite-in-float32",
    summary="an operation makes infinities or NaN that float32 would make too",
    severity=Severity.INFO,
    why="log(0), 0/0 and the softmax of a row that is masked whole are no matter of the format.",
    bad="torch.log(p)  # p is 0",
    good="torch.log(p.clamp_min(1e-6))",
    fix="Look at the values: no format helps here.",
    check=lambda view: (),  # the check of MZ211 finds both
)
LOST_CONSTANT = Rule(
    code="MZ213",
    name="lost-constant",
    summary="a constant that the format cannot hold",
    severity=Severity.WARNING,
    why="1e-8 and 1e-12 are 0 in float16, so an epsilon no longer guards a division; -1e9 is beyond its range.",
    bad="F.normalize(x_fp16)  # eps=1e-12",
    good="F.normalize(x_fp16.float())",
    fix="Compute in float32, or use a constant that the format has (torch.finfo).",
    check=_lost_constants,
)
WEAK_GRADIENTS = Rule(
    code="MZ214",
    name="subnormal-gradients",
    summary="gradients are mostly subnormal in float16",
    severity=Severity.INFO,
    why="Below 2^-14 float16 loses a bit with each halving, below 2^-25 everything.",
    bad="loss.backward()  # float16, no scaling",
    good="scaler.scale(loss).backward()",
    fix="Scale the loss, or use bfloat16.",
    sources=("https://arxiv.org/abs/1710.03740",),
    check=_weak_gradients,
)
RULES = (OVERFLOW, BORN_IN_FLOAT32, LOST_CONSTANT, WEAK_GRADIENTS)
