"""Time of a step on a card: two clocks, one of the host that issues operations, one of the GPU that runs them in order.

Each operation is priced by `efficiency.py`; views cost the host alone. A number asked of the GPU (`.item()`) makes the
host wait. What the host needs for an operation differs between machines by a factor of three, so a step that waits for
the host is an interval, and says so. Compiled programs launch one kernel for a run of operations that only move bytes,
and move only what enters and leaves it, which is the least; at the upper end of the interval nothing is fused.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mezzotint.ghost.access import NONE, Access
from mezzotint.hardware.devices import DeviceSpec
from mezzotint.plan import efficiency
from mezzotint.plan.cache import Cache
from mezzotint.plan.costs import Cost, Work, cost_of, is_scattered
from mezzotint.plan.efficiency import Estimate
from mezzotint.plan.recording import GhostRun
from mezzotint.trace.record import Call, Kind, Operation, Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the host needs to issue one operation, in seconds: the usual figure, and how far machines are apart.

    Eager PyTorch needs 5 to 10 us for an operation itself and as much again for the Python around it; 4 us of it are
    the launch of a kernel, which views have not got. How phases compare was measured on a CPU with the models of CS336,
    Llama and GPT-2 (`scripts/host_costs.py`): forward without gradients takes 0.78 of forward with them, and what
    autograd issues in backward costs about as much for each operation as forward does. The microseconds themselves are
    a choice, made with published steps in view.
    """

    forward: float = 13e-6
    no_grad: float = 11e-6
    backward: float = 11e-6
    update: float = 9e-6
    view: float = 1.2e-6
    backward_view: float = 2.4e-6
    fast: float = 0.5
    slow: float = 2.5

    def seconds(self, call: Call, *, has_backward: bool = True) -> float:
        """Return the usual time to issue one call."""
        is_backward = call.phase is Phase.BACKWARD
        if call.kind is Kind.VIEW:
            return self.backward_view if is_backward else self.view
        if is_backward:
            return self.backward
        if call.phase is Phase.OPTIMIZER:
            return self.update
        return self.forward if has_backward else self.no_grad


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedCall:
    """One call with its time on the GPU for one execution, how often it runs in the step, and why it takes so long."""

    call: Call
    cost: Cost
    estimate: Estimate
    count: int

    @property
    def seconds(self) -> float:
        """Seconds of all executions in the step."""
        return self.estimate.seconds * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class TimePlan:
    """Time of one step in seconds. `low` to `high` is what to expect; `seconds` the usual machine's.

    `gpu` is what the GPU is busy, `host` what the host needs to issue everything. `walls` and `works` are shares of
    GPU time; `uncovered` are operations whose time is a lower bound, with their seconds. `flops` are those of products,
    convolutions and attention.
    """

    seconds: float
    low: float
    high: float
    gpu: float
    host: float
    walls: Mapping[str, float]
    works: Mapping[str, float]
    calls: tuple[PricedCall, ...]
    uncovered: Mapping[str, float]
    flops: int
    num_launches: int
    num_waits: int

    @property
    def is_host_bound(self) -> bool:
        """Whether the GPU waits for the host on a usual machine."""
        return self.host > 0.9 * self.gpu

    @property
    def is_gpu_bound(self) -> bool:
        """Whether the GPU is the limit even where the host is slow."""
        return self.gpu > Host().slow * self.host

    def utilisation(self, card: DeviceSpec, format_name: str) -> float | None:
        """Return the model FLOPs utilisation: FLOPs of the step per second, as a share of the card's peak."""
        peak = card.peak_flops_per_second(format_name)
        return self.flops / self.seconds / peak if peak and self.seconds else None


class _Facts(NamedTuple):
    """What an operation's price depends on beside its call."""

    is_causal: bool
    is_transfer: bool
    is_channels_last: bool
    access: Access
    turned: int
    cached: int


