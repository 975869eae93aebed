"""Round every one of the 2^32 float32 numbers to each format and compare with another implementation, bit for bit.

bfloat16 and float16 are compared with torch's casts, the narrower formats with ml_dtypes', TF32 with numpy's rint in
float64. Run once by hand and recorded; `tests/kernels/test_rounding.py` covers the ends and ties on every run.
"""

import argparse
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from harness import machine, markdown_table, write_record
from mezzotint.formats.catalog import FORMATS, find_format
from mezzotint.formats.spec import FloatFormat
from mezzotint.kernels.tensors import dtype_of, round_to

CHUNK = 1 << 24


def reference(source: Tensor, fmt: FloatFormat) -> Tensor:
    if fmt.name in ("bfloat16", "float16"):
        return source.to(dtype_of(fmt)).float()
    numbers = source.numpy()
    if fmt.name == "tfloat32":
        with np.errstate(invalid="ignore", over="ignore"):
            exponent = np.maximum(np.frexp(numbers)[1] - 1, fmt.min_exponent)
            place = np.ldexp(1.0, exponent - fmt.mantissa_bits)
            rounded = np.rint(numbers / place) * place  # exact in float64 but for rint
            rounded = np.where(np.abs(rounded) > fmt.max, np.sign(rounded) * np.inf, rounded)
            rounded = np.where(np.isfinite(numbers), rounded, numbers.astype(np.float64))
            return torch.from_numpy(np.copysign(rounded, numbers).astype(np.float32))
    with np.errstate(invalid="ignore", over="ignore"):
        return torch.from_numpy(numbers.astype(getattr(ml_dtypes, fmt.name)).astype(np.float32))


def count_differences(fmt: FloatFormat) -> int:
    differing = 0
    out = torch.empty(CHUNK)
    for start in range(-(1 << 31), 1 << 31, CHUNK):
        source = torch.arange(start, start + CHUNK, dtype=torch.int64).to(torch.int32).view(torch.float32)
        if not fmt.has_nan:
            source = torch.where(source.isnan(), 0.0, source)
        ours, theirs = round_to(source, fmt, out=out), reference(source, fmt)
        is_same = (ours.view(torch.int32) == theirs.view(torch.int32)) | (ours.isnan() & theirs.isnan())
        differing += CHUNK - int(is_same.sum())
    return differing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [fmt.name for fmt in FORMATS if fmt.is_signed and fmt.mantissa_bits < 23]
    parser.add_argument("formats", nargs="*", default=names)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, results = [], {}
    for name in args.formats:
        start = time.perf_counter()
        fmt = find_format(name)
        differing = count_differences(fmt)
        against = {"bfloat16": "torch", "float16": "torch", "tfloat32": "numpy rint"}.get(fmt.name, "ml_dtypes")
        results[fmt.name] = {"against": against, "inputs": 1 << 32, "differing": differing}
        rows.append([fmt.name, against, f"{1 << 32}", str(differing)])
        print(rows[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
    table = markdown_table(["format", "against", "inputs", "differing"], rows)
    if args.record:
        facts = machine() | {"ml_dtypes": ml_dtypes.__version__}
        print(write_record(args.record, "exhaustive_rounding", {"All float32 numbers": table}, results, facts))


if __name__ == "__main__":
    main()
