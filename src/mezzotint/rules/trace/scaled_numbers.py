"""MZ239: numbers read from gradients that still carry the loss scale."""

from collections.abc import Iterator
from linecache import getline
from math import isclose

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule
from mezzotint.rules.trace.view import TraceView, is_relay
from mezzotint.trace.record import Kind, Operation, Phase

_READ = "_local_scalar_dense"
_KEEPS = frozenset(
    {"linalg_vector_norm", "norm", "_foreach_norm", "abs", "_foreach_abs", "sum", "mean", "max", "min", "amax", "amin",
     "_foreach_max", "std", "var_mean", "median", "neg", "add", "sub", "add_", "maximum", "minimum"}
)  # fmt: skip
_MULTIPLIES = frozenset({"mul", "mul_", "_foreach_mul", "_foreach_mul_"})
_DIVIDES = frozenset({"div", "div_", "_foreach_div", "_foreach_div_"})
_MAX_DEPTH = 40
_TOLERANCE = 0.01  # between a number by which the program divides and the loss scale
_TESTS = ("isfinite", "isnan", "isinf")


class _Powers:
    """The power of the loss scale that each result of a step carries; None where it is not known."""

    def __init__(self, view: TraceView) -> None:
        self._view = view
        self._reads = set(view.trace.scaled_reads)
        self._known: dict[int, float | None] = {}

    def of(self, index: int, scale: float | None, depth: int = _MAX_DEPTH) -> float | None:
        """Return the power of the scale in what an operation made."""
        operation = self._view.operation(index)
        if operation is None or not depth:
            return None
        if index not in self._known:
            self._known[index] = self._computed(operation, scale, depth)
        return self._known[index]

    def _computed(self, operation: Operation, scale: float | None, depth: int) -> float | None:
        call = operation.call
        if call.kind is Kind.MAKE:
            return 0.0
        if call.phase is Phase.FORWARD or call.phase is Phase.OPTIMIZER:
            return 0.0 if call.phase is Phase.FORWARD else None
        is_read = operation.index in self._reads
        powers = [self._of_input(one, is_read=is_read, scale=scale, depth=depth - 1) for one in operation.producers]
        if not powers or any(one is None for one in powers):
            return None
        known = [one for one in powers if one is not None]
        if call.name in _MULTIPLIES or call.name in _DIVIDES:
            sign = 1.0 if call.name in _MULTIPLIES else -1.0
            if not operation.numbers:
                return known[0] + sign * known[1] if len(known) == 2 else None
            factor = abs(operation.numbers[0]) or 1.0
            by = factor if sign < 0 else 1.0 / factor
            return known[0] - 1.0 if scale and isclose(by, scale, rel_tol=_TOLERANCE) else known[0]
        if call.name in ("square", "dot"):
            return 2.0 * known[0]
        if call.name == "pow":
            return known[0] * operation.numbers[0] if operation.numbers else None
        if call.name in ("sqrt", "sqrt_"):
            return known[0] / 2.0
        return max(known) if call.name in _KEEPS or is_relay(call) else None

    def _of_input(self, producer: int, *, is_read: bool, scale: float | None, depth: int) -> float | None:
        found = self._view.operation(producer)
        if found is not None and found.call.phase is Phase.BACKWARD:
            return 1.0 if is_read else 0.0
        return 0.0 if producer < -1 else self.of(producer, scale, depth)


def _scaled_numbers(view: TraceView) -> Iterator[Finding]:
    if not view.trace.scaled_reads:
        return
    powers = _Powers(view)
    scales = [(one.operation, one.facts.get("scale")) for one in view.events("scaler.scale")]
    asked = {one.step for one in view.events("scaler.get_scale")}
    seen: set[object] = set()
    for operation in view.trace.operations:
        call = operation.call
        if call.name != _READ or call.phase is not Phase.OTHER or call.site in seen or not call.inputs[0].is_floating:
            continue
        scale = next((one for first, one in reversed(scales) if first <= operation.index), None)
        power = powers.of(operation.producers[0], scale)
        if not power or power < 0 or _is_test(operation):
            continue
        seen.add(call.site)
        factor = f"{scale**power:g}" if scale else "the loss scale" if power == 1 else f"(loss scale)^{power:g}"
        yield view.finding(
            SCALED_NUMBER.code,
            Severity.INFO if operation.step in asked else Severity.WARNING,  # the program may divide what it reads
            f"a number is read from gradients that are still multiplied by the loss scale: it is too large by "
            f"a factor of {factor}",
            operation=operation,
            advice="call scaler.unscale_(optimizer) first, or divide the number by scaler.get_scale()",
            evidence={"scale": scale, "power": power},
        )


def _is_test(operation: Operation) -> bool:
    """Whether the line only asks whether the number is finite."""
    line = operation.call.line
    return line is not None and any(word in getline(line.path, line.line) for word in _TESTS)


SCALED_NUMBER = Rule(
    code="MZ239",
    name="number-from-scaled-gradients",
    summary="a number is read from gradients that still carry the loss scale",
    severity=Severity.WARNING,
    why="A logged gradient norm, or a learning rate that follows it, is too large by the loss scale, up to 65536 "
    "times, and jumps whenever the scale changes.",
    bad="scaler.scale(loss).backward()\nlog(norm=model.weight.grad.norm().item())",
    good="scaler.scale(loss).backward()\nscaler.unscale_(optimizer)\nlog(norm=model.weight.grad.norm().item())",
    fix="Unscale before gradients are measured.",
    sources=("https://pytorch.org/docs/stable/notes/amp_examples.html",),
    check=_scaled_numbers,
)
RULES = (SCALED_NUMBER,)