def _facts(run: GhostRun, operation: Operation, cache: Cache) -> _Facts:
    index = operation.index
    return _Facts(
        is_causal=index in run.causal,
        is_transfer=index in run.transfers,
        is_channels_last=index in run.channels_last,
        access=run.access.get(index, NONE),
        turned=run.turned.get(index, 0),
        cached=0 if operation.call.kind is Kind.VIEW else cache.hits(operation),
    )


def plan_time(
    run: GhostRun, *, first: int | None = None, end: int | None = None, host: Host | None = None, has_fp8: bool = False
) -> TimePlan:
    """Price the operations `first` to `end` (the last whole step). With `has_fp8`, linear layers run in float8."""
    host = host or Host()
    steps = run.trace.steps
    first = (steps[-1].first if steps else 0) if first is None else first
    end = (steps[-1].end if steps else len(run.trace.operations)) if end is None else end
    operations = [one for one in run.trace.operations[first:end] if one.error is None and one.index not in run.on_host]
    prices: dict[tuple[int, _Facts], tuple[Cost, Estimate]] = {}
    kernels: list[tuple[Operation, Cost, Estimate]] = []
    cache = Cache(run.spec)
    for operation in operations:
        call, facts = operation.call, _facts(run, operation, cache)
        if (call.index, facts) not in prices:
            cost = cost_of(call)
            if facts.is_transfer:
                nbytes = sum(meta.nbytes for meta in call.outputs)
                cost = Cost(work=Work.TRANSFER, format=cost.format, nbytes=nbytes)
            elif facts.access.memory and cost.work is Work.BYTES:
                cost = replace(cost, nbytes=max(0, cost.nbytes + facts.access.memory))
            prices[call.index, facts] = cost, _price(run, call, cost, facts, has_fp8=has_fp8)
        kernels.append((operation, *prices[call.index, facts]))
    if run.is_compiled:
        kernels = _fused(run.spec, kernels)
    return _total(run, kernels, host, _steady_waits(run, first, end))


class _Seconds(dict[str, float]):
    """Sums of seconds by name."""

    def __missing__(self, _key: str) -> float:
        return 0.0

    def shares(self, total: float) -> dict[str, float]:
        """Return the largest first, divided by a total."""
        return {key: value / total for key, value in sorted(self.items(), key=lambda item: -item[1])}


def _steady_waits(run: GhostRun, first: int, end: int) -> frozenset[int]:
    """Return the waits of a usual step.

    What follows an update counts to the next step. A loss that is printed after the first step, and not after the one
    that is planned, is printed now and then: the planned step is taken without.
    """
    operations = run.trace.operations

    def begin(index: int) -> int:
        while index < len(operations) and operations[index].call.phase is not Phase.FORWARD:
            index += 1
        return index

    inside = frozenset(wait for wait in run.waits if begin(first) <= wait < end)
    is_known = end < len(operations)
    is_again = any(end <= wait < begin(end) for wait in run.waits)
    return run.waits if is_again or not is_known else inside


def _total(
    run: GhostRun, kernels: Sequence[tuple[Operation, Cost, Estimate]], host: Host, waits: frozenset[int]
) -> TimePlan:
    counts: Counter[tuple[int, float]] = Counter()
    examples: dict[tuple[int, float], tuple[Call, Cost, Estimate]] = {}
    walls, works, uncovered = _Seconds(), _Seconds(), _Seconds()
    gpu, flops, launches = 0.0, 0, 0
    for operation, cost, estimate in kernels:
        if cost.work is Work.NOTHING:
            continue
        gpu += estimate.seconds
        launches += cost.kernels
        walls[estimate.wall] += estimate.seconds
        works["cast" if operation.call.kind is Kind.CAST else str(cost.work)] += estimate.seconds
        if cost.work in (Work.PRODUCT, Work.CONVOLUTION, Work.ATTENTION, Work.RECURRENT):
            flops += cost.flops
        if not cost.has_formula:
            uncovered[operation.call.name] += estimate.seconds
        key = operation.call.index, estimate.seconds
        counts[key] += 1
        examples[key] = operation.call, cost, estimate
    clock = [
        _clock(kernels, host, *ends, is_compiled=run.is_compiled, waits=waits, syncs=run.syncs)
        for ends in ((1.0, 0), (host.fast, -1), (host.slow, 1))
    ]
    return TimePlan(
        seconds=clock[0][0],
        low=min(clock[1][0], clock[0][0]),
        high=max(clock[2][0], clock[0][0]),
        gpu=gpu,
        host=clock[0][1],
        walls=walls.shares(gpu) if gpu else {},
        works=works.shares(gpu) if gpu else {},
        calls=tuple(
            PricedCall(call=examples[key][0], cost=examples[key][1], estimate=examples[key][2], count=count)
            for key, count in counts.items()
        ),
        uncovered=uncovered.shares(1.0),
        flops=flops,
        num_launches=launches,
        num_waits=sum(operation.index in waits for operation, _, _ in kernels),
    )


