"""The switch: `with fast_cpu():` makes bfloat16 and float16 run at about float32's speed on a CPU that emulates them.

The first use measures whether torch's own kernels are slow here, and only then registers others, behind a gate that
this switch opens. They stay registered for the life of the process: taking a kernel away while another thread runs it
crashes. The gate is process-wide and counts, so contexts nest and a backward in another thread is served as well.

MEZZOTINT_LOWPREC=off keeps torch's kernels, =packed and =upcast take ours whatever was measured, the second without
the one that converts while it packs, =auto (or unset) measures.
"""

import os
import threading
from types import TracebackType

import torch

from mezzotint.errors import ConfigError
from mezzotint.hardware.measure import measure_matmul
from mezzotint.hardware.probe import probe
from mezzotint.hardware.support import Support, format_support
from mezzotint.hardware.timings import MatmulTimings
from mezzotint.lowprec import gate
from mezzotint.lowprec.choice import KernelChoice, Path, decide
from mezzotint.torch_internals.registry import Feature, require

FORMATS = ("bfloat16", "float16")
VARIABLE = "MEZZOTINT_LOWPREC"
WISHES = ("auto", "off", "upcast", "packed")

_lock = threading.Lock()
_choices: dict[str, KernelChoice] = {}


class FastCpu:
    """The context that `fast_cpu` returns; may be entered again and again, also while it is entered."""

    __slots__ = ("_dtypes",)

    def __init__(self, dtypes: tuple[torch.dtype, ...]) -> None:
        self._dtypes = dtypes

    def __enter__(self) -> None:
        gate.enter(self._dtypes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gate.leave(self._dtypes)

    def enable(self) -> None:
        """Open for the whole process, until `disable`: for a notebook, or a program that has no place for a with."""
        gate.enter(self._dtypes)

    def disable(self) -> None:
        """Take back one `enable`."""
        gate.leave(self._dtypes)


def fast_cpu(*formats: str | torch.dtype, compiled: bool = False) -> FastCpu:
    """Return a context inside which these formats ("bfloat16", "float16"; all of them by default) are fast on the CPU.

    Put it around the forward *and* the backward of a loop under `torch.autocast("cpu")`; float32 results do not change
    by a bit. Where torch's kernels are fast already, they stay in use. The first call takes up to half a second.
    `compiled=True` serves graphs of torch.compile as well; their float32 products then hold Python's global lock.

    Raises ConfigError for another format, or another value of MEZZOTINT_LOWPREC than auto, off, upcast or packed.
    """
    require(Feature.FAST_CPU, ConfigError)
    names = formats or FORMATS
    dtypes = []
    full = {"bf16": "bfloat16", "fp16": "float16", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    chosen = [full.get(given, given) if isinstance(given, str | torch.dtype) else given for given in names]
    for name in chosen:
        if name not in FORMATS:
            raise ConfigError(f"fast_cpu({repr(name)[:200]}) is refused; pass {' or '.join(FORMATS)}")
        if choice_for(name).path is not Path.STOCK:
            dtypes.append(getattr(torch, name))
    if compiled and dtypes:
        from mezzotint.lowprec.registration import register_out

        with _lock:
            register_out()
    return FastCpu(tuple(dtypes))


def choice_for(name: str) -> KernelChoice:
    """Return the choice for a format, measured on first use; registers the kernels where they are needed."""
    with _lock:
        choice = _choices.get(name)
        if choice is None:
            wish = _wish()
            choice = _choices[name] = (
                _by_flags(name) if wish == "auto" and _is_disturbed(name) else _measured(name, wish)
            )
            if choice.path is not Path.STOCK:
                from mezzotint.lowprec.registration import register

                register()
                gate.set_packs(getattr(torch, name), choice.path is Path.PACKED)
    return choice


def preview(timings: MatmulTimings) -> tuple[KernelChoice, ...]:
    """Return the choices that follow from a measurement of the CPU, without registering anything."""
    wish = _wish()
    return tuple(
        _by_flags(name)
        if wish == "auto" and timings.is_disturbed
        else decide(name, timings.ratios(name), wish, can_pack=_can_pack(name))
        for name in FORMATS
    )


def _measured(name: str, wish: str) -> KernelChoice:
    ratios = {} if wish != "auto" else measure_matmul("cpu", (name,)).ratios(name)
    return decide(name, ratios, wish, can_pack=_can_pack(name))


def _can_pack(name: str) -> bool:
    from mezzotint.lowprec.packed import is_available

    return is_available(getattr(torch, name), torch.get_num_threads())


def _is_disturbed(name: str) -> bool:
    """Return whether other programs kept the measurement from running through, so that it means nothing."""
    return measure_matmul("cpu", (name,)).is_disturbed


def _by_flags(name: str) -> KernelChoice:
    """Return the choice that the processor's flags suggest, for a machine too busy to be measured."""
    support = format_support(probe("cpu"), name)
    ours = Path.PACKED if _can_pack(name) else Path.UPCAST
    path = Path.STOCK if support.support is Support.NATIVE else ours
    reason = f"the machine was too busy to measure; by its flags {name} is {support.support}: {support.reason}"
    return KernelChoice(format=name, path=path, ratios=(), reason=reason)


def status() -> tuple[KernelChoice, ...]:
    """Return the choices made so far in this process."""
    return tuple(_choices.values())


def is_active(name: str) -> bool:
    """Return whether a context is open in which `name` runs on our kernels."""
    return gate.is_ours(getattr(torch, name))


def _wish() -> str:
    wish = os.environ.get(VARIABLE, "auto") or "auto"
    if wish not in WISHES:
        raise ConfigError(f"{VARIABLE}={wish!r} is refused; set it to {', '.join(WISHES)}")
    return wish
