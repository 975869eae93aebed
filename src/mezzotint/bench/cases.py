"""What is timed: operations of a training step, by kind, shape and number format. Pure.

Letters of shapes: M, N, K of a product; B batch, H heads, T tokens, D width of a head or of a row; P parameters.
FLOPs count a multiplication and an addition as two, as vendors do, and are those of the mathematical product; bytes are
each operand read once and each result written once, the least that memory must move.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from mezzotint.errors import ConfigError
from mezzotint.formats.catalog import find_format


class Op(StrEnum):
    """The kinds of operation, in the order of the report."""

    MATMUL = "matmul"  # activation times transposed weight: a linear layer's forward (NT)
    MATMUL_INPUT_GRADIENT = "matmul-dx"  # output gradient times weight (NN)
    MATMUL_WEIGHT_GRADIENT = "matmul-dw"  # transposed output gradient times activation (TN)
    ATTENTION = "attention"  # causal scaled dot product, forward
    ATTENTION_BACKWARD = "attention-backward"
    LAYER_NORM = "layer-norm"
    RMS_NORM = "rms-norm"
    SOFTMAX = "softmax"
    ADD = "add"
    GELU = "gelu"
    UPDATE = "adamw"  # torch's fused AdamW on weights, gradients and states of the format


PRODUCTS = (Op.MATMUL, Op.MATMUL_INPUT_GRADIENT, Op.MATMUL_WEIGHT_GRADIENT)
ATTENTIONS = (Op.ATTENTION, Op.ATTENTION_BACKWARD)
ROWS = (Op.LAYER_NORM, Op.RMS_NORM, Op.SOFTMAX)
ELEMENTWISE = (Op.ADD, Op.GELU)
# what a user may name; a group stands for its members
GROUPS: dict[str, tuple[Op, ...]] = {
    "matmul": PRODUCTS,
    "attention": ATTENTIONS,
    "norm": ROWS,
    "elementwise": ELEMENTWISE,
    "update": (Op.UPDATE,),
}
# formats that only a matmul has
MATMUL_ONLY = ("tfloat32", "float8_e4m3fn", "float8_e5m2")
FORMATS = ("float32", "tfloat32", "bfloat16", "float16", "float8_e4m3fn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation on one shape, whatever the format.

    `shape` has M, N, K for products, B, H, T, D for attention, T, D for rows, and the number of elements for the rest.
    """

    op: Op
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))}"

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats of FORMATS that the operation can run in."""
        return FORMATS if self.op in PRODUCTS else tuple(name for name in FORMATS if name not in MATMUL_ONLY)

    @property
    def flops(self) -> float | None:
        """Floating-point operations, or None where no count is agreed on (anything but products and attention).

        Causal attention computes half of the two T x T products of 2 B H T^2 D each; its backward has five of them
        (Dao 2023, arXiv 2307.08691, section 3.1).
        """
        if self.op in PRODUCTS:
            m, n, k = self.shape
            return 2.0 * m * n * k
        if self.op in ATTENTIONS:
            batch, heads, tokens, width = self.shape
            products = 2 if self.op is Op.ATTENTION else 5
            return products * 2.0 * batch * heads * tokens * tokens * width / 2
        return None

    def bytes_moved(self, format_name: str) -> float:
        """Bytes that must be read and written when all tensors are of a format; products of float8 give bfloat16."""
        size = find_format(format_name).bytes
        out_size = 2.0 if size == 1 else size
        if self.op in PRODUCTS:
            m, n, k = self.shape
            return size * (m * k + k * n) + out_size * m * n
        if self.op in ATTENTIONS:
            batch, heads, tokens, width = self.shape
            # q, k, v in and the output; backward reads these and the output's gradient and writes three gradients
            return size * batch * heads * tokens * width * (4 if self.op is Op.ATTENTION else 8)
        if self.op in ROWS:
            tokens, width = self.shape
            return size * 2 * tokens * width
        # an update reads weight, gradient and two states, and writes weight and states
        tensors = {Op.ADD: 3, Op.GELU: 2, Op.UPDATE: 7}[self.op]
        return size * tensors * self.shape[0]


_CPU_SQUARES = (256, 512, 1024)
_CPU_SHAPES = ((2048, 1536, 384), (2048, 384, 1536))
_GPU_SQUARES = (1024, 2048, 4096, 8192)
_GPU_SHAPES = ((8192, 12288, 4096), (8192, 4096, 12288), (4096, 32000, 4096))


def suite(
    kind: str,
    *,
    ops: Sequence[str] = tuple(GROUPS),
    sizes: Sequence[int] = (),
    shapes: Sequence[tuple[int, int, int]] = (),
) -> tuple[Case, ...]:
    """Return the cases for a kind of device, "cpu" or any accelerator: squares, and shapes of a language model.

    `ops` are names of GROUPS or of Op. `sizes` (squares) and `shapes` (M, N, K) replace the products' own.
    Raises ConfigError for an unknown name and for a size below 1.
    """
    is_cpu = kind == "cpu"
    squares: tuple[int, ...] = _CPU_SQUARES if is_cpu else _GPU_SQUARES
    model: tuple[tuple[int, int, int], ...] = _CPU_SHAPES if is_cpu else _GPU_SHAPES
    if sizes or shapes:
        squares, model = tuple(sizes), tuple(shapes)
    if any(length < 1 for length in (*squares, *(length for shape in model for length in shape))):
        raise ConfigError("a matrix has at least one row and one column; pass sizes from 1 on")
    products = [(size, size, size) for size in squares] + list(model)
    rows = (4096, 1024) if is_cpu else (16384, 4096)
    elements = (1 << 22,) if is_cpu else (1 << 26,)
    by_group: dict[str, list[tuple[int, ...]]] = {
        "matmul": [*products],
        "attention": [(4, 6, 512, 64)] if is_cpu else [(8, 16, 2048, 64), (4, 16, 4096, 128)],
        "norm": [rows],
        "elementwise": [elements],
        "update": [elements],
    }
    chosen = chosen_ops(ops)
    return tuple(
        Case(op=op, shape=shape)
        for group, shapes_of_group in by_group.items()
        for shape in shapes_of_group
        for op in GROUPS[group]
        if op in chosen
    )


def chosen_ops(names: Sequence[str]) -> set[Op]:
    """Return the operations that names of groups or operations stand for. Raises ConfigError for an unknown name."""
    chosen: set[Op] = set()
    for name in names:
        if name in GROUPS:
            chosen.update(GROUPS[name])
        elif name in tuple(Op):
            chosen.add(Op(name))
        else:
            raise ConfigError(
                f"unknown operation {name!r}; pass {', '.join([*GROUPS, *Op][:5])}, or one of {_listed()}"
            )
    return chosen


def _listed() -> str:
    return ", ".join(op for op in Op if op not in GROUPS)


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return M, N and K of a text such as "512x768x768". Raises ConfigError for any other."""
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})x(\d{1,9})", text.strip().lower())
    if not found:
        raise ConfigError(f"{text!r} is no shape of a product; write MxNxK, for example 2048x768x768")
    return int(found[1]), int(found[2]), int(found[3])
