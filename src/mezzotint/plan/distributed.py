"""Several cards on paper: a plan of one card's step extrapolated to DDP or FSDP. Nothing of it was run.

DDP adds an all-reduce of the gradients, overlapped with backward, and buckets as large as the gradients. FSDP (FSDP2
and ZeRO-3, full shard) keeps a share of weights, gradients and states, gathers each block's weights before forward and
backward and scatters its gradients; two blocks are whole at a time. Rings move (N-1)/N of the bytes once for a gather
or a scatter and twice for an all-reduce (Patarasuk and Yuan 2009); the slowest link counts.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from mezzotint.errors import PlanError
from mezzotint.ghost.owners import GRADIENTS, STATES, WEIGHTS
from mezzotint.hardware.devices import DeviceSpec
from mezzotint.hardware.links import Links, links_of
from mezzotint.plan.memory import CAST_CACHE, CLASSES, CONTEXT_BYTES
from mezzotint.plan.plan import Plan
from mezzotint.trace.record import ParameterRecord, Phase

# NCCL's bus bandwidth over the link's: 230 to 240 of 300 GB/s on A100, 360 to 370 of 450 on H100 (nccl-tests, reported)
_EFFICIENCY = 0.8
_LATENCY = 20e-6  # of one collective within a machine
_LATENCY_BETWEEN = 60e-6
_BUCKET_BYTES = 25 << 20  # DDP's default
_ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
MAX_WORLD = 1 << 20
"""More cards than any machine has."""
_WHOLE = 2  # blocks that FSDP has gathered at a time: the one at work and the next


class Strategy(StrEnum):
    """How several cards share a training step."""

    DDP = "ddp"
    FSDP = "fsdp"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedPlan:
    """One card's share of a step over `world` cards, in seconds and bytes: an extrapolation.

    `communication` is what the links are busy, `exposed` what of it computation cannot hide; `low` to `high` is the
    interval of the single card's plan with half and all of the communication exposed at most.
    """

    plan: Plan
    world: int
    strategy: Strategy
    links: Links
    seconds: float
    low: float
    high: float
    communication: float
    exposed: float
    peak_allocated: int
    peak_reserved: int

    @property
    def fits(self) -> bool | None:
        """Whether each card has the memory; None where that is not known."""
        capacity = self.plan.memory.capacity
        return None if capacity is None else self.peak_reserved + CONTEXT_BYTES <= capacity

    @property
    def items_per_second(self) -> float | None:
        """Tokens or samples per second of all cards."""
        return self.plan.items * self.world / self.seconds if self.plan.items else None

    @property
    def scaling(self) -> float:
        """Throughput over that of `world` cards that need not talk."""
        return self.plan.time.seconds / self.seconds


def check_world(world: int, strategy: str, cards: Sequence[DeviceSpec]) -> None:
    """Raise PlanError for fewer than 2 cards, an unknown strategy, or cards whose links no source states."""
    if world < 2:
        raise PlanError(f"--world is {world}; several cards are at least 2")
    if world > MAX_WORLD:
        raise PlanError(f"--world is {str(world)[:200]}; it must be at most {MAX_WORLD:,} cards")
    if strategy not in list(Strategy):
        raise PlanError(f"--strategy is {strategy!r}; give ddp or fsdp")
    for card in cards:
        links_of(card)


def distribute(plan: Plan, world: int, strategy: str) -> DistributedPlan:
    """Extrapolate a plan to `world` cards, each with the batch of the plan.

    Raises PlanError for what `check_world` refuses, and for a program without weights.
    """
    check_world(world, strategy, [plan.run.spec])
    weights = [one for one in plan.run.trace.parameters if one.grad_dtype is not None]
    if not weights:
        raise PlanError("no weight got a gradient, so there is nothing that cards would exchange")
    links = links_of(plan.run.spec)
    kind = Strategy(strategy)
    wire = _Wire(links, world)
    communication, exposed = (_ddp if kind is Strategy.DDP else _fsdp)(plan, weights, wire)
    saved = _update_seconds(plan) * (1 - 1 / world) if kind is Strategy.FSDP else 0.0
    single = plan.time
    base = max(single.seconds - saved, 0.0)
    allocated = _memory(plan, weights, world, kind)
    unused = plan.memory.peak_reserved / max(1, plan.memory.peak_allocated)  # what the allocator keeps and cannot use
    return DistributedPlan(
        plan=plan,
        world=world,
        strategy=kind,
        links=links,
        seconds=base + exposed,
        low=max(single.low - saved, 0.0) + exposed / 2,
        high=single.high - saved + max(communication, exposed),
        communication=communication,
        exposed=exposed,
        peak_allocated=allocated,
        peak_reserved=int(allocated * max(1.0, unused)),
    )


@dataclass(frozen=True, slots=True)
class _Wire:
    """The slowest link that a ring over `world` cards crosses."""

    links: Links
    world: int

    def seconds(self, nbytes: float, times: int = 1) -> float:
        """Return the time of a gather or scatter of `nbytes` in all (`times` 2: an all-reduce)."""
        is_between = self.world > self.links.node
        # a ring over machines has each machine's cards side by side, all network ports at once
        speed = self.links.between * min(self.links.node, self.world) if is_between else self.links.within
        speed = min(speed, self.links.within) * _EFFICIENCY
        latency = _LATENCY_BETWEEN if is_between else _LATENCY
        return times * (nbytes * (self.world - 1) / self.world / speed + latency)


def _ddp(plan: Plan, weights: Sequence[ParameterRecord], wire: _Wire) -> tuple[float, float]:
    nbytes = sum(_size(one, one.grad_dtype) for one in weights)
    buckets = max(1, round(nbytes / _BUCKET_BYTES))
    total = buckets * wire.seconds(nbytes / buckets, times=2)
    last = wire.seconds(min(nbytes, _BUCKET_BYTES), times=2)  # of the first layers, when backward is done
    return total, max(last, total - _gpu_seconds(plan, Phase.BACKWARD, Phase.RECOMPUTE))


def _fsdp(plan: Plan, weights: Sequence[ParameterRecord], wire: _Wire) -> tuple[float, float]:
    """Weights travel in the dtype of the products, gradients in their own (float32 by FSDP2's usual policy)."""
    blocks = _blocks(weights)
    itemsize = _gathered_itemsize(plan)
    gather = sum(wire.seconds(numel * itemsize) for numel in blocks.values())
    scatter = sum(
        wire.seconds(sum(_size(one, one.grad_dtype) for one in weights if _block(one.name) == block))
        for block in blocks
    )
    first = wire.seconds(next(iter(blocks.values())) * itemsize)
    forward = _gpu_seconds(plan, Phase.FORWARD)
    backward = _gpu_seconds(plan, Phase.BACKWARD, Phase.RECOMPUTE)
    exposed = first + max(0.0, gather - forward) + max(0.0, gather + scatter - backward)
    return 2 * gather + scatter, exposed


def _memory(plan: Plan, weights: Sequence[ParameterRecord], world: int, kind: Strategy) -> int:
    """Return the peak: the highest of the step's moments with what is shared out divided."""
    points = [dict(zip(CLASSES, sizes, strict=True)) for _, sizes in plan.memory.timeline]
    if not points:
        points = [dict(plan.memory.at_peak)]
    if kind is Strategy.DDP:
        buckets = sum(_size(one, one.grad_dtype) for one in weights)
        return plan.memory.peak_allocated + buckets
    itemsize = _gathered_itemsize(plan)
    whole = sum(sorted((numel * itemsize for numel in _blocks(weights).values()), reverse=True)[:_WHOLE])
    largest = max(
        sum(_size(one, one.grad_dtype) for one in weights if _block(one.name) == block) for block in _blocks(weights)
    )
    shared = (WEIGHTS, GRADIENTS, STATES)
    rest = max(
        sum(size for role, size in point.items() if role not in (*shared, CAST_CACHE))
        + sum(point.get(role, 0) for role in shared) / world
        for point in points
    )
    return int(rest + whole + largest)


def _blocks(weights: Sequence[ParameterRecord]) -> dict[str, int]:
    """Return the elements of each block that is gathered at once: `model.layers.3`, and one for what is in none."""
    found: Counter[str] = Counter()
    for one in weights:
        found[_block(one.name)] += _numel(one)
    return dict(found)


def _block(name: str) -> str:
    parts = name.split(".")
    index = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[: index + 1]) if index is not None else ""


def _gathered_itemsize(plan: Plan) -> int:
    return _ITEMSIZE.get(plan.products_format, 1 if plan.precision.has_fp8 else 4)


def _numel(one: ParameterRecord) -> int:
    total = 1
    for size in one.shape:
        total *= size
    return total


def _size(one: ParameterRecord, dtype: str | None) -> int:
    return _numel(one) * _ITEMSIZE.get(dtype or one.dtype, 4)


def _gpu_seconds(plan: Plan, *phases: Phase) -> float:
    return sum(one.seconds for one in plan.time.calls if one.call.phase in phases)


def _update_seconds(plan: Plan) -> float:
    """Return what the optimizer, clipping and scaling take of the card, which a shard does a share of."""
    return _gpu_seconds(plan, Phase.OPTIMIZER)