def _clock(
    kernels: Sequence[tuple[Operation, Cost, Estimate]],
    host: Host,
    factor: float,
    side: int,
    *,
    is_compiled: bool,
    waits: frozenset[int],
    syncs: frozenset[int],
) -> tuple[float, float]:
    """Return seconds of a step in steady state, and of the host alone; kernels are at one side of their interval."""
    cpu = gpu = 0.0
    ends = []
    issue = 0.0
    has_backward = any(operation.call.phase is Phase.BACKWARD for operation, _, _ in kernels)
    for _ in range(2):  # the second step starts with what the first has left to do
        for operation, cost, estimate in kernels:
            if operation.index in syncs:
                cpu = max(cpu, gpu)
            seconds = host.seconds(operation.call, has_backward=has_backward) * factor
            if is_compiled and cost.kernels == 0:
                seconds = 0.0
            if is_compiled and operation.call.phase is not Phase.OPTIMIZER:
                seconds *= 0.5  # generated code launches without dispatcher and modules
            cpu += seconds
            issue += seconds
            if operation.index in waits:
                cpu = max(cpu, gpu)
            elif cost.work is not Work.NOTHING:
                taken = (estimate.seconds, estimate.high, estimate.low)[side]
                gpu = max(gpu, cpu) + taken
        ends.append(max(cpu, gpu))
    return ends[1] - ends[0], issue / 2


def _price(run: GhostRun, call: Call, cost: Cost, facts: _Facts, *, has_fp8: bool) -> Estimate:
    card = run.spec
    nothing = Estimate(0.0, 0.0, 0.0, "none")
    if cost.work is Work.NOTHING:
        return nothing
    if cost.work is Work.TRANSFER:
        return efficiency.transfer_time(card, cost.nbytes, is_pinned=True)
    itemsize = {"float32": 4, "float64": 8}.get(cost.format, 2)
    format_name = _speed_format(run, cost)
    if cost.work is Work.PRODUCT:
        product = cost.products[0]
        if has_fp8 and _is_linear(call) and not any(size % 16 for size in (product.m, product.n, product.k)):
            casts = efficiency.memory_time(card, 3 * (product.m * product.k + product.k * product.n))
            found = efficiency.product_time(
                card, "float8_e4m3fn", product.m, product.n, product.k, itemsize_in=1, itemsize_out=2
            )
            return _sum(found, casts)
        return efficiency.product_time(
            card, format_name, product.m, product.n, product.k, product.batch, itemsize_in=itemsize,
            itemsize_out=itemsize, num_turned=facts.turned,
        )  # fmt: skip
    if cost.work is Work.CONVOLUTION:
        found = nothing
        for product in cost.products:
            one = efficiency.convolution_time(
                card, format_name, product.m, product.n, product.k, groups=product.batch,
                is_channels_last=facts.is_channels_last, nbytes=cost.nbytes // len(cost.products), itemsize=itemsize,
                is_winograd=cost.is_winograd,
            )  # fmt: skip
            found = _sum(one, found)
        return found
    if cost.work is Work.ATTENTION:
        kind = next((one for one in ("flash", "efficient", "cudnn") if one in call.name), "efficient")
        return efficiency.attention_time(
            card, format_name, kind, cost.flops, cost.head_size, is_causal=facts.is_causal,
            is_backward=call.name.endswith("backward"),
        )  # fmt: skip
    if cost.work is Work.RECURRENT:  # a guess, and reported as one: no published figure was found
        seconds = cost.flops / (0.4 * efficiency.sustained(card, format_name)) + cost.kernels * 4e-6
        return Estimate(seconds, 0.5 * seconds, 2 * seconds, "compute")
    scattered = call.outputs[0].numel if is_scattered(call, has_gaps=facts.access != NONE) else 0
    found = efficiency.memory_time(card, cost.nbytes, facts.cached, across=facts.access.across, scattered=scattered)
    extra = (cost.kernels - 1) * 1.5e-6
    return Estimate(found.seconds + extra, found.low + extra, found.high + extra, found.wall)


