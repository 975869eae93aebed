"""Known accelerators: published dense peaks, memory, and the best matmul speeds that people reported.

The table is `devices.csv`, one row per device, with the source of its figures and what to know about them. Peaks are
dense (vendors like to print the sparse figure, twice as large), with float32 accumulation, in 10**12 operations per
second; memory is in GiB, bandwidth in 10**9 bytes per second. An empty cell means that no source was found.

Lookup compares whole names: an "H100 NVL" is no "H100 PCIe", a 4090 D or a MIG slice no 4090. A device that is not in
the table stays unknown.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

GIB = 1 << 30

_VENDOR_WORDS = re.compile(r"\b(nvidia|tesla|geforce|quadro|amd|instinct|graphics)\b|\((r|tm)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator. None, or a format that is missing, means that no source states the figure.

    `compute_capability` is NVIDIA's, `architecture` AMD's ("gfx942"). `peaks` and `achieved` are pairs of format and
    operations per second: the published dense peak, and the best square matmul that someone measured.
    """

    name: str
    vendor: str
    year: int
    device_names: tuple[str, ...]
    compute_capability: tuple[int, int] | None
    architecture: str | None
    memory_bytes: int | None
    bandwidth_bytes_per_second: float | None
    achieved_bandwidth_bytes_per_second: float | None
    peaks: tuple[tuple[str, float], ...]
    achieved: tuple[tuple[str, float], ...]
    l2_bytes: int | None
    num_multiprocessors: int | None
    source: str
    notes: str

    def peak_flops_per_second(self, format_name: str) -> float | None:
        """Return the published dense matmul peak in a format, by its full name, or None where none is known."""
        return dict(self.peaks).get(format_name)

    def achieved_flops_per_second(self, format_name: str) -> float | None:
        """Return the best matmul speed reported for a format, by its full name, or None where none is known."""
        return dict(self.achieved).get(format_name)


@cache
def device_specs() -> tuple[DeviceSpec, ...]:
    """Return every known device, in the order of the table."""
    text = resources.files("mezzotint.hardware").joinpath("devices.csv").read_text(encoding="utf-8")
    return tuple(_spec(row) for row in csv.DictReader(text.splitlines()))


def find_device(name: str) -> DeviceSpec | None:
    """Return the device that a driver calls `name`, or that the table does; None where it is unknown.

    >>> find_device("NVIDIA A100-SXM4-80GB").peak_flops_per_second("bfloat16")
    312000000000000.0
    """
    return _by_name().get(_key(name))


@cache
def _by_name() -> dict[str, DeviceSpec]:
    return {_key(word): spec for spec in device_specs() for word in (spec.name, *spec.device_names)}


def _key(name: str) -> str:
    """Return `name` without vendor words, case, spaces and punctuation."""
    return re.sub(r"[^a-z0-9]", "", _VENDOR_WORDS.sub(" ", name.lower()))


def _spec(row: Mapping[str, str]) -> DeviceSpec:
    return DeviceSpec(
        name=row["name"],
        vendor=row["vendor"],
        year=int(row["year"]),
        device_names=tuple(row["device_names"].split(";")),
        compute_capability=parse_capability(row["compute_capability"]),
        architecture=row["architecture"] or None,
        memory_bytes=_int(row["memory_gib"], GIB),
        bandwidth_bytes_per_second=_float(row["bandwidth_gb_per_second"], 1e9),
        achieved_bandwidth_bytes_per_second=_float(row["achieved_bandwidth_gb_per_second"], 1e9),
        peaks=_rates(row, "peak_"),
        achieved=_rates(row, "achieved_"),
        l2_bytes=_int(row["l2_mib"], 1 << 20),
        num_multiprocessors=_int(row["num_multiprocessors"], 1),
        source=row["source"],
        notes=row["notes"],
    )


def parse_capability(text: str) -> tuple[int, int] | None:
    """Return the compute capability that "8.6" spells, or None for empty text."""
    if not text:
        return None
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def _rates(row: Mapping[str, str], prefix: str) -> tuple[tuple[str, float], ...]:
    return tuple(
        (column.removeprefix(prefix), float(value) * 1e12)
        for column, value in row.items()
        if column.startswith(prefix) and value and "bandwidth" not in column
    )


def _int(text: str, unit: int) -> int | None:
    return round(float(text) * unit) if text else None


def _float(text: str, unit: float) -> float | None:
    return float(text) * unit if text else None
