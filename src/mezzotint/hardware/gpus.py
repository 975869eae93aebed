"""Finding a card by the name that people use, and cards of one's own in TOML files."""

import difflib
import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mezzotint.errors import PlanError, shortened
from mezzotint.files import read_regular
from mezzotint.hardware.devices import GIB, DeviceSpec, device_specs, find_device, parse_capability

# what people mean when they name a card without its form
_USUAL = {
    "v100": "V100-SXM2-32GB",
    "a100": "A100-SXM-80GB",
    "a10040gb": "A100-SXM-40GB",
    "a10080gb": "A100-SXM-80GB",
    "a10080g": "A100-SXM-80GB",
    "a10040g": "A100-SXM-40GB",
    "h100": "H100-SXM-80GB",
    "h100pcie": "H100-PCIe-80GB",
    "h100sxm": "H100-SXM-80GB",
    "h200": "H200-SXM-141GB",
    "gh200": "GH200-96GB",
    "3090": "RTX3090",
    "4090": "RTX4090",
    "5090": "RTX5090",
    "2080ti": "RTX2080Ti",
    "a6000": "RTX A6000",
}


def find_gpu(name: str) -> DeviceSpec:
    """Return the card that `name` means: a name of the table, a usual short one, or a TOML file that defines one.

    Raises PlanError that offers the nearest names, or says what a file lacks.
    """
    if name.endswith(".toml"):
        return _from_file(Path(name))
    key = re.sub(r"[^a-z0-9]", "", re.sub(r"\b(nvidia|geforce|tesla)\b", "", name.lower()))
    found = find_device(_USUAL.get(key, name))
    if found is None:
        raise PlanError(f"no GPU named {name!r} is known; {_nearest(name, key)}, or define one in a TOML file")
    return found


def gpu_names() -> list[str]:
    """Return the names of the cards that can be planned for: CUDA cards with known bandwidth and memory."""
    return [spec.name for spec in device_specs() if spec.compute_capability is not None]


def _nearest(name: str, key: str) -> str:
    keys = {re.sub(r"[^a-z0-9]", "", one.lower()): one for one in gpu_names()}
    short = {word: word.upper() for word in _USUAL}
    near = difflib.get_close_matches(key, [*short, *keys], n=3, cutoff=0.4)
    names = list(dict.fromkeys(short.get(one) or keys[one] for one in near))
    return f"did you mean {' or '.join(names)}" if names else f"known are {', '.join(gpu_names())}"


def _from_file(path: Path) -> DeviceSpec:
    """Read a card from TOML: `base` names a known one to start from, other keys replace its figures."""
    try:
        data = tomllib.loads(read_regular(path).decode())
    except OSError as error:
        raise PlanError(f"{shortened(path)} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise PlanError(f"{path} is not TOML: {shortened(error)}") from None
    base = data.pop("base", None)
    if not isinstance(base, str):
        raise PlanError(f'{path} needs base = "NAME", the known card that it is most like; then give what differs')
    spec = find_gpu(base)
    changes: dict[str, Any] = {"name": path.stem, "device_names": (*spec.device_names, spec.name)}
    for key, value in data.items():
        changes.update(_change(path, spec, key, value))
    return replace(spec, **changes)


def _change(path: Path, spec: DeviceSpec, key: str, value: Any) -> dict[str, Any]:
    units = {
        "memory_gib": ("memory_bytes", GIB),
        "l2_mib": ("l2_bytes", 1 << 20),
        "bandwidth_gb_per_second": ("bandwidth_bytes_per_second", 1e9),
        "achieved_bandwidth_gb_per_second": ("achieved_bandwidth_bytes_per_second", 1e9),
    }
    if key in units:
        name, unit = units[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise PlanError(f"{path}: {key} = {value!r} is not a positive number")
        return {name: int(value * unit) if isinstance(unit, int) else value * unit}
    if key == "compute_capability":
        return {key: parse_capability(str(value))}
    if key in ("peaks", "achieved"):
        if not isinstance(value, dict):
            raise PlanError(f"{path}: {key} is a table of format = TFLOP/s")
        return {key: tuple({**dict(getattr(spec, key)), **{k: float(v) * 1e12 for k, v in value.items()}}.items())}
    if key in ("name", "num_multiprocessors", "notes"):
        return {key: value}
    known = [*units, "compute_capability", "peaks", "achieved", "name", "num_multiprocessors", "notes"]
    assert {one.name for one in fields(DeviceSpec)} >= {"peaks", "achieved"}
    raise PlanError(f"{path}: {key} is no figure of a card; known are {', '.join(known)}")
