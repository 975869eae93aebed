"""What a curve of losses says by itself: whether the run learned, and how finely its losses were written.

Two ways to be fooled are closed here. An equivalence test passes when neither run trained, so the control's loss has
to have fallen. And losses that were rounded to 16 bits agree by rounding: near 5, bfloat16 numbers are 0.03 apart,
more than the half percent that one usually wants to show.

Pure: no torch.
"""

import math
from collections.abc import Sequence

import numpy as np

from mezzotint.formats.catalog import BFLOAT16, FLOAT16
from mezzotint.formats.spec import FloatFormat

FEWEST_VALUES = 3  # distinct losses; a float32 is a bfloat16 number by chance once in 2**16


def final_loss(losses: Sequence[float]) -> float:
    """Return the mean of the last tenth of the losses, at least one."""
    return math.fsum(losses[-_tenth(losses) :]) / _tenth(losses)


def mean_loss(losses: Sequence[float]) -> float:
    """Return the mean of all losses: the area under their curve, per step."""
    return math.fsum(losses) / len(losses)


def learned_share(losses: Sequence[float]) -> float:
    """Return by which share of its start the loss fell; negative where it rose, 0 where there is nothing to compare.

    The start is the mean of the first twentieth (at most five steps: a fast learner is soon far below it), the end
    that of the last tenth.
    """
    if len(losses) < 2:
        return 0.0
    first = min(max(len(losses) // 20, 1), 5)
    start = math.fsum(losses[:first]) / first
    fall = start - final_loss(losses)
    if start == 0:
        return math.copysign(math.inf, fall) if fall else 0.0
    return fall / abs(start)


def _tenth(losses: Sequence[float]) -> int:
    return max(len(losses) // 10, 1)


def rounded_to(losses: Sequence[float]) -> FloatFormat | None:
    """Return the 16-bit format that every loss is a number of, or None: the losses are finer, or too few to tell."""
    for fmt in (BFLOAT16, FLOAT16):  # the coarser first
        if _fits(losses[:FEWEST_VALUES], fmt) and _fits(losses, fmt):  # a few tell already that most are finer
            return fmt if len(set(losses)) >= FEWEST_VALUES else None
    return None


def _fits(losses: Sequence[float], fmt: FloatFormat) -> bool:
    digits = np.frexp(np.asarray(losses, dtype=np.float64))[0] * 2.0**fmt.significant_bits
    return bool((np.isfinite(digits) & (digits == np.rint(digits))).all())


def spacing(value: float, fmt: FloatFormat) -> float:
    """Return how far apart numbers of `fmt` are at `value`."""
    return float(math.ldexp(1.0, math.frexp(value)[1] - fmt.significant_bits))
