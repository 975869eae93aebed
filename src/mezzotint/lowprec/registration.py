"""Registers our CPU kernels with torch's dispatcher, once per process, for the life of the process.

They sit at the CPU key, below autograd, so saved tensors stay compact, and backward, checkpointing, vmap and inference
mode are served alike; those of operations that torch makes of others sit at autograd's key as well, since they bring
their own gradients. Taking a kernel away while another thread runs it crashes the process: the gate is what opens and
shuts.
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from mezzotint.lowprec import attention, convolution, lstm, products, recurrent
from mezzotint.torch_internals.dispatch import original_kernel

_libraries: list[torch.library.Library] = []
_registered: set[str] = set()


def register() -> None:
    """Register the kernels of all operations but the `out=` overloads."""
    rooms = (products, attention, convolution, recurrent)
    _register("operations", (name for room in rooms for name in room.ORIGINALS), *(room.kernels for room in rooms))
    for key in ("CPU", "AutogradCPU"):
        _register(f"composites of {key}", (), lambda _: lstm.kernels(), key=key)


def register_out() -> None:
    """Register those of the `out=` overloads too, which compiled graphs call.

    Float32 products of compiled graphs, and ours that are upcast, hold Python's global lock from then on.
    """
    _register("out overloads", products.OUT_ORIGINALS, products.out_kernels)


def _register(
    what: str, originals: Iterable[str], *makers: Callable[..., dict[str, Callable[..., Any]]], key: str = "CPU"
) -> None:
    if what in _registered:
        return
    # the originals have to be looked up before ours stand in their place
    found = {name: original_kernel(name, "CPU") for name in originals}
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        # torch warns once per process that a kernel is overridden, which is what we are here for
        warnings.simplefilter("ignore", UserWarning)
        for make in makers:
            for name, kernel in make(found).items():
                library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
    _libraries.append(library)
    _registered.add(what)
