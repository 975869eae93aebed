"""How long one operation takes on a card: products by tiles and waves, everything else by bytes. No torch here.

Products: the result is cut into tiles, each multiprocessor computes one tile at a time, and the last wave may be partly
empty. A tile's speed is the card's share of the matmul speed that people measured, times an efficiency by tile size.
Everything else moves bytes at the measured bandwidth. The constants are fitted on published microbenchmarks of single
operations only (`scripts/fit_rates.py`, `plan/rates.csv`), never on training steps.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import ceil

from mezzotint.errors import PlanError
from mezzotint.hardware.devices import DeviceSpec, device_specs

AMPERE, ADA, HOPPER = (8, 0), (8, 9), (9, 0)
_TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
_ALIGNMENT = {"float32": 1, "tfloat32": 4, "float16": 8, "bfloat16": 8, "float8_e4m3fn": 16, "float64": 1}
_MULTIPROCESSORS = {
    (7, 0): 80, (7, 5): 40, (8, 0): 108, (8, 6): 82, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170,
}  # fmt: skip
_DEFAULT_SHARE = 0.75
_BANDWIDTH_SHARE = 0.87  # of the published figure, where nobody measured a copy
_MIN_KERNEL = 2.0e-6


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that a kernel takes; `low` to `high` held four of five microbenchmarks. `wall` is what limits it."""

    seconds: float
    low: float
    high: float
    wall: str


@dataclass(frozen=True, slots=True)
class Rates:
    """Constants of one generation of cards, and how many measurements they were fitted on.

    `overhead` are seconds for each product, `scale` the share of the card's sustained speed that squares reach,
    `small_tile` the efficiency of a tile of half the size, `unaligned` that of a size off the tensor cores' tile,
    `busy` the speed of products in a row over that of one measured alone, `turned` that of products whose matrices both
    lie across the axis that is summed over, as for the gradient of a weight; `low` and `high` factors of the interval.
    """

    overhead: float
    scale: float
    small_tile: float
    unaligned: float
    busy: float
    turned: float
    low: float
    high: float
    rows: int


def product_time(
    card: DeviceSpec, format_name: str, m: int, n: int, k: int, batch: int = 1, *, itemsize_in: int, itemsize_out: int,
    is_busy: bool = True, num_turned: int = 0,
) -> Estimate:  # fmt: skip
    """Return the time of `batch` products of (m, k) and (k, n), by tiles, waves and bytes.

    `is_busy`: one of many, on a card at its power limit, as in a training step; else measured alone. `num_turned` of
    the two matrices do not lie along k.
    Raises PlanError for a format that the card has not got.
    """
    rates = rates_of(card)
    speed = sustained(card, format_name) * rates.scale
    if format_name not in ("float32", "float64"):  # tensor cores draw the power
        speed *= (rates.busy if is_busy else 1.0) * (rates.turned if num_turned == 2 else 1.0)
    if not min(m, n, k, batch):
        return Estimate(_MIN_KERNEL, _MIN_KERNEL, _MIN_KERNEL, "launch")
    step = _ALIGNMENT.get(format_name, 1)
    if step > 1 and (n % step or k % step):
        speed *= rates.unaligned
    processors = num_multiprocessors(card)
    best = min(_tiled(m, n, k, batch, tile, speed, processors, rates) for tile in _TILES)
    nbytes = batch * ((m * k + k * n) * itemsize_in + m * n * itemsize_out)
    moved = nbytes / bandwidth(card)
    wall = "compute" if best >= moved else "memory"
    seconds = max(best, moved) + rates.overhead
    if rates.overhead > max(best, moved):
        wall = "launch"
    return Estimate(seconds, seconds * rates.low, seconds * rates.high, wall)


