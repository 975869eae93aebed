"""Times the cases on a device: all formats of a case in turn, round after round, so that a slow moment hits all.

- Every call is warmed up; a sample repeats short calls until it is long enough for the clock.
- Every other round runs in reverse order, so that no format always follows the same neighbour.
- Float32 runs twice a round: what the second differs from the first is noise, and bounds what may be said.
- A sample during which the scheduler took a processor from us is taken again, three times at most.
- A format far slower than float32 gets fewer rounds. No random number is drawn; torch's switches are put back.
"""

import contextlib
import datetime
import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mezzotint.bench.cases import ATTENTIONS, PRODUCTS, Case, Op
from mezzotint.bench.result import LEAST_SAMPLES, BenchResult, CaseResult, Measurement, Roof
from mezzotint.hardware.devices import find_device
from mezzotint.hardware.measure import copy_bytes_per_second, fractions, preemptions, product, timer_for
from mezzotint.hardware.probe import probe
from mezzotint.lowprec.choice import Path
from mezzotint.lowprec.switch import FORMATS as CPU_FORMATS
from mezzotint.lowprec.switch import choice_for, fast_cpu

ROUNDS = 15
FEW_ROUNDS = 3
FAR_SLOWER = 6.0  # times float32's time
ONE_ROUND_SECONDS = 0.5
SAMPLE_SECONDS = {"cpu": 1e-3, "cuda": 0.3e-3}  # below, calls are repeated within a sample
RETAKES = 3

_REFUSALS = (RuntimeError, TypeError, NotImplementedError, AssertionError, ValueError)


@dataclass(slots=True, kw_only=True)
class _Contestant:
    format: str
    kernels: str
    call: Callable[[], object]
    context: Callable[[], AbstractContextManager[object]]
    seconds: list[float]
    repeats: int = 1
    rounds: int = ROUNDS


Progress = Callable[[int, int, Case], None]


def run(
    device: str,
    cases: Sequence[Case],
    formats: Sequence[str],
    *,
    seconds: float = 30.0,
    progress: Progress = lambda *_: None,
) -> BenchResult:
    """Return the times of `cases` in `formats` (names of the catalogue; float32 is always among them).

    `seconds` bounds the whole run, roughly: each case gets an equal share, and at least five rounds; emulated formats
    take their time on top.
    Raises ConfigError for a device that is not here.
    """
    facts = probe(device)
    names = tuple(dict.fromkeys(("float32", *formats)))
    found = []
    for index, case in enumerate(cases):
        progress(index, len(cases), case)
        found.append(run_case(device, case, [name for name in names if name in case.formats], seconds / len(cases)))
    return BenchResult(
        device=device,
        name=facts.name,
        facts=_facts(device),
        roofs=_roofs(device, facts.name, found),
        cases=tuple(found),
    )


def run_case(device: str, case: Case, formats: Sequence[str], seconds: float) -> CaseResult:
    """Return the times of one case, in about so many seconds."""
    refused: dict[str, str] = {}
    timer = timer_for(device)
    contestants: list[_Contestant] = []
    for name in formats:
        for kernels in ("torch", "mezzotint") if _has_own_kernels(device, case, name) else ("torch",):
            if name == "tfloat32" and device.startswith("cpu"):
                refused[name] = "a format of GPUs"
                continue
            try:
                contestant = _contestant(device, case, name, kernels)
                _warm_up(contestant, timer, device)
            except torch.OutOfMemoryError:
                refused[name] = "no memory left"
            except _REFUSALS as error:
                refused[name] = str(error).partition("\n")[0] or type(error).__name__
            else:
                contestants.append(contestant)
    again: list[float] = []
    base = next((c for c in contestants if c.format == "float32"), None)
    if base is not None:
        _race(contestants, base, again, timer, preemptions if device.startswith("cpu") else lambda: 0, seconds)
    measured = [
        Measurement(case=case, format=c.format, kernels=c.kernels, seconds=tuple(c.seconds))
        for c in contestants
        if c.seconds
    ]
    return CaseResult(case=case, measurements=tuple(measured), again=tuple(again), refused=tuple(refused.items()))


def _race(
    contestants: list[_Contestant],
    base: _Contestant,
    again: list[float],
    timer: Callable[[Callable[[], object]], float],
    count_preemptions: Callable[[], int],
    seconds: float,
) -> None:
    for contestant in contestants:
        if contestant.seconds[0] > FAR_SLOWER * base.seconds[0]:
            contestant.rounds = 1 if contestant.seconds[0] > ONE_ROUND_SECONDS else FEW_ROUNDS
    for contestant in contestants:
        contestant.seconds.clear()
    spent = 0.0  # by formats that run in every round: slow ones do not shorten the others' race
    order: list[tuple[_Contestant, list[float]]] = [(c, c.seconds) for c in contestants]
    order.append((base, again))
    for index in range(ROUNDS):
        for contestant, samples in order if index % 2 == 0 else reversed(order):
            if index < contestant.rounds:
                start = time.monotonic()
                samples.append(_sample(contestant, timer, count_preemptions))
                spent += time.monotonic() - start if contestant.rounds == ROUNDS else 0.0
        if index + 1 >= LEAST_SAMPLES and spent > seconds:
            break


