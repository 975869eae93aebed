"""Matrix products on the CPU with a tensor core's numerics: compact operands, float32 sums, one rounding.

Large ones go to the compiled kernel that converts while it packs, all others are upcast: operands to float32, torch's
float32 kernel, one rounding. What is not for us (another dtype, mixed dtypes, the gate shut) goes to torch's own kernel
by its public `out=` overload: a kernel handle would hold Python's global lock for the whole product, which starves
loader threads. The `out=` overloads themselves, which only compiled graphs call, have no such way around.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.lowprec.calls import count, fall_back
from mezzotint.lowprec.choice import Path
from mezzotint.lowprec.gate import is_ours, packs
from mezzotint.lowprec.packed import product

Kernel = Callable[..., Any]
Originals = Mapping[str, Kernel]
aten = torch.ops.aten


def kernels(_originals: Originals) -> dict[str, Kernel]:
    """Return the kernels that replace torch's for the CPU, by name of the operation."""
    # through the `out=` overloads: looked up once, as each lookup costs more than a small product
    plain = {name: getattr(aten, name).out for name in ("mm", "bmm", "addmm", "baddbmm", "addbmm")}
    return {
        "mm": _product("mm", plain["mm"], num_axes=2),
        "bmm": _product("bmm", plain["bmm"], num_axes=3),
        "addmm": _added("addmm", plain["addmm"], num_axes=2),
        "baddbmm": _added("baddbmm", plain["baddbmm"], num_axes=3),
        "addbmm": _added("addbmm", plain["addbmm"], num_axes=None),
        "addmm_": _added_in_place("addmm", plain["addmm"], num_axes=2),
        "baddbmm_": _added_in_place("baddbmm", plain["baddbmm"], num_axes=3),
        "addbmm_": _added_in_place("addbmm", plain["addbmm"], num_axes=None),
        "_grouped_mm": _grouped(_originals["_grouped_mm"], _product("_grouped_mm", plain["mm"], num_axes=2)),
    }


ORIGINALS = ("_grouped_mm",)


def out_kernels(originals: Originals) -> dict[str, Kernel]:
    """Return those of the `out=` overloads, which compiled graphs call."""
    return {
        name: _into(originals[name], made)
        for name, made in (
            ("mm.out", _product("mm", originals["mm.out"], num_axes=2)),
            ("bmm.out", _product("bmm", originals["bmm.out"], num_axes=3)),
            ("addmm.out", _added("addmm", originals["addmm.out"], num_axes=2)),
            ("baddbmm.out", _added("baddbmm", originals["baddbmm.out"], num_axes=3)),
        )
    }


OUT_ORIGINALS = ("mm.out", "bmm.out", "addmm.out", "baddbmm.out")


def _product(name: str, plain: Kernel, num_axes: int) -> Kernel:
    def multiply(left: Tensor, right: Tensor) -> Tensor:
        dtype = left.dtype
        if not (is_ours(dtype) and right.dtype is dtype and left.dim() == num_axes == right.dim()):
            return plain(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]
        if left.shape[-1] == right.shape[-2] and left.shape[:-2] == right.shape[:-2]:
            if left.shape[-2] == 1 and right.stride(-2) == 1:
                # a dot product for each column is memory-bound, and torch reads 16 bits at full speed
                count(name, Path.STOCK)
                return plain(left, right, out=left.new_empty(0))  # type: ignore[no-any-return]
            made = product(left, right) if packs(dtype) else None
            if made is not None:
                count(name, Path.PACKED)
                return made
        count(name, Path.UPCAST)
        return plain(left.float(), right.float(), out=left.new_empty(0, dtype=torch.float32)).to(dtype)  # type: ignore[no-any-return]

    return multiply


def _added(name: str, plain: Kernel, num_axes: int | None) -> Kernel:
    def add(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        dtype = left.dtype
        if not (is_ours(dtype) and right.dtype is dtype and bias.dtype is dtype):
            return plain(bias, left, right, beta=beta, alpha=alpha, out=left.new_empty(0))  # type: ignore[no-any-return]
        is_plain_sum = beta == 1 == alpha and bias.shape == right.shape[-1:]
        if is_plain_sum and left.dim() == num_axes == right.dim() and left.shape[-1] == right.shape[-2]:
            made = product(left, right, bias) if packs(dtype) and left.shape[:-2] == right.shape[:-2] else None
            if made is not None:
                count(name, Path.PACKED)
                return made
        count(name, Path.UPCAST)
        out = left.new_empty(0, dtype=torch.float32)
        return plain(bias.float(), left.float(), right.float(), beta=beta, alpha=alpha, out=out).to(dtype)  # type: ignore[no-any-return]

    return add


def _added_in_place(name: str, plain: Kernel, num_axes: int | None) -> Kernel:
    add = _added(name, plain, num_axes)

    def add_in_place(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        if not is_ours(bias.dtype):
            return plain(bias, left, right, beta=beta, alpha=alpha, out=bias)  # type: ignore[no-any-return]
        return bias.copy_(add(bias, left, right, beta=beta, alpha=alpha))

    return add_in_place


def _into(original: Kernel, made: Kernel) -> Kernel:
    def write(*operands: Tensor, out: Tensor, **numbers: float) -> Tensor:
        if not (is_ours(out.dtype) and all(operand.dtype is out.dtype for operand in operands)):
            return original(*operands, out=out, **numbers)  # type: ignore[no-any-return]
        result = made(*operands, **numbers)
        if out.shape != result.shape:
            out.resize_(result.shape)
        return out.copy_(result)

    return write


def _grouped(original: Kernel, multiply: Kernel) -> Kernel:
    def grouped(
        left: Tensor,
        right: Tensor,
        offs: Tensor | None = None,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        dtype = left.dtype
        if not (is_ours(dtype) and right.dtype is dtype):
            return original(left, right, offs, bias, out_dtype)  # type: ignore[no-any-return]
        if bias is not None or out_dtype not in (None, dtype):
            fall_back("aten::_grouped_mm", "ours takes no bias and gives no other dtype")
            return original(left, right, offs, bias, out_dtype)  # type: ignore[no-any-return]
        if left.dim() == 3 == right.dim():
            return torch.bmm(left, right)
        # each offset is the end of a group along the axis that the two-dimensional operands are cut in
        ends = offs.tolist() if offs is not None else []
        parts = list(zip([0, *ends[:-1]], ends, strict=True))
        if left.dim() == 2 == right.dim():  # cut along the depth, one product for each group
            return torch.stack([multiply(left[:, a:b], right[a:b]) for a, b in parts])
        if left.dim() == 2:
            out = left.new_empty(left.shape[0], right.shape[-1])
            for index, (a, b) in enumerate(parts):
                out[a:b] = multiply(left[a:b], right[index])
            return out
        out = left.new_empty(left.shape[1], right.shape[-1])
        for index, (a, b) in enumerate(parts):
            out[:, a:b] = multiply(left[index], right[:, a:b])
        return out

    return grouped
