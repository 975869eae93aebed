"""Experiment: what will be compared and how it will be judged, fixed and written down before the first step.

A design is a frozen value; `digest` is what runs and results refer to, so that figures of another design are never
mixed in. Pure: it loads without torch.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from mezzotint.errors import ConfigError


class Better(StrEnum):
    """Which direction of a metric is good; NEITHER means that any difference is a departure."""

    LOWER = "lower"
    HIGHER = "higher"
    NEITHER = "neither"


class Source(StrEnum):
    """What trains."""

    RECIPE = "recipe"  # our own language model; `target` is a recipe's name, `recipe_toml` its whole configuration
    SCRIPT = "script"  # SCRIPT.py:make_run, called as make_run(seed, policy, **settings)
    CODE = "code"  # the user's own loop, inside `with mz.prove(...)`


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train: a policy's text and further settings, as `key=value` texts.

    Settings are recipe settings (`train.compile=true`), or keyword arguments of the user's `make_run`.
    """

    name: str
    policy: str
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse names that cannot be folders."""
        if not self.name or not self.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise ConfigError(f"arm name {self.name!r} is refused; use letters, digits, '-', '_' and '.'")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure of a run that is compared in pairs, and the largest difference that does not matter.

    `margin` is a share of the control's value where `is_relative`, else in the metric's own unit. Only primary metrics
    decide the verdict; the others are shown.
    """

    name: str
    margin: float
    is_relative: bool = True
    better: Better = Better.LOWER
    is_primary: bool = True

    def __post_init__(self) -> None:
        """Refuse a margin that nothing can meet."""
        if not (0 < self.margin < math.inf):
            raise ConfigError(f"margin {self.margin} of {self.name} is refused; pass a number above 0")


# What runs of recipes record by themselves. A script's runs record `final_loss`, `curve` and what they return.
VALIDATION_LOSS = Metric(name="validation_loss", margin=0.005)  # at the end, nats per token
FINAL_LOSS = Metric(name="final_loss", margin=0.005)  # mean training loss of the last tenth of the steps
CURVE = Metric(name="curve", margin=0.005, better=Better.LOWER)  # mean training loss over all steps: area under it
DISTANCE = Metric(name="distance", margin=0.01, better=Better.NEITHER, is_primary=False)  # |weights - initial weights|
# of the arm's policy at the control's weights, against float64: relative error of the gradient, and mean absolute
# difference of the log-probabilities of the targets, in nats. Both are near 0 in float32: no share of it is a margin
GRADIENT_ERROR = Metric(name="gradient_error", margin=0.05, is_relative=False, is_primary=False)
LOG_PROB_ERROR = Metric(name="log_prob_error", margin=0.01, is_relative=False, is_primary=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A frozen design. The first arm is the control; every other arm is compared with it, seed by seed.

    `seeds` are run at least. With `max_seeds` above their number the experiment is sequential: after each further
    seed it is judged again, with error rates corrected for the repeated looks, until it is decided. `alpha` is the
    largest chance of a false "equivalent" (and of a false "worse" or "better" together). `min_learning` is the share
    of its first loss by which the control's loss has to fall, or nothing was tested.
    """

    source: Source
    target: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    steps: int | None
    metrics: tuple[Metric, ...]
    max_seeds: int = 0
    alpha: float = 0.05
    power: float = 0.8
    min_learning: float = 0.1
    arguments: tuple[str, ...] = ()
    recipe_toml: str = ""

    def __post_init__(self) -> None:
        """Refuse designs that cannot be judged."""
        names = [arm.name for arm in self.arms]
        if len(names) < 2:
            raise ConfigError(f"an experiment of {len(names)} arm is refused; give a control and at least one other")
        for kind, values in (("arm", names), ("seed", self.seeds), ("metric", [m.name for m in self.metrics])):
            twice = [value for value in values if list(values).count(value) > 1]
            if twice:
                raise ConfigError(f"{kind} {twice[0]} is given twice; leave one out")
        if len(self.seeds) < 2:
            raise ConfigError(f"{len(self.seeds)} seed is refused: a spread needs at least 2; 3 or more are better")
        if any(not 0 <= seed < 2**32 for seed in self.seeds):
            raise ConfigError(f"seeds {self.seeds} are refused; pass numbers from 0 to 2**32 - 1")
        if not any(metric.is_primary for metric in self.metrics):
            raise ConfigError("no metric is primary, so nothing decides the verdict; name one with --metric")
        for name, value, low, high in (
            ("alpha", self.alpha, 0, 0.5), ("power", self.power, 0, 1), ("min_learning", self.min_learning, -1, 1)
        ):  # fmt: skip
            if not low < value < high:
                raise ConfigError(f"{name}={value} is refused; pass a number between {low} and {high}")
        if self.max_seeds and self.max_seeds < len(self.seeds):
            raise ConfigError(f"max_seeds={self.max_seeds} is below the {len(self.seeds)} seeds; raise it")

    @property
    def control(self) -> Arm:
        """The arm that the others are compared with."""
        return self.arms[0]

    @property
    def treatments(self) -> tuple[Arm, ...]:
        """The other arms."""
        return self.arms[1:]

    @property
    def is_sequential(self) -> bool:
        """Whether seeds are added until the verdict stands."""
        return self.max_seeds > len(self.seeds)

    def all_seeds(self) -> tuple[int, ...]:
        """Return the seeds in the order in which they are run, further ones of a sequential design included."""
        further, seed = list(self.seeds), max(self.seeds)
        while len(further) < self.max_seeds:
            seed = (seed + 1) % 2**32
            if seed not in further:
                further.append(seed)
        return tuple(further)

    def to_json(self) -> dict[str, Any]:
        """Return the design as JSON; `from_json` reads it back to an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Experiment":
        """Return the design that `to_json` wrote."""
        values = dict(data)
        values["source"] = Source(values["source"])
        values["arms"] = tuple(Arm(**{**arm, "settings": tuple(arm["settings"])}) for arm in values["arms"])
        values["metrics"] = tuple(Metric(**{**one, "better": Better(one["better"])}) for one in values["metrics"])
        for name in ("seeds", "arguments"):
            values[name] = tuple(values[name])
        return cls(**values)

    @property
    def digest(self) -> str:
        """A hash of everything in the design, 16 hexadecimal digits."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def replace(self, **changes: Any) -> "Experiment":
        """Return a design with some fields changed, checked again."""
        return replace(self, **changes)
