"""Times matmuls and copies on a device: formats in turn, warm, best of many, a few milliseconds each.

What makes such figures lie, and what is done about it:
- the first call builds kernels: every format and layout is called before any is timed;
- clocks and neighbours change: the formats take turns, so that a slow moment hits all, and the best call counts;
- a product may be too small: at 64x128x128, the overhead of a oneDNN call makes native bfloat16 look 1.4 times slower
  than float32, so the size grows until a float32 product takes a quarter of a millisecond;
- a busy neighbour stretches a call on several threads to whole slices of the scheduler, 16 ms instead of 0.4: calls
  during which a thread of ours lost its processor are set aside, and where hardly any are left, that is said;
- an emulated format may be 500 times slower: a few calls are enough to know.

Nothing of torch is changed: no random numbers are drawn, no threads set, no switch moved. While `mezzotint.lowprec` is
switched on, its kernels are what is timed. Results are kept for the life of the process.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from statistics import median
from typing import Any

import torch

from mezzotint.errors import ConfigError
from mezzotint.formats.catalog import find_format
from mezzotint.hardware.timings import LAYOUTS, MatmulTime, MatmulTimings
from mezzotint.torch_internals.operators import scaled_matmul

Timer = Callable[[Callable[[], object]], float]

CPU_SIZES = ((256, 384, 384), (512, 768, 768), (1024, 1536, 1536))
GPU_SIZES = ((2048, 2048, 2048),)
SMALLEST_SECONDS = 0.25e-3  # of one float32 product on a CPU
SAMPLES = 12  # undisturbed, per format and layout
SLOW_SAMPLES = 2  # the same where the format is far slower
SLOW_SECONDS = 0.25  # long enough for a call that was disturbed every time
FAR_SLOWER = 4.0  # times float32's time
SECONDS_EACH = 8e-3  # of quiet time, per format and layout
TOTAL_SECONDS = 1.5
COPY_BYTES = 64 << 20

# what torch raises for a product it does not have, and, of the wrong build, for a device
_REFUSALS = (RuntimeError, TypeError, NotImplementedError, AssertionError)


def measure_matmul(
    device: str | torch.device = "cpu", formats: Sequence[str] = ("float32", "bfloat16", "float16")
) -> MatmulTimings:
    """Return matmul times on a device for formats that torch has as a dtype, float32 always among them.

    A format that torch will not multiply is in `refused`; if that is float32, nothing was timed. Takes about 0.1 s,
    0.3 s where a format is emulated.

    tfloat32 is float32 at the precision "high", on accelerators alone. Raises ConfigError for a format that torch has
    no dtype for.
    """
    names = tuple(dict.fromkeys(("float32", *(find_format(name).name for name in formats))))
    is_cpu = str(device).startswith("cpu")
    missing = [name for name in names if not hasattr(torch, name) and (name != "tfloat32" or is_cpu)]
    if missing:
        reason = "a format of GPUs" if missing[0] == "tfloat32" else "not a torch dtype"
        raise ConfigError(f"{missing[0]} is {reason}, so it cannot be timed; pass {', '.join(names[:1])}")
    setting = torch.get_float32_matmul_precision() if str(device) != "cpu" else ""
    return _measured(str(device), names, torch.get_num_threads(), setting)


@cache
def _measured(device: str, names: tuple[str, ...], threads: int, matmul_precision: str) -> MatmulTimings:
    """Measure once per device, formats, number of threads and precision setting."""
    timer = timer_for(device)
    refused: dict[str, str] = {}
    with torch.no_grad():
        try:
            m, n, k = size = _size(device, timer)
        except _REFUSALS as error:
            return _nothing(device, threads, error)
        calls: dict[tuple[str, str], Callable[[], object]] = {}
        for name in names:
            try:
                ours = {(name, layout): product(device, name, layout, size) for layout in LAYOUTS}
                for call in ours.values():
                    timer(call)
            except torch.OutOfMemoryError:
                continue  # says nothing about the format
            except _REFUSALS as error:
                refused[name] = _first_line(error)
            else:
                calls |= ours
        samples = race(calls, timer, preemptions if device.startswith("cpu") else lambda: 0)
    times = tuple(
        MatmulTime(
            format=name,
            layout=layout,
            best_seconds=min(ours.trusted),
            median_seconds=median(ours.trusted),
            samples=len(ours.trusted),
        )
        for (name, layout), ours in samples.items()
    )
    return MatmulTimings(
        device=device,
        threads=threads,
        m=m,
        n=n,
        k=k,
        times=times,
        refused=tuple(refused.items()),
        is_disturbed=any(len(s.quiet) < SLOW_SAMPLES for (name, _), s in samples.items() if name == "float32"),
    )


def _nothing(device: str, threads: int, error: Exception) -> MatmulTimings:
    refused = (("float32", _first_line(error)),)
    return MatmulTimings(device=device, threads=threads, m=0, n=0, k=0, times=(), refused=refused)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


@dataclass
class Samples:
    """The seconds of one call: those that ran undisturbed, and those that the scheduler interrupted."""

    quiet: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The shortest of all; infinite while there is none."""
        return min(self.quiet + self.disturbed, default=math.inf)

    @property
    def trusted(self) -> list[float]:
        """The undisturbed samples, or all where there are none."""
        return self.quiet or self.disturbed


