"""What a matmul micro-benchmark found, as a value, and what follows from it. No clock, no torch.

A format counts as faster only where it is faster in every layout that training uses, because a library may have a
kernel for one and none for another: stock bfloat16 on an AVX2 CPU takes 5 times float32's time in NT and 70 in NN.
"""

from dataclasses import dataclass
from enum import StrEnum

# "T" marks an operand that is read transposed. A linear layer multiplies NT in forward (activation, weight transposed),
# NN for the gradient of its input and TN for the gradient of its weight.
LAYOUTS = ("NT", "NN", "TN")

FASTER_BELOW = 0.9  # of float32's time, in every layout
SLOWER_ABOVE = 1.3  # of float32's time, in any layout


class Speed(StrEnum):
    """How a format's matmul compares to float32's on the same device."""

    FASTER = "faster"
    EVEN = "even"
    SLOWER = "slower"


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulTime:
    """The time of one matmul in one format and layout: the best and the median of `samples` calls."""

    format: str
    layout: str
    best_seconds: float
    median_seconds: float
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulTimings:
    """Matmul times of several formats, taken in turn. The product is m x k by k x n.

    `threads` are torch's, on a CPU. `refused` pairs a format with what torch said when it would not multiply it.
    `is_disturbed` says that other programs hardly let a call run through, so that the figures mean little.
    """

    device: str
    threads: int
    m: int
    n: int
    k: int
    times: tuple[MatmulTime, ...]
    refused: tuple[tuple[str, str], ...] = ()
    is_disturbed: bool = False

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats that were timed, in order."""
        return tuple(dict.fromkeys(time.format for time in self.times))

    def time(self, format_name: str, layout: str) -> MatmulTime | None:
        """Return the time of a format in a layout, or None where it was not taken."""
        return next((t for t in self.times if (t.format, t.layout) == (format_name, layout)), None)

    def ratios(self, format_name: str) -> dict[str, float]:
        """Return the time relative to float32's by layout; empty where either was not timed."""
        pairs = ((layout, self.time(format_name, layout), self.time("float32", layout)) for layout in LAYOUTS)
        return {layout: ours.best_seconds / base.best_seconds for layout, ours, base in pairs if ours and base}

    def worst_ratio(self, format_name: str) -> float | None:
        """Return the largest time relative to float32's over the layouts, or None where it was not timed."""
        return max(self.ratios(format_name).values(), default=None)

    def flops_per_second(self, format_name: str) -> float | None:
        """Return the operations per second in the slowest layout, or None where the format was not timed."""
        slowest = max((t.best_seconds for t in self.times if t.format == format_name), default=None)
        return None if slowest is None else 2.0 * self.m * self.n * self.k / slowest


def matmul_speed(timings: MatmulTimings, format_name: str) -> Speed | None:
    """Return whether a format's matmul is faster than float32's in every layout, slower in any, or neither.

    None where it was not timed in all of them.
    """
    ratios = timings.ratios(format_name)
    if set(ratios) != set(LAYOUTS):
        return None
    worst = max(ratios.values())
    if worst <= FASTER_BELOW:
        return Speed.FASTER
    return Speed.SLOWER if worst > SLOWER_ABOVE else Speed.EVEN


def spell_ratios(ratios: dict[str, float]) -> str:
    """Return the ratios as words.

    >>> spell_ratios({"NT": 0.461, "NN": 35.2})
    "0.46 times float32's in NT, 35 in NN"
    """
    words = [f"{spell_ratio(ratio)} in {layout}" for layout, ratio in ratios.items()]
    return ", ".join([words[0].replace(" in ", " times float32's in "), *words[1:]]) if words else "not measured"


def spell_ratio(ratio: float) -> str:
    """Return a ratio with two significant digits, or all digits before the point."""
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.95 else f"{ratio:.2f}"
