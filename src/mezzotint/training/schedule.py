"""The learning rate by step: linear warm-up, then decay. A pure function, so that a resumed run needs no history."""

import math
from collections.abc import Callable

from mezzotint.training.config import ScheduleConfig


def learning_rate_share(schedule: ScheduleConfig, num_steps: int) -> Callable[[int], float]:
    """Return the function from step, counted from 0, to the share of the peak learning rate.

    The share rises linearly to 1 over the warm-up, reaching it at step `warmup_steps`, and falls to `final_share` at
    the last step along half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts) or a line.
    """
    warmup, final = schedule.warmup_steps, schedule.final_share
    length = max(num_steps - 1 - warmup, 1)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / length, 1.0)
        if schedule.decay == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if schedule.decay == "linear":
            return final + (1 - final) * (1 - progress)
        return 1.0

    return share
