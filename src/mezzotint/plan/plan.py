"""A plan: memory and time of a program's step on one card in one precision, with the reasons and the advice."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mezzotint.plan.costs import Work
from mezzotint.plan.held import kept_activation, uncast_gradients
from mezzotint.plan.memory import ACTIVATIONS, CAST_CACHE, MIB, TEMPORARIES, MemoryPlan, plan_memory
from mezzotint.plan.precision import Precision
from mezzotint.plan.recording import GhostRun
from mezzotint.plan.roofline import TimePlan, plan_time

_TILE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One cell of the table: a card and a precision. `items` are tokens or samples in a step, None if unknown."""

    run: GhostRun
    precision: Precision
    memory: MemoryPlan
    time: TimePlan
    items: int | None
    unit: str

    @property
    def items_per_second(self) -> float | None:
        """Tokens or samples per second."""
        return self.items / self.time.seconds if self.items and self.time.seconds else None

    @property
    def utilisation(self) -> float | None:
        """The model FLOPs utilisation against the peak of the precision's format."""
        return self.time.utilisation(self.run.spec, self.products_format)

    @property
    def products_format(self) -> str:
        """The format that most FLOPs of products ran in."""
        if self.precision.has_fp8:
            return "float8_e4m3fn"
        formats: Counter[str] = Counter()
        for one in self.time.calls:
            if one.cost.work in (Work.PRODUCT, Work.CONVOLUTION, Work.ATTENTION):
                formats[one.cost.format] += one.cost.flops * one.count
        name = formats.most_common(1)[0][0] if formats else "float32"
        return "tfloat32" if name == "float32" and self.run.has_tf32_products else name

    def price_per_million(self, per_hour: float) -> float | None:
        """Return the cost of a million items at a price for an hour of the card."""
        rate = self.items_per_second
        return per_hour / 3600 / rate * 1e6 if rate else None


def make_plan(run: GhostRun, precision: Precision, *, items: int | None = None, unit: str = "") -> Plan:
    """Plan the last whole step of a run."""
    found, kind = (items, unit) if items else items_of(run)
    return Plan(
        run=run,
        precision=precision,
        memory=plan_memory(run),
        time=plan_time(run, has_fp8=precision.has_fp8),
        items=found,
        unit=kind,
    )


def items_of(run: GhostRun) -> tuple[int | None, str]:
    """Return how many tokens or samples a step takes: lookups in the largest table, else the first product's batch.

    Tables of positions are smaller, and those of relative ones are asked for every pair.
    """
    step = run.trace.steps[-1] if run.trace.steps else None
    operations = run.trace.operations[step.first : step.end] if step is not None else run.trace.operations
    tokens: Counter[tuple[int, str]] = Counter()
    for one in operations:
        if one.call.name == "embedding" and one.call.phase == "forward" and len(one.call.inputs) > 1:
            tokens[one.call.inputs[0].numel, one.call.module] += one.call.inputs[1].numel
    if tokens:
        largest = max(table for table, _ in tokens)
        return max(count for (table, _), count in tokens.items() if table == largest), "tokens"
    for one in operations:
        if one.call.name in ("convolution", "addmm", "mm", "bmm") and one.call.phase == "forward":
            total = sum(
                other.call.inputs[0 if other.call.name != "addmm" else 1].shape[0]
                for other in operations
                if other.call.index == one.call.index
            )
            return total, "samples"
    return None, ""


EMULATED = (
    "bfloat16 is emulated on this GPU: matmuls take about twice float16's time; use float16 with a GradScaler "
    "(torch.cuda.is_bf16_supported(including_emulation=False) is False here)"
)


def emulates_bfloat16(run: GhostRun) -> bool:
    """Whether a program computed matmuls in bfloat16 on a GPU older than Ampere, which emulates it."""
    if (run.spec.compute_capability or (8, 0)) >= (8, 0):
        return False
    return any(one.call.flops and one.call.format == "bfloat16" for one in run.trace.operations)


