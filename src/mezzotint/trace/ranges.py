"""Ranges of the tensors that pass: exact counts, added up by the compiled loops of `mezzotint.kernels`."""

from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np
from torch import Tensor

from mezzotint.kernels import tensors
from mezzotint.kernels.constants import INF, NAN, NUM_COUNTS, ZERO
from mezzotint.trace.tally import Tally


def _zeros() -> Any:
    return np.zeros(NUM_COUNTS, np.int64)


@dataclass(slots=True, eq=False)
class TensorRange:
    """Running counts of one output."""

    dtype: str
    counts: Any = field(default_factory=_zeros)
    count: int = 0
    amax: float = 0.0
    smallest: float = inf

    def tally(self) -> Tally:
        """Return the counts as plain numbers."""
        counts = self.counts.tolist()
        return Tally(
            dtype=self.dtype,
            count=self.count,
            nans=counts[NAN],
            infinities=counts[INF],
            zeros=counts[ZERO],
            amax=self.amax,
            smallest=self.smallest,
            exponents=counts[:NAN],
        )


class Ranges:
    """Measures tensors of any device; what has no numbers that can be read is skipped and counted."""

    def __init__(self) -> None:
        self.num_skipped = 0

    def add(self, tensor: Tensor, found: TensorRange) -> bool:
        """Add a tensor's numbers to `found`; return whether there was a NaN or an infinity among them."""
        ends = tensors.add_range_counts(tensor, found.counts)
        if ends is None:
            return self._add_generic(tensor, found)
        found.count += tensor.numel()
        largest, smallest, num_special = ends
        found.amax = max(found.amax, largest)
        found.smallest = min(found.smallest, smallest)
        return num_special > 0

    def _add_generic(self, tensor: Tensor, found: TensorRange) -> bool:
        if not tensors.is_measurable(tensor):
            self.num_skipped += tensor.numel() > 0
            return False
        stats = tensors.range_stats(tensor)
        found.count += stats.count
        found.counts[:NAN] += np.asarray(stats.exponents, np.int64)
        found.counts[NAN] += stats.nans
        found.counts[INF] += stats.infinities
        found.counts[ZERO] += stats.zeros
        found.amax = max(found.amax, stats.amax)
        found.smallest = min(found.smallest, stats.smallest)
        return not stats.is_finite


def tally_of(tensor: Tensor) -> Tally | None:
    """Return the range of one tensor, None for one that has no numbers to measure."""
    if not tensors.is_measurable(tensor):
        return None
    found = TensorRange(str(tensor.dtype).removeprefix("torch."))
    Ranges().add(tensor, found)
    return found.tally()
