"""Loss scaling as a value: the next scale follows from "were the gradients finite", nothing else.

With the defaults the sequence of scales is that of torch.amp.GradScaler (initial 65536, doubled after 2000 good
updates, halved at each overflow) as long as it stays within floor and ceiling. Beyond torch:

- a floor: torch halves without end, reaches 0.0, divides by it and writes NaN into the weights;
- a ceiling: 2**64 by default, where the smallest float16 number, 2**-24, stands for a gradient of 2**-88, far below
  anything that moves a float32 weight;
- hysteresis: the scale falls only at the n-th overflow since it last grew (Megatron-LM's DynamicGradScaler);
- a skip budget: so many overflows in a row end the run with an error, since they are no longer a search for the
  right scale.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

from mezzotint.errors import PolicyError


class ScalingKind(StrEnum):
    """How the loss is scaled before backward."""

    NONE = "none"
    STATIC = "static"
    DYNAMIC = "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """The settings of loss scaling; part of a Policy. Text forms: `none`, `static(1024)`, `dynamic(floor=0.5)`."""

    kind: ScalingKind = ScalingKind.NONE
    initial: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000
    floor: float = 1.0
    ceiling: float = 2.0**64
    hysteresis: int = 1
    skip_budget: int = 50

    def __post_init__(self) -> None:
        """Bring the numbers into float32, where torch keeps a scale, and refuse settings that could not work."""
        try:
            object.__setattr__(self, "kind", ScalingKind(self.kind))
        except ValueError:
            raise PolicyError(f"unknown scaling {self.kind!r}; pass {', '.join(ScalingKind)}") from None
        for f in fields(self)[1:]:
            object.__setattr__(
                self, f.name, _setting(f.name, getattr(self, f.name), is_whole=isinstance(f.default, int))
            )
        if self.kind is ScalingKind.NONE and any(getattr(self, f.name) != f.default for f in fields(self)[1:]):
            raise PolicyError("scaling=none takes no settings; say scaling=dynamic(...) or scaling=static(1024)")
        checks = (
            (0 < self.initial < math.inf, "initial", self.initial, "a positive finite float32 such as 65536"),
            (1 < self.growth_factor < math.inf, "growth_factor", self.growth_factor, "more than 1, such as 2"),
            (0 < self.backoff_factor < 1, "backoff_factor", self.backoff_factor, "between 0 and 1, such as 0.5"),
            (self.growth_interval >= 1, "growth_interval", self.growth_interval, "at least 1, such as 2000"),
            (self.floor > 0, "floor", self.floor, "more than 0 in float32, since a scale of 0 erases every gradient"),
            (self.ceiling < 2.0**127, "ceiling", self.ceiling, "below 2**127, the end of float32"),
            (self.hysteresis >= 1, "hysteresis", self.hysteresis, "at least 1"),
            (self.skip_budget >= 1, "skip_budget", self.skip_budget, "at least 1"),
        )
        for is_good, name, value, limit in checks:
            if not is_good:
                raise PolicyError(f"scaling: {name}={value} is refused; pass {limit}")
        if self.kind is ScalingKind.DYNAMIC and not self.floor <= self.initial <= self.ceiling:
            raise PolicyError(
                f"scaling: initial={self.initial:g} lies outside floor={self.floor:g} and "
                f"ceiling={self.ceiling:g}; move it between them"
            )

    def __str__(self) -> str:
        if self.kind is ScalingKind.NONE:
            return "none"
        given = {f.name: getattr(self, f.name) for f in fields(self)[1:] if getattr(self, f.name) != f.default}
        if self.kind is ScalingKind.STATIC:
            initial = given.pop("initial", self.initial)
            words = [_number(initial), *(f"{k}={_number(v)}" for k, v in given.items())]
            return f"static({', '.join(words)})"
        words = [f"{k}={_number(v)}" for k, v in given.items()]
        return f"dynamic({', '.join(words)})" if words else "dynamic"


def _setting(name: str, value: Any, *, is_whole: bool) -> float | int:
    """Return a setting as an int, or as a float that float32 holds (the factors stay float64, as torch keeps them)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or (is_whole and not isinstance(value, int)):
        raise PolicyError(f"scaling: {name}={value!r} is refused; pass {'a whole number' if is_whole else 'a number'}")
    if is_whole:
        return value
    return float(value) if name.endswith("factor") else _float32(float(value))