def _sum(one: Estimate, other: Estimate) -> Estimate:
    wall = one.wall if one.seconds >= other.seconds else other.wall
    return Estimate(one.seconds + other.seconds, one.low + other.low, one.high + other.high, wall)


def _is_linear(call: Call) -> bool:
    return call.name in ("mm", "addmm") and call.inputs[-1].dtype in ("bfloat16", "float16")


def _speed_format(run: GhostRun, cost: Cost) -> str:
    if cost.format != "float32":
        return cost.format
    is_convolution = cost.work in (Work.CONVOLUTION, Work.RECURRENT)
    has_tf32 = run.has_tf32_convolutions if is_convolution else run.has_tf32_products
    return "tfloat32" if has_tf32 and (run.spec.compute_capability or (8, 0)) >= (8, 0) else "float32"


def _fused(
    card: DeviceSpec, kernels: Sequence[tuple[Operation, Cost, Estimate]]
) -> list[tuple[Operation, Cost, Estimate]]:
    """Make each run of operations that only move bytes one kernel, which moves what enters and leaves the run.

    That is the least a compiler can leave. How much of it is reached is not known, so intervals end at kernels of their
    own, as without a compiler.
    """
    found: list[tuple[Operation, Cost, Estimate]] = []
    group: list[tuple[Operation, Cost, Estimate]] = []
    last_use: dict[int, int] = {}
    for operation, _, _ in kernels:
        for producer in operation.producers:
            if producer >= 0:
                last_use[producer] = operation.index

    def close() -> None:
        if group:
            found.extend(_as_one(card, group, last_use))
            group.clear()

    for one in kernels:
        operation, cost, _ = one
        is_plain = cost.work is Work.NOTHING or (cost.work is Work.BYTES and cost.kernels == 1)
        if is_plain and operation.call.phase is not Phase.OPTIMIZER:
            group.append(one)
        else:
            close()
            found.append(one)
    close()
    return found


def _as_one(
    card: DeviceSpec, group: Sequence[tuple[Operation, Cost, Estimate]], last_use: Mapping[int, int]
) -> list[tuple[Operation, Cost, Estimate]]:
    members = {operation.index for operation, _, _ in group}
    end = group[-1][0].index
    read: dict[tuple[int, object], int] = {}
    written = 0
    work = [one for one in group if one[1].work is Work.BYTES]
    if not work:
        return list(group)
    for operation, _, _ in work:
        for meta, producer in zip(operation.call.inputs, operation.producers, strict=False):
            if producer not in members:
                read[producer, meta] = meta.nbytes
        if last_use.get(operation.index, end + 1) > end:
            written += sum(meta.nbytes for meta in operation.call.outputs)
    estimate = efficiency.memory_time(card, sum(read.values()) + written)
    total = sum(one[2].seconds for one in work) or 1.0
    out: list[tuple[Operation, Cost, Estimate]] = []
    for index, (operation, cost, own) in enumerate(work):
        share = own.seconds / total
        high = max(estimate.high * share, own.high)
        part = Estimate(estimate.seconds * share, estimate.low * share, high, estimate.wall)
        kernels = 1 if index == 0 else 0
        out.append((operation, replace(cost, kernels=kernels), part))
    return out
