"""What runs leave and what is concluded from them: values only, to JSON and back. Pure: it loads without torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from mezzotint.parity.design import Experiment


class RunStatus(StrEnum):
    """How a run ended."""

    FINISHED = "finished"
    DIVERGED = "diverged"  # its loss became NaN or infinite, or the engine gave up
    OUT_OF_MEMORY = "out of memory"
    FAILED = "failed"  # an error in the user's code; `message` says which


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One arm trained with one seed. `values` holds its metrics by name, finite ones only.

    `seconds` has the time of each step, `baseline_seconds` that of the control's step which ran right before or after
    it (empty where they did not take turns). `memory_bytes` is by class: weights, masters, states, gradients,
    activations, cast_cache, temporaries, and peak. `weights_digest` is a hash of the final weights' bits. `losses`
    holds every step's training loss, up to the one that was not finite.
    """

    arm: str
    seed: int
    status: RunStatus
    losses: tuple[float, ...]
    values: dict[str, float]
    message: str = ""
    seconds: tuple[float, ...] = ()
    baseline_seconds: tuple[float, ...] = ()
    tokens_per_step: int | None = None
    memory_bytes: dict[str, int] = field(default_factory=dict)
    num_parameters: int | None = None
    weights_digest: str = ""
    skipped_steps: int = 0
    is_traded_off: bool = False  # whether other runs were computing beside it, so that its times say little

    def to_json(self) -> dict[str, Any]:
        """Return the run as JSON with NaN and infinity spelled as texts."""
        data = asdict(self)
        data["losses"] = [loss if math.isfinite(loss) else str(loss) for loss in self.losses]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Run":
        """Return the run that `to_json` wrote."""
        values = dict(data)
        values["status"] = RunStatus(values["status"])
        values["losses"] = tuple(float(loss) for loss in values["losses"])
        for name in ("seconds", "baseline_seconds"):
            values[name] = tuple(values[name])
        return cls(**values)


class Verdict(StrEnum):
    """What can be said of a treatment against the control."""

    IDENTICAL = "identical"  # the same bits in every run
    EQUIVALENT = "equivalent"  # the difference is within the margin, by two one-sided tests
    BETTER = "better"
    WORSE = "worse"
    UNDECIDED = "undecided"
    INVALID = "invalid"  # nothing was tested: the control did not learn, or too few pairs ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean with a confidence interval at `level` (0.9 says 90 %)."""

    low: float
    mean: float
    high: float
    level: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """One metric of one treatment. `difference` is treatment minus control, signed as the metric is.

    It is a share of the control's value where the metric is relative. `interval` is the one that equivalence is read
    from (level 1 - 2 alpha, corrected for looks), `wide` the one that differences are read from (1 - alpha).
    `seeds_needed` estimates how many pairs would decide, where it is undecided and an estimate exists.
    """

    name: str
    num_pairs: int
    control: float
    treatment: float
    differences: tuple[float, ...]
    interval: Interval | None
    wide: Interval | None
    margin: float
    is_relative: bool
    is_primary: bool
    verdict: Verdict
    reason: str
    seeds_needed: int | None = None

    @property
    def is_beyond(self) -> bool:
        """Whether the difference is shown to be larger than the margin."""
        return self.wide is not None and (self.wide.low >= self.margin or self.wide.high <= -self.margin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A ratio of treatment to control, such as the time of a step, with an interval over the seeds where they vary.

    `control` and `treatment` are the figures themselves, in `unit`.
    """

    name: str
    unit: str
    control: float
    treatment: float
    ratio: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """The verdict on one treatment, with its reasons in words, its metrics, and what it costs against the control."""

    arm: str
    verdict: Verdict
    reasons: tuple[str, ...]
    metrics: tuple[MetricResult, ...]
    costs: tuple[Cost, ...] = ()
    seeds_needed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """A whole experiment: its design, its runs, and a verdict for each treatment.

    `machine` holds facts of where it ran, `command` what was typed; `notes` are further sentences for the reader, such
    as why nothing became faster.
    """

    experiment: Experiment
    runs: tuple[Run, ...]
    results: tuple[ArmResult, ...]
    machine: dict[str, str]
    command: str
    date: str
    num_looks: int = 1
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 all equivalent or better, 1 one is worse or nothing was tested, 3 undecided."""
        verdicts = {result.verdict for result in self.results}
        if verdicts & {Verdict.WORSE, Verdict.INVALID}:
            return 1
        return 3 if Verdict.UNDECIDED in verdicts else 0

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON, without a schema."""
        data = asdict(self)
        data["experiment"] = self.experiment.to_json()
        data["digest"] = self.experiment.digest
        data["runs"] = [run.to_json() for run in self.runs]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Proof":
        """Return the proof that `to_json` wrote."""
        values = {key: data[key] for key in ("machine", "command", "date", "num_looks")}
        return cls(
            experiment=Experiment.from_json(data["experiment"]),
            runs=tuple(Run.from_json(run) for run in data["runs"]),
            results=tuple(_arm_result(one) for one in data["results"]),
            notes=tuple(data["notes"]),
            **values,
        )


def _arm_result(data: Mapping[str, Any]) -> ArmResult:
    return ArmResult(
        arm=data["arm"],
        verdict=Verdict(data["verdict"]),
        reasons=tuple(data["reasons"]),
        metrics=tuple(
            MetricResult(
                **{
                    **one,
                    "verdict": Verdict(one["verdict"]),
                    "differences": tuple(one["differences"]),
                    "interval": Interval(**one["interval"]) if one["interval"] else None,
                    "wide": Interval(**one["wide"]) if one["wide"] else None,
                }
            )
            for one in data["metrics"]
        ),
        costs=tuple(Cost(**{**one, "ratio": Interval(**one["ratio"])}) for one in data["costs"]),
        seeds_needed=data["seeds_needed"],
    )
