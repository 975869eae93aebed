"""How other libraries round a float32 tensor to a format, as functions from a tensor to a tensor.

Only those that are installed are offered. What they need: `pip install torchao qtorch gfloat pychop unit-scaling`, and
microxcaling from its repository (github.com/microsoft/microxcaling) on the path.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from mezzotint.formats.catalog import find_format
from mezzotint.kernels.tensors import dtype_of

Rounder = Callable[[Tensor], Tensor]
ALL_FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def rounders(format_name: str, *, with_compile: bool = False) -> dict[str, Rounder]:
    """Return the ways to round to nearest that are installed here, by library."""
    fmt = find_format(format_name)
    dtype = dtype_of(fmt)
    exponent, mantissa = fmt.exponent_bits, fmt.mantissa_bits
    found: dict[str, Rounder] = {"torch": lambda x: x.to(dtype).float()}
    if with_compile:
        found["torch.compile"] = torch.compile(lambda x: x.to(dtype).float())
    with optional("ml_dtypes"):
        import ml_dtypes

        numpy_dtype = getattr(ml_dtypes, fmt.name, None) or np.dtype(fmt.name)

        def by_ml_dtypes(x: Tensor) -> Tensor:
            with np.errstate(over="ignore", invalid="ignore"):
                return torch.from_numpy(x.numpy().astype(numpy_dtype).astype(np.float32))

        found["ml_dtypes"] = by_ml_dtypes
    with optional("qtorch"):
        from qtorch.quant import float_quantize

        found["qtorch"] = lambda x: float_quantize(x, exp=exponent, man=mantissa, rounding="nearest")
    with optional("unit-scaling"):
        from unit_scaling.formats import FPFormat

        found["unit-scaling"] = FPFormat(exponent, mantissa, rounding="nearest").quantise
    with optional("gfloat"):
        import gfloat
        from gfloat import formats

        names = {"bfloat16": "bfloat16", "float16": "binary16", "float8_e4m3fn": "ocp_e4m3", "float8_e5m2": "ocp_e5m2"}
        info = getattr(formats, f"format_info_{names[format_name]}")
        found["gfloat"] = lambda x: torch.from_numpy(gfloat.round_ndarray(info, x.numpy())).float()
    with optional("pychop"):
        import pychop

        pychop.backend("torch")
        chop = pychop.Chop(exp_bits=exponent, sig_bits=mantissa, rmode=1)
        found["pychop"] = lambda x: chop(x.clone())
    with optional("microxcaling"):
        from mx.elemwise_ops import _quantize_elemwise_core

        bits, biggest = mantissa + 2, fmt.max
        found["microxcaling"] = lambda x: _quantize_elemwise_core(
            x, bits, exponent, biggest, round="nearest", saturate_normals=False, allow_denorm=True
        )
    return found


def block_rounders() -> dict[str, Rounder]:
    """Return the ways to round to MXFP8 E4M3, blocks of 32 along the last axis, that are installed here."""
    found: dict[str, Rounder] = {}
    with optional("torchao"):
        from torchao.prototype.mx_formats.mx_tensor import MXTensor

        found["torchao"] = lambda x: MXTensor.to_mx(x, torch.float8_e4m3fn, 32).dequantize(torch.float32)
    with optional("pychop"):
        from pychop.mx_formats import mx_quantize

        found["pychop"] = lambda x: mx_quantize(x, "mxfp8_e4m3")
    with optional("microxcaling"):
        from mx.mx_ops import _quantize_mx

        found["microxcaling"] = lambda x: _quantize_mx(
            x, 8, elem_format="fp8_e4m3", block_size=32, axes=[-1], round="even"
        )
    return found


def stochastic_rounders() -> dict[str, Rounder]:
    """Return the ways to round to bfloat16 at random that are installed here."""
    found: dict[str, Rounder] = {}
    with optional("torchao"):
        from torchao.optim.quant_utils import _fp32_to_bf16_sr

        found["torchao"] = _fp32_to_bf16_sr
    with optional("qtorch"):
        from qtorch.quant import float_quantize

        found["qtorch"] = lambda x: float_quantize(x, exp=8, man=7, rounding="stochastic")
    with optional("unit-scaling"):
        from unit_scaling.formats import FPFormat

        found["unit-scaling"] = FPFormat(8, 7, rounding="stochastic").quantise
    return found


@contextlib.contextmanager
def optional(name: str) -> Iterator[None]:
    """Leave out, saying so, a library that is not installed or does not load here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # a peer may fail to build in ways of its own
        print(f"{name} left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def versions() -> dict[str, str]:
    """Return the versions of the peers that are installed."""
    from importlib import metadata

    found = {}
    for name in ("ml_dtypes", "torchao", "qtorch", "gfloat", "pychop", "unit-scaling", "numba"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
