"""Alarms: what a watched step says that somebody should look at, as values, judged from a row of figures.

An alarm is raised once for each place, and again only when it has become worse by the factor in `Limits.worse`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mezzotint.trace.record import LOW_PRECISION


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """When to raise an alarm.

    `headroom_bits`: powers of two left below the largest number of a format. `lost_share`: of the updates of a stored
    compact tensor. `subnormal_share`: of a float16 gradient's numbers other than 0. `halvings` of the loss scale within
    `window` steps. `skipped_share` of the steps in that window. `stopped_steps`: recorded steps in a row that leave
    every bit of a weight with a gradient as it was.
    """

    headroom_bits: float = 2.0
    lost_share: float = 0.5
    subnormal_share: float = 0.5
    halvings: int = 4
    skipped_share: float = 0.25
    window: int = 100
    stopped_steps: int = 3
    worse: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something measured beyond a limit: `kind`, where, what was measured, and what to do."""

    kind: str
    step: int
    place: str
    measured: float
    limit: float
    message: str
    advice: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the alarm as a line of metrics."""
        return {
            "kind": "alarm",
            "alarm": self.kind,
            "step": self.step,
            "place": self.place,
            "measured": self.measured,
            "limit": self.limit,
            "message": self.message,
            "advice": self.advice,
            **({"details": dict(self.details)} if self.details else {}),
        }


def row_alarms(row: Mapping[str, Any], limits: Limits) -> Iterator[Alarm]:
    """Yield the alarms of one watched step; `row` is what `mezzotint.trace.watch` writes."""
    step = row["step"]
    for name, module in row["modules"].items():
        for phase, found in module.items():
            yield from _range_alarms(step, f"{name} {phase}", found, limits)
    for found in row["updates"]["worst"]:
        if found["dtype"] in LOW_PRECISION and found["share_lost"] > limits.lost_share:
            yield Alarm(
                kind="lost-updates",
                step=step,
                place=found["name"],
                measured=found["share_lost"],
                limit=limits.lost_share,
                message=f"{found['share_lost']:.0%} of the updates of {found['name']} ({found['dtype']}) are "
                "rounded away",
                advice="keep it in float32, or use stochastic rounding or Kahan compensation",
            )
    for birth in row["births"]:
        yield Alarm(
            kind="not-finite",
            step=step,
            place=f"{birth['module'] or 'outside modules'} {birth['op']}",
            measured=float(birth["nans"] + birth["infinities"]),
            limit=0.0,
            message=f"{birth['op']} in {birth['module'] or 'the program'} ({birth['phase']}, {birth['line']}) makes "
            f"{birth['infinities']} infinities and {birth['nans']} NaN out of finite numbers; in float32: "
            f"{birth['wide']}",
            advice="keep this operation in float32" if birth["wide"] == "finite" else "look at its inputs",
            details=birth,
        )


def _range_alarms(step: int, place: str, found: Mapping[str, Any], limits: Limits) -> Iterator[Alarm]:
    dtype, headroom = found["dtype"], found["headroom_bits"]
    if dtype not in LOW_PRECISION:
        return
    if headroom is not None and headroom < limits.headroom_bits:
        yield Alarm(
            kind="range",
            step=step,
            place=place,
            measured=headroom,
            limit=limits.headroom_bits,
            message=f"{place} reaches {found['amax']:.4g} in {dtype}, {headroom:.1f} bits below its largest number",
            advice="a lower loss scale for gradients, float32 for this module, or bfloat16",
        )
    if place.endswith("backward") and dtype == "float16" and found["subnormal"] > limits.subnormal_share:
        yield Alarm(
            kind="subnormal-gradients",
            step=step,
            place=place,
            measured=found["subnormal"],
            limit=limits.subnormal_share,
            message=f"{found['subnormal']:.0%} of the gradients of {place} are subnormal in float16",
            advice="a larger loss scale, or bfloat16",
        )


class Raised:
    """Which alarms were raised, and how bad they were."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._worst: dict[tuple[str, str], float] = {}

    def is_new(self, alarm: Alarm) -> bool:
        """Return whether an alarm is the first at its place, or much worse than the last one raised there."""
        key = (alarm.kind, alarm.place)
        last = self._worst.get(key)
        # every measure grows with the harm but headroom, which shrinks
        harm = 2.0**-alarm.measured if alarm.kind == "range" else alarm.measured
        if last is not None and harm < last * self._limits.worse:
            return False
        self._worst[key] = harm
        return True


class StoppedWeights:
    """The weights that have a gradient and do not move, by how many recorded steps in a row."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._counts: dict[str, int] = {}

    def add(self, row: Mapping[str, Any]) -> Iterator[Alarm]:
        """Add a row; yield an alarm for each weight that has stopped."""
        limit = self._limits.stopped_steps
        for name, is_unmoved in row["updates"].get("unmoved", {}).items():
            count = self._counts[name] = self._counts.get(name, 0) + 1 if is_unmoved else 0
            if count == limit:
                yield Alarm(
                    kind="stopped-weights",
                    step=row["step"],
                    place=name,
                    measured=float(count),
                    limit=float(limit),
                    message=f"{name} has gradients, but its bits have not changed in the last {count} recorded steps",
                    advice="updates are rounded away (keep a float32 copy), or the optimizer's state is infinite",
                )


class ScaleHistory:
    """The loss scale and the skipped steps of the last steps."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._steps: list[tuple[int, float | None, bool]] = []

    def add(self, step: int, scale: float | None, *, is_skipped: bool) -> Iterator[Alarm]:
        """Add a step; yield the alarms that follow. The first halvings of a run are its search for a scale."""
        limits = self._limits
        self._steps = [*self._steps[-limits.window + 1 :], (step, scale, is_skipped)]
        scales = [one for _, one, _ in self._steps if one is not None]
        falls = sum(later < earlier for earlier, later in pairwise(scales))
        if step >= limits.window and falls >= limits.halvings and scales[-1] < scales[0]:
            yield Alarm(
                kind="falling-scale",
                step=step,
                place="loss scale",
                measured=float(falls),
                limit=float(limits.halvings),
                message=f"the loss scale fell {falls} times within {len(self._steps)} steps, to {scales[-1]:g}",
                advice="gradients overflow float16 again and again: mezzotint audit names the operation",
            )
        if scales and scales[-1] < 1.0:
            yield Alarm(
                kind="tiny-scale",
                step=step,
                place="loss scale",
                measured=1.0 / max(scales[-1], 1e-45),
                limit=1.0,
                message=f"the loss scale is {scales[-1]:g}: below 1 it makes gradients smaller",
                advice="look for the operation that overflows; bfloat16 needs no scale",
            )
        skipped = sum(one for *_, one in self._steps)
        if step >= limits.window and skipped > limits.skipped_share * len(self._steps):
            yield Alarm(
                kind="skipped-steps",
                step=step,
                place="steps",
                measured=skipped / len(self._steps),
                limit=limits.skipped_share,
                message=f"{skipped} of the last {len(self._steps)} steps were skipped",
                advice="gradients overflow again and again: mezzotint audit names the operation",
            )
