"""What a trace holds: the operations of a few training steps, each with its place, its dtypes and its ranges.

Nothing here judges, and nothing here needs torch: dtypes are torch's names without the prefix ("bfloat16"), so that a
trace can be stored, read and reported where torch is not. A step repeats its operations, so what repeats (name, place,
dtypes, shapes) is a `Call`, kept once; an `Operation` is one execution of a call.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any

from mezzotint.trace.tally import Tally

ITEMSIZES = {
    "float64": 8, "int64": 8, "complex64": 8, "uint64": 8, "complex128": 16,
    "float32": 4, "int32": 4, "uint32": 4, "complex32": 4,
    "bfloat16": 2, "float16": 2, "int16": 2, "uint16": 2,
}  # fmt: skip
LOW_PRECISION = frozenset(
    {"bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}
)
FLOATING = LOW_PRECISION | {"float32", "float64"}


class Phase(StrEnum):
    """The part of a training step that an operation belongs to."""

    FORWARD = "forward"  # inside a module's call, or building the graph that a backward pass walks
    RECOMPUTE = "recompute"  # forward again, inside a backward pass (activation checkpointing)
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"  # unscaling, clipping and the update
    OTHER = "other"  # data, logging, averages of weights


class Kind(StrEnum):
    """What an operation does to memory."""

    VIEW = "view"  # no memory is touched
    CAST = "cast"  # the same numbers in another dtype
    MAKE = "make"  # from nothing: zeros, arange, randn
    COMPUTE = "compute"


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """A tensor's dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the elements."""
        return self.numel * ITEMSIZES.get(self.dtype, 1)

    @property
    def is_low(self) -> bool:
        """Whether the dtype is a compact floating-point format."""
        return self.dtype in LOW_PRECISION

    @property
    def is_floating(self) -> bool:
        """Whether the dtype is a floating-point format."""
        return self.dtype in FLOATING


@dataclass(frozen=True, slots=True)
class Frame:
    """A line of the user's program, or of a library that is not torch's; `line` counts from 1."""

    path: str
    line: int
    function: str


Site = tuple[Frame, ...]
"""Where an operation was called: innermost line first, at most four; a backward operation has its forward's site."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One operation at one place with one set of dtypes and shapes, executed `count` times in the trace.

    `op` is torch's full name ("aten.addmm.default"); `module` the path of the innermost module ("model.blocks.0.mlp",
    empty outside modules); `autocast` the dtype of the autocast region it ran in, if any. `node` is the autograd
    function of a backward operation. `flops` is None where no formula is known, never a false zero; `nbytes` counts
    what it reads and writes, 0 for views. `tallies` has one entry for each output, None for those not measured.
    """

    index: int
    op: str
    kind: Kind
    phase: Phase
    module: str
    site: Site
    inputs: tuple[TensorMeta, ...]
    outputs: tuple[TensorMeta, ...]
    autocast: str | None
    node: str | None
    is_in_place: bool
    flops: int | None
    tallies: tuple[Tally | None, ...]

    @property
    def name(self) -> str:
        """The operation's name without namespace and overload: "addmm"."""
        return self.op.split(".")[1] if "." in self.op else self.op

    @property
    def nbytes(self) -> int:
        """Bytes read and written; 0 for views."""
        if self.kind is Kind.VIEW:
            return 0
        return sum(meta.nbytes for meta in self.inputs) + sum(meta.nbytes for meta in self.outputs)

    @property
    def format(self) -> str | None:
        """The floating-point dtype of the largest tensor that it reads, else writes; the widest among equals.

        A product of bfloat16 operands is "bfloat16" whatever it adds or writes; autocast makes its operands alike.
        """
        for metas in (self.inputs, self.outputs):
            found = [meta for meta in metas if meta.is_floating]
            if found:
                return max(found, key=lambda meta: (meta.numel, ITEMSIZES.get(meta.dtype, 1))).dtype
        return None

    @property
    def line(self) -> Frame | None:
        """The innermost line of the user's program."""
        return self.site[0] if self.site else None


MASTER_MARK = " (master)"
"""What follows a weight's name in the name of its float32 copy."""

UNKNOWN = -1
"""The producer of a tensor that came from outside the trace."""


