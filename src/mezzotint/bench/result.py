"""What a benchmark found, as values: samples, and what may be concluded from them. No clock, no torch."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from mezzotint.bench.cases import Case, Op
from mezzotint.errors import DataError

SCHEMA = "mezzotint.bench/1"
TOO_NOISY = 0.15  # relative spread of the same call against itself from which a case says nothing
LEAST_SAMPLES = 5


class Verdict(StrEnum):
    """What the samples allow one to say of two times."""

    FASTER = "faster"
    SLOWER = "slower"
    EVEN = "even"
    UNCLEAR = "too noisy to tell"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One operation, shape and format: seconds of each call, round by round, the first taken in the first round.

    `kernels` is "torch", or "mezzotint" for our own on a CPU. A format far slower than float32 has fewer rounds.
    """

    case: Case
    format: str
    kernels: str
    seconds: tuple[float, ...]

    @property
    def label(self) -> str:
        """The format, and whose kernels, where they are ours."""
        return self.format if self.kernels == "torch" else f"{self.format} ({self.kernels})"

    @property
    def median_seconds(self) -> float:
        """The median of all samples."""
        return statistics.median(self.seconds)

    @property
    def quartiles_seconds(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        return quartiles(self.seconds)

    @property
    def flops_per_second(self) -> float | None:
        """Operations per second at the median, or None where operations are not counted."""
        return None if self.case.flops is None else self.case.flops / self.median_seconds

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second at the median, each operand and result counted once."""
        return self.case.bytes_moved(self.format) / self.median_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Time relative to float32's of the same rounds: median and quartiles over rounds."""

    median: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """All formats of one case. `again` is float32 timed a second time in every round: what noise alone does.

    `refused` pairs a format with what torch said when it would not run it.
    """

    case: Case
    measurements: tuple[Measurement, ...]
    again: tuple[float, ...]
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def base(self) -> Measurement | None:
        """Float32's measurement, or None where it could not be timed."""
        return next((m for m in self.measurements if m.format == "float32"), None)

    @property
    def noise(self) -> float | None:
        """How far float32 is from itself: the larger quartile of its ratio to its second timing, less 1.

        None with fewer than 5 rounds.
        """
        if self.base is None or len(self.again) < LEAST_SAMPLES:
            return None
        low, high = quartiles([a / b for a, b in zip(self.again, self.base.seconds, strict=False)])
        return max(high, 1 / low) - 1

    def ratio(self, measurement: Measurement) -> Ratio | None:
        """Return a format's time relative to float32's, or None where float32 was not timed."""
        if self.base is None:
            return None
        ratios = [ours / base for ours, base in zip(measurement.seconds, self.base.seconds, strict=False)]
        low, high = quartiles(ratios)
        return Ratio(
            median=statistics.median(ratios), low=low, high=high, verdict=judge(low, high, self.noise, len(ratios))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """A limit of the device: `value` in FLOP/s of a format, or in bytes per second where `format` is empty.

    `source` is "published", for a card of the table, or "best measured here".
    """

    format: str
    value: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """A whole run: the device and what speed depends on (`facts`), its roofs, and the cases."""

    device: str
    name: str
    facts: Mapping[str, Any]
    roofs: tuple[Roof, ...]
    cases: tuple[CaseResult, ...]

    def roof(self, format_name: str) -> Roof | None:
        """Return the roof of a format, or of memory for "", or None where none is known."""
        return next((roof for roof in self.roofs if roof.format == format_name), None)

    @property
    def noisy(self) -> tuple[Case, ...]:
        """The cases of which the machine was too noisy to say anything."""
        return tuple(case.case for case in self.cases if case.noise is None or case.noise > TOO_NOISY)


def judge(low: float, high: float, noise: float | None, count: int) -> Verdict:
    """Return what a ratio's quartiles say, given the noise of the same call against itself.

    Faster or slower needs both quartiles beyond the noise; even needs both within it, or within 3 percent.
    """
    if noise is None or noise > TOO_NOISY or count < 2:
        # a factor of four is beyond any noise that still lets calls run through
        clear = noise is not None and noise < 1 and count >= 2
        return Verdict.SLOWER if clear and low > 4 else Verdict.FASTER if clear and high < 0.25 else Verdict.UNCLEAR
    margin = max(noise, 0.03)
    if high < 1 / (1 + margin):
        return Verdict.FASTER
    if low > 1 + margin:
        return Verdict.SLOWER
    return Verdict.EVEN if low >= 1 / (1 + margin) and high <= 1 + margin else Verdict.UNCLEAR


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and upper quartile; the value itself, twice, where there is but one."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def to_json(result: BenchResult) -> dict[str, Any]:
    """Return the run as the JSON object of `mezzotint.bench/1`, without the key "schema"."""
    cases = []
    for found in result.cases:
        rows = []
        for measurement in found.measurements:
            low, high = measurement.quartiles_seconds
            ratio, roof = found.ratio(measurement), result.roof(measurement.format)
            speed = measurement.flops_per_second
            rows.append(
                {
                    "format": measurement.format,
                    "kernels": measurement.kernels,
                    "seconds": list(measurement.seconds),
                    "median_seconds": measurement.median_seconds,
                    "lower_quartile_seconds": low,
                    "upper_quartile_seconds": high,
                    "flops_per_second": speed,
                    "bytes_per_second": measurement.bytes_per_second,
                    "share_of_peak": None if speed is None or roof is None else speed / roof.value,
                    "ratio_to_float32": None if ratio is None else asdict(ratio),
                }
            )
        cases.append(
            {
                "op": found.case.op,
                "shape": list(found.case.shape),
                "flops": found.case.flops,
                "noise": found.noise,
                "again_seconds": list(found.again),
                "measurements": rows,
                "refused": [{"format": name, "reason": reason} for name, reason in found.refused],
            }
        )
    return {
        "device": result.device,
        "name": result.name,
        "facts": dict(result.facts),
        "roofs": [asdict(roof) for roof in result.roofs],
        "cases": cases,
        "too_noisy": [str(case) for case in result.noisy],
    }


def from_json(payload: Any, source: str) -> BenchResult:
    """Return the run that a JSON object holds; raise DataError, naming `source`, where it holds none."""
    if not isinstance(payload, Mapping) or payload.get("schema") != SCHEMA:
        found = payload.get("schema") if isinstance(payload, Mapping) else type(payload).__name__
        raise DataError(f"{source} is no result of `mezzotint bench --json` (schema {found!r}, wanted {SCHEMA!r})")
    try:
        return BenchResult(
            device=payload["device"],
            name=payload["name"],
            facts=payload["facts"],
            roofs=tuple(Roof(**roof) for roof in payload["roofs"]),
            cases=tuple(_case_from_json(entry) for entry in payload["cases"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{source} is damaged: {type(error).__name__}: {str(error)[:200]}; run the benchmark again"
        ) from error


def _seconds(values: Sequence[Any]) -> tuple[float, ...]:
    found = tuple(float(value) for value in values)
    if not all(0 < value < math.inf for value in found):
        raise ValueError("a time is not a positive number")
    return found


def _case_from_json(entry: Mapping[str, Any]) -> CaseResult:
    case = Case(op=Op(entry["op"]), shape=tuple(int(length) for length in entry["shape"]))
    return CaseResult(
        case=case,
        measurements=tuple(
            Measurement(
                case=case,
                format=row["format"],
                kernels=row["kernels"],
                seconds=_seconds(row["seconds"]),
            )
            for row in entry["measurements"]
        ),
        again=_seconds(entry["again_seconds"]),
        refused=tuple((row["format"], row["reason"]) for row in entry["refused"]),
    )
