"""What CUDA's kernels refuse although PyTorch's fake kernels, which know shapes only, accept it.

Each row names an operation, the dtypes that its CUDA kernel lacks, and where that is stated. Errors have the classes of
CUDA's: a program that catches them and goes on in float32 does so here too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LOW = frozenset({torch.float16, torch.bfloat16})
_INTEGERS = frozenset({torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool})
_NOT_IN_MATMUL = _INTEGERS | {torch.float8_e4m3fn, torch.float8_e5m2}
_MM_INDEX = {"mm": 0, "addmm": 1}
_NAMES = {
    torch.float16: "Half", torch.bfloat16: "BFloat16", torch.int8: "Char", torch.uint8: "Byte", torch.int16: "Short",
    torch.int32: "Int", torch.int64: "Long", torch.bool: "Bool",
    torch.float8_e4m3fn: "Float8_e4m3fn", torch.float8_e5m2: "Float8_e5m2",
}  # fmt: skip
_LINALG_SOURCE = "torch.linalg: supports float, double, cfloat and cdouble"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One operation that has no CUDA kernel for some dtypes. `kernel` is the name in CUDA's message."""

    kernel: str
    dtypes: frozenset[torch.dtype]
    source: str
    argument: int = 0
    applies: Callable[[Any], bool] | None = None


def _has_distance_kernel(args: Any) -> bool:
    """Whether `cdist` takes its own kernel: Euclidean distances of more than 25 rows are computed by a matmul."""
    first, second, p, mode = (*args, None)[:4]
    many = first.shape[-2] > 25 or second.shape[-2] > 25
    return not (p == 2 and (mode == 1 or (not mode and many)))


def _linalg(kernel: str) -> Refusal:
    return Refusal(kernel, _LOW, _LINALG_SOURCE)


REFUSALS: dict[str, Refusal] = {
    "linalg_qr": _linalg("linalg.qr"),
    "geqrf": _linalg("geqrf"),
    "linalg_cholesky_ex": _linalg("linalg.cholesky"),
    "_linalg_svd": _linalg("linalg.svd"),
    "_linalg_eigh": _linalg("linalg.eigh"),
    "linalg_eig": _linalg("linalg.eig"),
    "linalg_lu": _linalg("linalg.lu"),
    "linalg_lu_factor_ex": _linalg("linalg.lu_factor"),
    "_linalg_det": _linalg("linalg.det"),
    "_linalg_solve_ex": _linalg("linalg.solve"),
    "linalg_solve_triangular": _linalg("linalg.solve_triangular"),
    "linalg_householder_product": _linalg("linalg.householder_product"),
    "_cdist_forward": Refusal(
        "cdist_cuda", _LOW, "aten/src/ATen/native/cuda/DistanceKernel.cu", applies=_has_distance_kernel
    ),
    "_pdist_forward": Refusal("pdist_cuda", _LOW, "aten/src/ATen/native/cuda/DistanceKernel.cu"),
    "mm": Refusal("addmm_cuda", _NOT_IN_MATMUL, "aten/src/ATen/native/cuda/Blas.cpp"),
    "addmm": Refusal("addmm_cuda", _NOT_IN_MATMUL, "aten/src/ATen/native/cuda/Blas.cpp", argument=1),
}
"""Operations by name. Those whose behaviour on CUDA was not found stated anywhere are left out."""


def refuse(name: str, args: Any) -> None:
    """Raise what CUDA would raise for an operation on ghosts, and what to do."""
    row = REFUSALS.get(name)
    if row is not None:
        tensor = args[row.argument]
        if tensor.dtype in row.dtypes and (row.applies is None or row.applies(args)):
            raise NotImplementedError(
                f"\"{row.kernel}\" not implemented for '{_NAMES[tensor.dtype]}' on CUDA; call it on .float(), "
                "outside autocast or with autocast disabled"
            )
    if name in _MM_INDEX:
        first, second = args[_MM_INDEX[name] : _MM_INDEX[name] + 2]
        if first.dtype != second.dtype:
            raise RuntimeError(
                f"expected mat1 and mat2 to have the same dtype, but got: {first.dtype} != {second.dtype}; "
                "cast one of them, or call it under autocast"
            )
    elif name in ("_fft_r2c", "_fft_c2r", "_fft_c2c"):
        _refuse_fft(name, args)


def _refuse_fft(name: str, args: Any) -> None:
    """Raise for sizes that cuFFT cannot transform in half precision (ATen/native/cuda/CuFFTPlanCache.h)."""
    tensor: Tensor = args[0]
    if tensor.dtype not in (torch.float16, torch.complex32):
        return
    sizes = [tensor.shape[dim] for dim in args[1]]
    if name == "_fft_c2r":
        sizes[-1] = args[3]
    if any(size & (size - 1) for size in sizes):
        advice = "call .float() on the input before the transform"
        if math.prod(sizes) and len(sizes) == 1:
            advice += f", or pad it to {1 << sizes[0].bit_length()}"
        raise RuntimeError(
            f"cuFFT only supports dimensions whose sizes are powers of two when computing in half precision, "
            f"but got a signal size of {list(sizes)}; {advice}"
        )