def _sample(
    contestant: _Contestant, timer: Callable[[Callable[[], object]], float], count_preemptions: Callable[[], int]
) -> float:
    call, repeats = contestant.call, contestant.repeats

    def repeated() -> None:
        for _ in range(repeats):
            call()

    taken = []
    with contestant.context():
        for _ in range(1 + RETAKES):
            before = count_preemptions()
            taken.append(timer(repeated) / repeats)
            if count_preemptions() == before:
                return taken[-1]
    return min(taken)


def _warm_up(contestant: _Contestant, timer: Callable[[Callable[[], object]], float], device: str) -> None:
    """Call twice, unless that takes long, note the last time, and choose how often a sample repeats the call."""
    with contestant.context():
        taken = timer(contestant.call)
        if taken < ONE_ROUND_SECONDS:
            taken = timer(contestant.call)
        contestant.seconds.append(taken)
        wanted = SAMPLE_SECONDS.get(device.partition(":")[0], SAMPLE_SECONDS["cpu"])
        contestant.repeats = max(1, min(1000, round(wanted / max(taken, 1e-7))))


def _has_own_kernels(device: str, case: Case, name: str) -> bool:
    """Return whether mezzotint has a kernel of its own for this format here, because torch's is slow."""
    is_covered = case.op in PRODUCTS or case.op is Op.ATTENTION_BACKWARD
    return device.startswith("cpu") and is_covered and name in CPU_FORMATS and choice_for(name).path is not Path.STOCK


def _contestant(device: str, case: Case, name: str, kernels: str) -> _Contestant:
    contexts: list[Callable[[], AbstractContextManager[object]]] = []
    if kernels == "mezzotint":
        contexts.append(lambda: fast_cpu(name))
    if case.op in PRODUCTS and not device.startswith("cpu") and name == "float32":
        contexts.append(_without_tf32)
    context = contexts[0] if contexts else contextlib.nullcontext
    return _Contestant(format=name, kernels=kernels, call=_call(device, case, name), context=context, seconds=[])


@contextlib.contextmanager
def _without_tf32() -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _call(device: str, case: Case, name: str) -> Callable[[], object]:
    """Return a call that runs the case once."""
    if case.op in PRODUCTS:
        m, n, k = case.shape
        # a linear layer of N outputs and K inputs on M rows: y = x W^T, dx = dy W, dW = dy^T x
        layout, size = {
            Op.MATMUL: ("NT", (m, n, k)),
            Op.MATMUL_INPUT_GRADIENT: ("NN", (m, k, n)),
            Op.MATMUL_WEIGHT_GRADIENT: ("TN", (n, k, m)),
        }[case.op]
        return product(device, name, layout, size, is_fresh=True)
    dtype = getattr(torch, name)
    if case.op in ATTENTIONS:
        return _attention(device, case, dtype)
    if case.op is Op.UPDATE:
        return _update(device, case.shape[0], dtype)
    if case.op is Op.ADD:
        one, other = (fractions(device, case.shape[0]).to(dtype) for _ in range(2))
        out = torch.empty_like(one)
        return lambda: torch.add(one, other, out=out)
    if case.op is Op.GELU:
        numbers = fractions(device, case.shape[0]).to(dtype)
        return lambda: F.gelu(numbers, approximate="tanh")
    tokens, width = case.shape
    rows = fractions(device, tokens, width).to(dtype)
    weight = torch.ones(width, dtype=dtype, device=device)
    calls: dict[Op, Callable[[], Tensor]] = {
        Op.LAYER_NORM: lambda: F.layer_norm(rows, (width,), weight, weight),
        Op.RMS_NORM: lambda: F.rms_norm(rows, (width,), weight),
        Op.SOFTMAX: lambda: F.softmax(rows, dim=-1),
    }
    return calls[case.op]


def _attention(device: str, case: Case, dtype: torch.dtype) -> Callable[[], object]:
    q, k, v, g = (fractions(device, *case.shape).to(dtype) for _ in range(4))
    if case.op is Op.ATTENTION:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    with torch.enable_grad():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return lambda: torch.autograd.grad(out, inputs, g, retain_graph=True)


def _update(device: str, count: int, dtype: torch.dtype) -> Callable[[], object]:
    weight = torch.nn.Parameter(fractions(device, count).to(dtype))
    weight.grad = fractions(device, count).to(dtype)
    return torch.optim.AdamW([weight], lr=1e-6, fused=True).step


def _facts(device: str) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads() if device.startswith("cpu") else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability() if device.startswith("cpu") else None,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _roofs(device: str, name: str, cases: Sequence[CaseResult]) -> tuple[Roof, ...]:
    """Return the published peaks of a known card, and the best that was measured of everything else."""
    spec = find_device(name)
    roofs = []
    bandwidth = spec.bandwidth_bytes_per_second if spec else None
    if bandwidth:
        roofs.append(Roof(format="", value=bandwidth, source="published"))
    elif copied := copy_bytes_per_second(device):
        roofs.append(Roof(format="", value=copied, source="best measured here"))
    best: dict[str, float] = {}
    for found in cases:
        for measurement in found.measurements:
            if measurement.case.op in PRODUCTS and measurement.flops_per_second:
                best[measurement.format] = max(best.get(measurement.format, 0.0), measurement.flops_per_second)
    for format_name, value in best.items():
        peak = spec.peak_flops_per_second(format_name) if spec else None
        source = "published" if peak else "best measured here"
        roofs.append(Roof(format=format_name, value=peak or value, source=source))
    return tuple(roofs)