def race(
    calls: dict[tuple[str, str], Callable[[], object]], timer: Timer, preemptions: Callable[[], int]
) -> dict[tuple[str, str], Samples]:
    """Return the samples of every call, by format and layout, taken in turns.

    A call gets SAMPLES undisturbed samples, and more while they are short; SLOW_SAMPLES do where its best is far
    beyond float32's and not just disturbed. All stop once TOTAL_SECONDS are spent.
    """
    samples = {key: Samples() for key in calls}
    spent = 0.0

    def is_done(key: tuple[str, str]) -> bool:
        ours, base = samples[key], samples.get(("float32", key[1]), Samples())
        is_sure = len(ours.quiet) >= SLOW_SAMPLES or sum(ours.quiet + ours.disturbed) > SLOW_SECONDS
        if is_sure and ours.best > FAR_SLOWER * base.best:
            return True
        return len(ours.quiet) >= SAMPLES and len(ours.quiet) * ours.best >= SECONDS_EACH

    waiting = list(calls)
    while waiting and spent < TOTAL_SECONDS:
        for key in waiting:
            before = preemptions()
            seconds = timer(calls[key])
            (samples[key].quiet if preemptions() == before else samples[key].disturbed).append(seconds)
            spent += seconds
        waiting = [key for key in waiting if not is_done(key)]
    return samples


def preemptions() -> int:
    """Return how often the scheduler took a processor from one of our threads; always 0 where it does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def timer_for(device: str) -> Timer:
    """Return a function that runs a call to its end on a device and returns its seconds."""
    kind = device.partition(":")[0]
    if kind == "cuda":
        return lambda call: _cuda_seconds(device, call)
    synchronize: Callable[[], object] | None = {
        "mps": torch.mps.synchronize,
        "xpu": lambda: torch.xpu.synchronize(device),
    }.get(kind)

    def seconds(call: Callable[[], object]) -> float:
        if synchronize is not None:
            synchronize()
        start = time.perf_counter()
        call()
        if synchronize is not None:
            synchronize()
        return time.perf_counter() - start

    return seconds


def _cuda_seconds(device: str, call: Callable[[], object]) -> float:
    with torch.cuda.device(device):
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def _size(device: str, timer: Timer) -> tuple[int, int, int]:
    """Return the smallest m, n, k whose float32 product takes long enough to dwarf the overhead of a call."""
    if not device.startswith("cpu"):
        return GPU_SIZES[0]
    for size in CPU_SIZES:
        call = product(device, "float32", "NT", size)
        timer(call)
        if min(timer(call) for _ in range(3)) >= SMALLEST_SECONDS:
            break
    return size


def product(
    device: str, name: str, layout: str, size: tuple[int, int, int], *, is_fresh: bool = False
) -> Callable[[], object]:
    """Return a call that multiplies an m x k by a k x n matrix, each stored as the layout says.

    tfloat32 is a float32 product at the precision "high". float8 products give bfloat16, with one scale for each
    operand, and exist in the layout NT alone: whatever the layout, operands are stored so. The result goes into the
    same tensor each time, or with `is_fresh` into a new one, as in training.
    """
    m, n, k = size
    if name.startswith("float8"):
        layout = "NT"
    dtype = torch.float32 if name == "tfloat32" else getattr(torch, name)
    left = fractions(device, k, m).t() if layout[0] == "T" else fractions(device, m, k)
    right = fractions(device, n, k).t() if layout[1] == "T" else fractions(device, k, n)
    # a cast keeps the strides, so a transposed matrix stays stored transposed
    left, right = left.to(dtype), right.to(dtype)
    if name.startswith("float8"):
        scale = torch.ones((), device=device)
        matmul = scaled_matmul()
        if matmul is None:
            raise NotImplementedError("this torch has no scaled matmul")
        return lambda: matmul(left, right, scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
    if is_fresh:
        call: Callable[[], object] = lambda: torch.mm(left, right)  # noqa: E731
    else:
        out = torch.empty(m, n, dtype=dtype, device=device)
        call = lambda: torch.mm(left, right, out=out)  # noqa: E731
    return _at_high_precision(call) if name == "tfloat32" else call


def _at_high_precision(call: Callable[[], object]) -> Callable[[], object]:
    def with_tf32() -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            call()
        finally:
            torch.set_float32_matmul_precision(before)

    return with_tf32


def fractions(device: str, *shape: int) -> torch.Tensor:
    """Return float32 values spread over -0.5 to 0.5 without drawing random numbers."""
    steps = torch.arange(math.prod(shape), dtype=torch.float32, device=device)
    return (steps * 0.6180339887).frac_().sub_(0.5).view(shape)


@cache
def copy_bytes_per_second(device: str = "cpu") -> float | None:
    """Return the bytes read and written per second by a large copy on a device, or None where it fails."""
    timer = timer_for(device)
    try:
        source = torch.zeros(COPY_BYTES // 4, dtype=torch.float32, device=device)
        target = torch.zeros_like(source)
        best = min(timer(lambda: target.copy_(source)) for _ in range(5))
    except _REFUSALS:
        return None
    return 2.0 * COPY_BYTES / best
