"""Optimizers that step in turns, as those of a GAN: one round of them is what a user calls a step."""

from collections.abc import Sequence
from dataclasses import replace

from mezzotint.trace.record import StepRecord


class Rounds:
    """Steps by the optimizer that made them. A round ends before an optimizer steps for the second time in it."""

    def __init__(self) -> None:
        self._rounds: list[tuple[set[int], list[int]]] = []  # optimizers and the indices of their steps
        self._num_steps = 0

    def see(self, optimizer: int, num_steps: int) -> None:
        """Note that an optimizer has stepped, and how many steps were counted until now."""
        if num_steps == self._num_steps:
            if self._rounds:  # it stepped right after another, without a backward pass between
                self._rounds[-1][0].add(optimizer)
            return
        self._num_steps = num_steps
        if not self._rounds or optimizer in self._rounds[-1][0]:
            self._rounds.append((set(), []))
        optimizers, steps = self._rounds[-1]
        optimizers.add(optimizer)
        steps.append(num_steps - 1)

    def are_over(self, wanted: int) -> bool:
        """Whether so many rounds are complete; the last is when it has all optimizers of the one before."""
        if len(self._rounds) != wanted or wanted == 1:
            return len(self._rounds) >= wanted
        return self._rounds[-1][0] >= self._rounds[-2][0]

    def merged(self, steps: Sequence[StepRecord]) -> list[StepRecord]:
        """Return one record for each round."""
        found: list[StepRecord] = []
        for _, indices in self._rounds:
            ones = [steps[index] for index in indices if index < len(steps)]
            if ones:
                found.append(
                    replace(
                        ones[-1],
                        index=len(found),
                        first=ones[0].first,
                        seconds=sum(one.seconds for one in ones),
                        optimizers=tuple(name for one in ones for name in one.optimizers),
                        is_skipped=all(one.is_skipped for one in ones),
                    )
                )
        return found or list(steps)