def reasons(plans: Sequence[Plan]) -> list[str]:
    """Say why mixed precision pays here or does not: the shares of the step that it can change."""
    best = next((one for one in plans if one.precision.name in ("bf16", "fp16", "as written")), None)
    base = next((one for one in plans if one.precision.name in ("tf32", "float32")), None)
    if best is None or best is base:
        return []
    lines = []
    works = best.time.works
    product = sum(
        works.get(str(work), 0.0) for work in (Work.PRODUCT, Work.CONVOLUTION, Work.ATTENTION, Work.RECURRENT)
    )
    lines.append(
        f"{product:.0%} of the GPU's time are products, {works.get('cast', 0.0):.0%} casts, "
        f"{works.get('bytes', 0.0):.0%} other operations that only move bytes"
    )
    if best.time.is_host_bound:
        lines.append(
            f"the GPU waits for the host: {best.time.num_launches} launches take about {best.time.host * 1e3:.2g} ms "
            f"to issue, the GPU needs {best.time.gpu * 1e3:.2g} ms; a larger batch or torch.compile helps more"
        )
    if emulates_bfloat16(best.run):
        lines.append(EMULATED)
    if base is not None and base.precision.name != best.precision.name:
        lines.extend(_why_more_memory(best, base))
    if base is not None:
        ratio = best.time.gpu / base.time.gpu if base.time.gpu else 1.0
        lines.append(f"{best.precision.name} needs {ratio:.2f} of the GPU time of {base.precision.name}")
    return lines


def _why_more_memory(best: Plan, base: Plan) -> list[str]:
    """Say by how much low precision needs more memory, and what of it is larger at the peak; nothing if it does not."""
    more = best.memory.peak_allocated - base.memory.peak_allocated
    if more <= base.memory.peak_allocated // 100:
        return []
    grown = {role: best.memory.at_peak.get(role, 0) - base.memory.at_peak.get(role, 0) for role in best.memory.at_peak}
    role = max(grown, key=lambda one: grown[one])
    now, then = best.memory.at_peak[role], base.memory.at_peak.get(role, 0)
    gradients = uncast_gradients(best.run, best.memory)
    if role == CAST_CACHE:
        saved = -min(0, grown.get(ACTIVATIONS, 0))
        why = (
            f"low-precision copies of the weights take {now / MIB:,.0f} MiB at the peak, and saved activations are "
            f"{saved / MIB:,.0f} MiB smaller"
        )
    elif role == TEMPORARIES and gradients >= grown[role] // 2:
        why = (
            f"at the peak {gradients / MIB:,.0f} MiB are gradients in low precision that are being cast to "
            "the dtype of their weights"
        )
    else:
        why = f"{role} take {now / MIB:,.0f} MiB at the peak, not {then / MIB:,.0f} MiB"
    return [
        f"{best.precision.name} needs {more / MIB:,.0f} MiB more memory than {base.precision.name} "
        f"({best.memory.peak_allocated / MIB:,.0f} MiB, not {base.memory.peak_allocated / MIB:,.0f} MiB): {why}"
    ]


def advice(plan: Plan) -> list[str]:
    """Return what would make the step faster or smaller, most first."""
    found: list[tuple[float, str]] = []
    unaligned: dict[int, float] = {}
    for one in plan.time.calls:
        if one.cost.work is Work.PRODUCT and one.cost.format in ("float16", "bfloat16"):
            product = one.cost.products[0]
            for size in {product.n, product.k}:
                if size % _TILE and size > 64:
                    unaligned[size] = unaligned.get(size, 0.0) + one.seconds
    total = plan.time.gpu or 1.0
    for size, seconds in unaligned.items():
        if seconds / total > 0.01:
            wanted = -(-size // 64) * 64  # whole tiles
            found.append((seconds, f"a dimension of {size} is off the tensor cores' tile: {wanted} would be faster"))
    softmax = sum(one.seconds for one in plan.time.calls if one.call.name in ("_softmax", "_softmax_backward_data"))
    if softmax / total > 0.05:
        found.append(
            (softmax, f"softmax written out takes {softmax / total:.0%}: F.scaled_dot_product_attention fuses it")
        )
    if plan.time.num_waits:
        times = f"{plan.time.num_waits} times" if plan.time.num_waits > 1 else "once"
        found.append((0.0, f"{times} a step the host waits for a number (.item()): ask less often"))
    if plan.memory.fits is False:
        found.append((total, "the step does not fit: a smaller batch, activation checkpointing, or sharded states"))
    kept = kept_activation(plan.run, plan.memory)
    if kept is not None:
        found.append((0.0, kept.sentence))
    return [text for _, text in sorted(found, key=lambda pair: -pair[0])]