def _number(value: float) -> str:
    """Return the shortest text that reads back as `value`."""
    return repr(int(value)) if float(value).is_integer() and abs(value) < 2**53 else repr(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """The state of a loss scale: what a checkpoint stores and what one update turns into the next."""

    settings: Scaling
    scale: float
    growth_tracker: int = 0
    hysteresis_left: int = 1
    skips_in_a_row: int = 0

    @classmethod
    def start(cls, settings: Scaling) -> "LossScale":
        """Return the state before the first update; a scale of exactly 1 where nothing is scaled."""
        scale = 1.0 if settings.kind is ScalingKind.NONE else _float32(settings.initial)
        return cls(settings=settings, scale=scale, hysteresis_left=settings.hysteresis)

    def after(self, gradients_finite: bool) -> "LossScale":
        """Return the state after an update whose unscaled gradients were finite, or were not."""
        skips = 0 if gradients_finite else self.skips_in_a_row + 1
        if self.settings.kind is not ScalingKind.DYNAMIC:
            return replace(self, skips_in_a_row=skips)
        if not gradients_finite:
            left = self.hysteresis_left - 1
            lowered = min(self.scale, max(_float32(self.scale * self.settings.backoff_factor), self.settings.floor))
            return replace(
                self,
                scale=lowered if left <= 0 else self.scale,
                growth_tracker=0,
                hysteresis_left=max(left, 0),
                skips_in_a_row=skips,
            )
        if self.growth_tracker + 1 < self.settings.growth_interval:
            return replace(self, growth_tracker=self.growth_tracker + 1, skips_in_a_row=0)
        return replace(
            self,
            scale=min(_float32(self.scale * self.settings.growth_factor), self.settings.ceiling),
            growth_tracker=0,
            hysteresis_left=self.settings.hysteresis,
            skips_in_a_row=0,
        )

    def exhausted_by(self, gradients_finite: bool) -> str | None:
        """Return why no smaller scale can help after this update, or None while one can."""
        if gradients_finite:
            return None
        settings = self.settings
        if settings.kind is ScalingKind.DYNAMIC and self.scale <= settings.floor:
            return f"the loss scale already stands at its floor, {settings.floor:g}, so scaling is not the cause"
        if self.skips_in_a_row + 1 >= settings.skip_budget:
            return f"{self.skips_in_a_row + 1} updates in a row were skipped, which is the skip budget"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON, every field of the state once; the settings belong to the policy."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}

    @classmethod
    def from_json(cls, settings: Scaling, data: Mapping[str, Any]) -> "LossScale":
        """Return the state that `to_json` wrote, or that a torch.amp.GradScaler's state_dict describes.

        Raises PolicyError for anything else, and for a scale that the settings could not have reached.

        A GradScaler state brings scale and growth tracker; floor, ceiling and hysteresis stay as set here. The
        empty state that a disabled GradScaler saves starts afresh.
        """
        if not isinstance(data, Mapping):
            raise PolicyError(f"this is no loss-scale state but a {type(data).__name__}; {_PASS_A_STATE}")
        if not data:
            return cls.start(settings)
        if "_growth_tracker" in data:
            data = {"scale": data.get("scale"), "growth_tracker": data["_growth_tracker"]}
        known = {f.name for f in fields(cls)} - {"settings"}
        unknown = sorted(map(str, set(data) - known))
        if unknown or "scale" not in data:
            what = f"has {', '.join(unknown)}" if unknown else "lacks scale"
            raise PolicyError(f"this is no loss-scale state: it {what}; {_PASS_A_STATE}")
        for name, value in data.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            is_count = isinstance(value, int) and value >= 0
            if not is_number or (name != "scale" and not is_count):
                raise PolicyError(f"this is no loss-scale state: {name} is {value!r}; {_PASS_A_STATE}")
        state = replace(cls.start(settings), **{**data, "scale": _float32(float(data["scale"]))})
        if not 0 < state.scale < math.inf:
            raise PolicyError(f"a loss scale of {state.scale} cannot be resumed from; start with a fresh one")
        if settings.kind is ScalingKind.NONE and state.scale != 1.0:
            raise PolicyError(
                f"a loss scale of {state.scale:g} was saved, and scaling=none has none; pass scaling=dynamic"
            )
        if settings.kind is ScalingKind.DYNAMIC and not settings.floor <= state.scale <= settings.ceiling:
            raise PolicyError(
                f"the saved loss scale, {state.scale:g}, lies outside floor={settings.floor:g} and "
                f"ceiling={settings.ceiling:g}; pass scaling=dynamic(floor=...) that holds it, or start afresh"
            )
        return state


_PASS_A_STATE = "pass what Engine.state_dict() or torch.amp.GradScaler.state_dict() returned"


def _float32(value: float) -> float:
    """Return `value` rounded to float32, the format in which torch keeps its scale."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.inf
