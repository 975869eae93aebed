"""Where the time of a step goes: products, casts, everything else, and how many operations it is cut into."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

TILE = 8  # elements; tensor cores read 16-bit matrices in multiples of 16 bytes
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "convolution", "attention", "conv", "matmul", "mkldnn", "cudnn")
_CASTS = ("_to_copy", "copy_", "to")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProfile:
    """The time of a step's operations by kind, on the device where they ran, and their number.

    `off_tile` are the dimensions of products that are no multiple of the tile, smallest first.
    """

    num_operations: int
    seconds: float
    product_seconds: float
    cast_seconds: float
    off_tile: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the profile as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "StepProfile":
        """Return the profile that `to_json` wrote."""
        return cls(**{**data, "off_tile": tuple(data["off_tile"])})


def summarise(averages: Iterable[Any], *, on_device: bool) -> StepProfile:
    """Return the profile of torch.profiler's averages by operation and shape; `on_device` takes the card's times."""
    count, seconds, products, casts = 0, 0.0, 0.0, 0.0
    sizes: set[int] = set()
    for one in averages:
        if not one.key.startswith(("aten::", "mezzotint")):
            continue
        name = one.key.split("::")[-1]
        time = (one.self_device_time_total if on_device else one.self_cpu_time_total) / 1e6
        count += one.count
        seconds += time
        if _is_product(name):
            products += time
            sizes.update(_dimensions(one.input_shapes or []))
        elif name in _CASTS:
            casts += time
    return StepProfile(
        num_operations=count,
        seconds=seconds,
        product_seconds=products,
        cast_seconds=casts,
        off_tile=tuple(sorted(size for size in sizes if size > TILE and size % TILE)),
    )


def _is_product(name: str) -> bool:
    return any(word == name or (len(word) > 4 and word in name) for word in _PRODUCTS)


def _dimensions(shapes: Iterable[Any]) -> list[int]:
    """Return the last two dimensions of each matrix among an operation's inputs."""
    return [size for shape in shapes if isinstance(shape, (list, tuple)) and len(shape) >= 2 for size in shape[-2:]]