def parameter_producer(index: int) -> int:
    """Return the producer number that stands for parameter `index`."""
    return -2 - index


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One execution of a call.

    `producers` has one number for each input: the index of the operation that wrote the tensor, `UNKNOWN`, or
    `parameter_producer(i)` for a weight. `numbers` are the scalar arguments. `seconds` is the time of the call itself,
    which on a GPU is the time to launch it.
    """

    index: int
    step: int
    call: Call
    producers: tuple[int, ...]
    numbers: tuple[float, ...]
    seconds: float
    thread: int
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A call that mixed precision depends on, at `operation` (the index of the next operation): who, where, what.

    `name` is "autocast.enter", "autocast.exit", "backward", "grad", "scaler.scale", "scaler.unscale", "scaler.step",
    "scaler.update", "scaler.get_scale", "clip", "optimizer.step", "optimizer.zero_grad", "scheduler.step", "save",
    "load", "error"; `facts` depends on it. `end` is the operation index when the call came back.
    """

    name: str
    step: int
    operation: int
    end: int
    site: Site
    module: str
    thread: int
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRecord:
    """A weight as the optimizer found it: dtypes of weight, gradient and states; ranges of weight and gradient."""

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    grad_dtype: str | None
    optimizer: str | None
    states: Mapping[str, str]
    weight: Tally | None
    grad: Tally | None


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """What became of one tensor's updates: `lost` of `count` elements that should have moved did not.

    `role` is "weight", "state" or "copy" (an average of weights, a counter). `would_be_lost` says how many would be
    lost if the tensor were stored in the format named. `is_sampled` where only a part of the elements was looked at.
    """

    name: str
    role: str
    dtype: str
    op: str
    site: Site
    module: str
    steps: int
    count: int
    lost: int
    would_be_lost: Mapping[str, int]
    is_sampled: bool

    @property
    def share_lost(self) -> float:
        """The share of intended updates that rounding threw away."""
        return self.lost / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """An operation that made NaN or infinity out of finite numbers.

    `inputs` are the ranges it read: (dtype, smallest, amax) for each floating-point input. `wide` is what the same
    operation gives in float32: "finite", "not finite", or "unknown" where it cannot be run again; `wide_amax` its
    largest magnitude then.
    """

    operation: int
    nans: int
    infinities: int
    inputs: tuple[tuple[str, float, float], ...]
    wide: str
    wide_amax: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """What computing an operation's operands again in float32 showed.

    `kind` is "grid" (`changed` of `total` evenly spaced numbers are equal to another, `relative_error` in distances of
    neighbours), "decision" (`changed` of `total` choices are others in float32) or "cancellation" (`relative_error` of
    the result).
    """

    operation: int
    kind: str
    total: int
    changed: int
    relative_error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One training step: operations `first` to `end` (exclusive), its time, and whether an optimizer stepped."""

    index: int
    first: int
    end: int
    seconds: float
    optimizers: tuple[str, ...]
    is_skipped: bool
    loss: float | None


@dataclass(slots=True, kw_only=True)
class Trace:
    """A few steps of a training program, recorded.

    `command` is what was run; `facts` describe the machine and versions; `notes` say what was not seen and why.
    `modules` maps each module path that was called to its class name. `scaled_reads` are the operations outside
    backward that read gradients which still carried the loss scale; `refused_formats` those that raised and do not with
    their operands in float32.
    """

    command: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    parameters: list[ParameterRecord] = field(default_factory=list)
    updates: list[UpdateRecord] = field(default_factory=list)
    births: list[Birth] = field(default_factory=list)
    modules: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    scaled_reads: list[int] = field(default_factory=list)
    refused_formats: list[int] = field(default_factory=list)
    unmoved: dict[str, bool] = field(default_factory=dict)
    roundings: list[Rounding] = field(default_factory=list)

    def counts(self) -> dict[int, int]:
        """Return how often each call was executed, by its index, in steps that ended if there are any."""
        found: dict[int, int] = {}
        end = self.steps[-1].end if self.steps else len(self.operations)
        for operation in self.operations[:end]:
            found[operation.call.index] = found.get(operation.call.index, 0) + 1
        return found