def _tiled(
    m: int, n: int, k: int, batch: int, tile: tuple[int, int], speed: float, processors: int, rates: Rates
) -> float:
    """Return the seconds of the waves of tiles; idle multiprocessors split a long k between them."""
    rows, columns = tile
    efficiency = rates.small_tile ** (max(0, (32768 // (rows * columns)).bit_length() - 1))
    tiles = ceil(m / rows) * ceil(n / columns) * batch
    splits = max(1, min(processors // tiles, k // 2048)) if tiles < processors else 1
    waves = ceil(tiles * splits / processors)
    return waves * 2 * rows * columns * (k / splits) / (speed / processors * efficiency)


def memory_time(card: DeviceSpec, nbytes: int, cached: int = 0, *, across: int = 0, scattered: int = 0) -> Estimate:
    """Return the time of a kernel that reads and writes so many bytes, `cached` of them in the L2 cache.

    Elementwise kernels, reductions, copies. `across` bytes are read from the cache sector by sector, and the places of
    `scattered` elements are computed one by one; whichever takes longest is the time.
    """
    cached = min(cached, nbytes)
    cache_speed = _cache_speedup(card) * bandwidth(card)
    limits = {
        "memory": (nbytes - cached) / bandwidth(card) + cached / cache_speed,
        "cache": across / cache_speed,
        "indexing": scattered / _scattered_rate(card),
    }
    wall = max(limits, key=limits.__getitem__)
    seconds = limits[wall] + _MIN_KERNEL
    return Estimate(seconds, seconds * 0.85, seconds * 1.2, wall if seconds > 2 * _MIN_KERNEL else "launch")


# Elements a clock of a multiprocessor whose places elementwise kernels compute, where operands are broadcast or have
# gaps (ATen/native/cuda/CUDALoops.cuh: one thread divides its index by every size, for every operand). Fitted on
# attention written out in float32 on an H100 (cs336h-046 to 062) by scripts/fit_rates.py.
_SCATTERED = 1.0
_LANES = {(7, 0): 64, (7, 5): 64, (8, 0): 64}  # float32 lanes of a multiprocessor; 128 elsewhere


def _scattered_rate(card: DeviceSpec) -> float:
    """Return the scattered elements per second; the published float32 speed tells multiprocessors times clock."""
    capability = card.compute_capability or AMPERE
    lanes = _LANES.get(capability, 128)
    peak = card.peak_flops_per_second("float32")
    clocks = peak / (2 * lanes) if peak else num_multiprocessors(card) * 1.6e9
    return _SCATTERED * clocks


# Shares of the card's sustained matmul speed. FlashAttention-2 on an A100: 73 % of the peak forward and 63 % backward
# at best, less for heads of 64 and causal masks (Dao 2023, arXiv 2307.08691, figures 4-7); cuDNN on Hopper reaches
# as much there (Shah et al. 2024, arXiv 2407.08608, figures 5-6), FlashAttention-2 half of it.
_ATTENTION = {"flash": (0.75, 0.62), "cudnn": (0.70, 0.55), "efficient": (0.50, 0.38)}


def attention_time(
    card: DeviceSpec, format_name: str, kind: str, flops: int, head_size: int, *, is_causal: bool, is_backward: bool
) -> Estimate:
    """Return the time of a fused attention kernel that does `flops` (without regard to a causal mask)."""
    share = _ATTENTION[kind][is_backward]
    if kind == "flash" and (card.compute_capability or AMPERE) >= HOPPER:
        share *= 0.55
    if head_size < 128:
        share *= 0.85
    work = flops * (0.55 if is_causal else 1.0)
    seconds = work / (sustained(card, format_name) * share) + 2 * _MIN_KERNEL
    return Estimate(seconds, seconds * 0.75, seconds * 1.35, "compute")


# F(2x2, 3x3) needs 16 products where the definition needs 36 (Lavin and Gray 2015, arXiv 1509.09308), and moves more
_WINOGRAD = 36 / 16 * 0.8


def convolution_time(
    card: DeviceSpec, format_name: str, m: int, n: int, k: int, *, groups: int, is_channels_last: bool, nbytes: int,
    itemsize: int, is_winograd: bool = False,
) -> Estimate:  # fmt: skip
    """Return the time of a convolution as the product (m, k) x (k, n) in each of `groups`.

    Tensor cores want channels last: with the channels first, convolutions pay for two changes of layout. Without tensor
    cores, windows of 3 x 3 are computed by Winograd's algorithm if `is_winograd`. A group of few channels leaves tensor
    cores empty and moves bytes.
    """
    moved = memory_time(card, nbytes)
    if n < 8 or k < 16:
        seconds = 2.5 * moved.seconds
        return Estimate(seconds, seconds * 0.6, seconds * 1.6, "memory")
    product = product_time(card, format_name, m, n, k, groups, itemsize_in=itemsize, itemsize_out=itemsize)
    seconds = product.seconds / 0.75
    if is_winograd and format_name == "float32":
        seconds /= _WINOGRAD
    seconds = max(seconds, moved.seconds)
    if (
        format_name not in ("float32", "float64")
        and not is_channels_last
        and (card.compute_capability or AMPERE)[0] > 6
    ):
        seconds += moved.seconds
    return Estimate(seconds, seconds * 0.7, seconds * 1.4, product.wall)


def transfer_time(card: DeviceSpec, nbytes: int, *, is_pinned: bool) -> Estimate:
    """Return the time from the host's memory over PCIe 3 to 5 by card, pageable memory at half the speed."""
    capability = card.compute_capability or AMPERE
    speed = 50e9 if capability >= HOPPER else 24e9 if capability >= AMPERE else 12e9
    seconds = nbytes / (speed if is_pinned else speed / 2) + 10e-6
    return Estimate(seconds, seconds * 0.7, seconds * 2, "transfer")


def sustained(card: DeviceSpec, format_name: str) -> float:
    """Return the operations per second that large products reach on a card.

    Raises PlanError for a format without tensor cores or kernels on it.
    """
    capability = card.compute_capability or AMPERE
    if format_name == "tfloat32" and capability < AMPERE:
        format_name = "float32"
    if format_name.startswith("float8") and capability < ADA:
        raise PlanError(f"{card.name} has no float8 (compute capability 8.9 or later has); plan it on an L4 or H100")
    known = card.achieved_flops_per_second(format_name)
    peak = card.peak_flops_per_second(format_name)
    if known is not None:
        return known
    if format_name == "bfloat16" and capability < AMPERE:  # emulated: three quarters of float32's speed on V100
        return 0.7 * sustained(card, "float32")
    if peak is None:
        other = _LIKE.get(format_name)
        if other is None:
            raise PlanError(f"no source states a {format_name} speed of {card.name}; give one in a TOML file")
        return sustained(card, other) * {"tfloat32": 0.5, "float64": 1 / 32}.get(format_name, 1.0)
    return peak * _share(capability, format_name)


_LIKE = {"bfloat16": "float16", "float16": "bfloat16", "tfloat32": "bfloat16", "float64": "float32"}


@cache
def _share(capability: tuple[int, int], format_name: str) -> float:
    """Return the median share of the peak that cards of a generation reach."""
    shares = sorted(
        achieved / peak
        for card in device_specs()
        if card.compute_capability is not None and card.compute_capability[0] == capability[0]
        for achieved, peak in [(card.achieved_flops_per_second(format_name), card.peak_flops_per_second(format_name))]
        if achieved and peak
    )
    return shares[len(shares) // 2] if shares else _DEFAULT_SHARE


# L2 over memory bandwidth, as elementwise kernels reach them: V100 2,048 and A100 5,120 bytes a clock (A100
# whitepaper), two thirds of it reached; RTX 4090 5 TB/s and H100 5.6 TB/s by published microbenchmarks
_CACHE_SPEEDUPS = {(7, 0): 2.4, (7, 5): 2.4, (8, 0): 3.1, (8, 6): 2.0, (8, 9): 4.0, (9, 0): 1.9}


def _cache_speedup(card: DeviceSpec) -> float:
    return _CACHE_SPEEDUPS.get(card.compute_capability or AMPERE, 2.0)


def bandwidth(card: DeviceSpec) -> float:
    """Return bytes per second of memory, as kernels reach it."""
    speed = card.achieved_bandwidth_bytes_per_second
    published = card.bandwidth_bytes_per_second
    if published is None and speed is None:
        raise PlanError(f"no source states the bandwidth of {card.name}; give bandwidth_gb_per_second in a TOML file")
    return max(speed or 0.0, _BANDWIDTH_SHARE * (published or 0.0))


def num_multiprocessors(card: DeviceSpec) -> int:
    """Return the number of streaming multiprocessors, or that of the usual card of its generation."""
    return card.num_multiprocessors or _MULTIPROCESSORS.get(card.compute_capability or AMPERE, 108)


def rates_of(card: DeviceSpec) -> Rates:
    """Return the fitted constants for a card's generation, those of all cards where it has none."""
    table = _rates()
    major, minor = card.compute_capability or AMPERE
    return table.get(f"{major}.{minor}") or table.get(f"{major}.x") or table["all"]


@cache
def _rates() -> dict[str, Rates]:
    text = resources.files("mezzotint.plan").joinpath("rates.csv").read_text(encoding="utf-8")
    return {
        row["generation"]: Rates(
            overhead=float(row["overhead_us"]) * 1e-6,
            scale=float(row["scale"]),
            small_tile=float(row["small_tile"]),
            unaligned=float(row["unaligned"]),
            busy=float(row["busy"]),
            turned=float(row["turned"]),
            low=float(row["low"]),
            high=float(row["high"]),
            rows=int(row["rows"]),
        )
        for row in csv.DictReader(text.splitlines())
    }
