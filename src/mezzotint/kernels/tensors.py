"""Rounding and range statistics of torch tensors on any device.

Dense CPU tensors go through compiled loops, one pass over memory; everything else (CUDA, MPS, fake tensors, tensors
inside torch.compile) through torch operations that give the same bits.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import FormatError, echoed
from mezzotint.formats.catalog import FLOAT8_E4M3FN, find_block_format, find_format
from mezzotint.formats.codec import decode
from mezzotint.formats.rounding import Overflow, Rounding
from mezzotint.formats.spec import BlockFormat, FloatFormat
from mezzotint.kernels import generic
from mezzotint.kernels.constants import (
    BFLOAT16,
    CODES,
    FLOAT16,
    FLOAT32,
    INF,
    NAN,
    NEAREST,
    NUM_COUNTS,
    STOCHASTIC,
    TOWARD_ZERO,
    ZERO,
)
from mezzotint.kernels.memory import has_numbers, is_plain, readable
from mezzotint.kernels.ranges import RangeStats, num_below
from mezzotint.kernels.target import Target, target
from mezzotint.torch_internals.transforms import is_zero_tensor

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}
_FORMATS = {dtype: find_format(name) for name, dtype in _DTYPES.items()}
# what the loops read and write as numbers
_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
_WORDS = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
_MODES = {Rounding.NEAREST_EVEN: NEAREST, Rounding.TOWARD_ZERO: TOWARD_ZERO, Rounding.STOCHASTIC: STOCHASTIC}
_MASK_64 = (1 << 64) - 1
_SPECIAL = 255  # the exponent field of infinities and NaN


def dtype_of(fmt: FloatFormat) -> torch.dtype | None:
    """Return the torch dtype that stores a format, or None where torch has none."""
    return _DTYPES.get(fmt.name)


def format_of(dtype: torch.dtype) -> FloatFormat:
    """Return the format that a floating-point dtype stores. Raises FormatError for any other."""
    if dtype not in _FORMATS:
        raise FormatError(f"{dtype} stores no number format of the catalogue; pass one of {_listed(_FORMATS)}")
    return _FORMATS[dtype]


def round_to(
    source: Tensor,
    fmt: FloatFormat | str,
    *,
    out: Tensor | None = None,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow | None = None,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """Return `source`, float32, bfloat16 or float16 of any shape, with every number rounded to `fmt`.

    The result has the dtype of `source`, or goes into `out` of the same shape: a dtype that holds every number of
    `fmt`, or the one that stores `fmt`. `out=source` rounds in place. `overflow` is what becomes of numbers beyond the
    largest; left out, infinity where the format has one, else NaN, else the largest. NaN stays NaN. `out` must lie in
    memory that can be written: torch does not tell which tensors of `from_numpy` are maps of files opened for reading,
    and writing to one ends the process, as torch's own in-place operations do.

    Stochastic rounding goes up with the probability that makes the result right on average (Croci et al. 2022, doi
    10.1098/rsos.211631), exactly for formats with float32's exponents, to 2^-31 of the last place for the others. The
    random bits follow from `seed`, `offset` and an element's index alone, so they are the same on every device.

    >>> round_to(torch.tensor([1 / 3, 1000.0]), "e4m3", overflow=Overflow.SATURATE)
    tensor([3.4375e-01, 4.4800e+02])

    Raises FormatError for another dtype, for an `out` that cannot hold the format, for an overflow mode that the format
    cannot serve, and for a NaN where codes are asked of a format that has none.
    """
    if not torch.compiler.is_compiling() and not is_plain(source):
        source = readable(source, "source")
    if out is None:
        out = torch.empty_like(source, requires_grad=False)
    elif not torch.compiler.is_compiling() and not is_plain(out):
        out = _writable(out)
    if torch.compiler.is_compiling():
        plan = _make_plan(source.dtype, out.dtype, _format(fmt), rounding, overflow)
    else:
        key = (source.dtype, out.dtype, fmt if type(fmt) is str else id(fmt), rounding, overflow)
        found = _plans.get(key)
        if found is None:
            # the plan keeps the format, so that its id stays its own
            found = _plans[key] = _make_plan(source.dtype, out.dtype, _format(fmt), rounding, overflow)
        plan = found
    if out.shape != source.shape or out.device != source.device:
        raise FormatError(
            f"out is {tuple(out.shape)} on {out.device}, the tensor {tuple(source.shape)} on {source.device}; "
            "pass out= of the same shape and device"
        )
    if plan.refuses_nan and bool(source.isnan().any()):
        raise FormatError(f"{plan.fmt.name} has no NaN and the tensor has some; replace them before encoding")
    if not _is_reachable(source, out, needs_order=plan.mode == STOCHASTIC):
        rounded = generic.round_values(_as_float32(source), plan.target, rounding, seed, offset)
        _check_places(out)
        _fill(out, generic.encode_values(rounded, plan.target) if plan.is_code else rounded, plan.is_code)
        return out
    keys = (_signed(seed), _signed(offset)) if plan.mode == STOCHASTIC else (0, 0)
    address = plan.address or _settle(plan)
    _round_at(source.data_ptr(), plan.kind, out.data_ptr(), plan.out_kind, plan.out_bytes, source.numel(), address,
              plan.mode, *keys)  # fmt: skip
    return out


def _writable(out: Tensor) -> Tensor:
    """Return `out`, which torch operations write. Raises FormatError for a tensor without memory of its own."""
    readable(out, "out")
    if is_zero_tensor(out):
        raise FormatError("out must have memory to write to, got a zero tensor; pass torch.empty_like(source)")
    return out


def _check_places(out: Tensor) -> None:
    """Refuse a tensor whose numbers share places in memory, as an expanded one's do; raise FormatError."""
    if torch.compiler.is_compiling() or out.layout is not torch.strided or out.numel() < 2:
        return
    reach = 0  # the farthest place of the axes with smaller strides
    for stride, size in sorted((step, size) for size, step in zip(out.shape, out.stride(), strict=True) if size > 1):
        if stride <= reach:
            raise FormatError(
                f"out must have a place in memory for each number, got strides {out.stride()} for shape "
                f"{tuple(out.shape)}; pass out.contiguous()"
            )
        reach += stride * (size - 1)


@dataclass(slots=True, kw_only=True)
class _Plan:
    """What is settled once for a format, dtypes and modes; `address` at the first use of the compiled loops."""

    fmt: FloatFormat
    target: Target
    kind: int
    out_kind: int
    out_bytes: int
    mode: int
    is_code: bool
    refuses_nan: bool
    address: int = 0


_plans: dict[tuple[Any, ...], _Plan] = {}


def _make_plan(
    dtype: torch.dtype, out_dtype: torch.dtype, fmt: FloatFormat, rounding: Rounding, overflow: Overflow | None
) -> _Plan:
    _check_source(dtype, rounding)
    if overflow is not None and not isinstance(overflow, Overflow):
        raise FormatError(f"overflow={echoed(overflow)} is refused; pass a mezzotint.formats.rounding.Overflow or None")
    is_code = _takes_codes(out_dtype, fmt)
    # torch.compile warns of a cache that it sees through
    find = target.__wrapped__ if torch.compiler.is_compiling() else target
    return _Plan(
        fmt=fmt,
        target=find(fmt, overflow),
        kind=_KINDS[dtype],
        out_kind=CODES if is_code else _KINDS[out_dtype],
        out_bytes=out_dtype.itemsize,
        mode=_MODES[rounding],
        is_code=is_code,
        refuses_nan=is_code and not fmt.has_nan,
    )


def _settle(plan: _Plan) -> int:
    global _round_at  # noqa: PLW0603 - set once, as importing the compiled loops takes half a second
    _round_at = _entries().round_at
    plan.address = _address(plan.target)
    return plan.address


_round_at: Any = None


def encode(
    source: Tensor,
    fmt: FloatFormat | str,
    *,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    overflow: Overflow | None = None,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """Return `source` rounded to `fmt` as its stored codes: of torch's dtype where there is one, else uint8.

    Arguments and errors are those of `round_to`; a format between 8 and 16 bits wide, or TF32, is refused.
    """
    fmt = _format(fmt)
    source = source if torch.compiler.is_compiling() else readable(source, "source")
    out = torch.empty_like(source, dtype=dtype_of(fmt) or torch.uint8, requires_grad=False)
    return round_to(source, fmt, out=out, rounding=rounding, overflow=overflow, seed=seed, offset=offset)


def decode_codes(codes: Tensor, fmt: FloatFormat | str) -> Tensor:
    """Return the numbers, float32, that uint8 codes of a format of up to 8 bits stand for.

    Raises FormatError for another dtype or a wider format, and for a code that the format has not.
    """
    fmt = _format(fmt)
    codes = codes if torch.compiler.is_compiling() else readable(codes, "codes")
    if codes.dtype is not torch.uint8 or fmt.field_bits > 8:
        raise FormatError(
            f"codes must be uint8 and of a format of up to 8 bits, got {codes.dtype} of {fmt.name}; pass what "
            "encode() returned, viewed as torch.uint8"
        )
    if fmt.num_codes < 256 and codes.numel() and int(codes.max()) >= fmt.num_codes:
        raise FormatError(
            f"code {int(codes.max())} is outside {fmt.name}, which has codes 0 to {fmt.num_codes - 1}; pass those"
        )
    return torch.tensor(_values(fmt), dtype=torch.float32, device=codes.device)[codes.long()]


@cache
def _values(fmt: FloatFormat) -> list[float]:
    return [decode(code, fmt) for code in range(fmt.num_codes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """A tensor in a block format: a code for each element, a scale for each block.

    `codes`, uint8, has the tensor's shape with `axis` last and padded to whole blocks; `scales`, of the dtype that
    stores the scale's format, has a place for each block instead. `tensor_scale` is None where the format has none.
    """

    fmt: BlockFormat
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    axis: int
    size: int

    def numbers(self) -> Tensor:
        """Return the numbers that codes and scales stand for, float32 of the tensor's shape."""
        elements = decode_codes(self.codes, self.fmt.element).view(*self.scales.shape, self.fmt.block_size)
        factors = self.scales.float()
        if self.tensor_scale is not None:
            factors = factors * self.tensor_scale
        scaled = elements * factors.unsqueeze(-1)
        numbers: Tensor = scaled.flatten(-2)[..., : self.size].movedim(-1, self.axis)
        return numbers.contiguous()


def round_to_blocks(
    source: Tensor,
    fmt: BlockFormat | str,
    *,
    axis: int = -1,
    out: Tensor | None = None,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    seed: int = 0,
    offset: int = 0,
) -> Tensor:
    """Return `source`, float32, bfloat16 or float16, rounded to a block format, blocks lying along `axis`.

    The result is float32, or goes into `out`, which may be `source`. A last block that is short counts as filled with
    zeros. What is beyond an element's largest number saturates; a block with an infinity or NaN becomes NaN. How
    scales are found, and from where, is said in `mezzotint.kernels.blocks`.

    Raises FormatError for another dtype, another shape of `out`, or a tensor without axes.
    """
    rounded, _, _, size = _blocks(source, fmt, axis, rounding, seed, offset, is_code=False, out=out)
    if out is not None and rounded is out:
        return out
    numbers = rounded[..., :size].movedim(-1, axis)
    return numbers.contiguous() if out is None else out.copy_(numbers)


def quantize_blocks(
    source: Tensor,
    fmt: BlockFormat | str,
    *,
    axis: int = -1,
    rounding: Rounding = Rounding.NEAREST_EVEN,
    seed: int = 0,
    offset: int = 0,
) -> Blocks:
    """Return what `round_to_blocks` does as codes and scales, as they are stored."""
    fmt = _block_format(fmt)
    codes, scales, tensor_scale, size = _blocks(source, fmt, axis, rounding, seed, offset, is_code=True, out=None)
    stored = scales.view(dtype_of(fmt.scale) or torch.uint8)
    axis = axis % max(source.dim(), 1)
    return Blocks(fmt=fmt, codes=codes, scales=stored, tensor_scale=tensor_scale, axis=axis, size=size)


def _blocks(
    source: Tensor,
    fmt: BlockFormat | str,
    axis: int,
    rounding: Rounding,
    seed: int,
    offset: int,
    *,
    is_code: bool,
    out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Return numbers or codes, `axis` last and padded; scale codes; the tensor's scale; the axis's true size."""
    fmt = _block_format(fmt)
    if not torch.compiler.is_compiling():
        source = readable(source, "source")
        if out is not None:
            out = _writable(out)
            _check_places(out)
    _check_source(source.dtype, rounding)
    if source.dim() == 0:
        raise FormatError(f"{fmt.name} needs an axis to lay blocks along; pass a tensor of at least one axis")
    if not isinstance(axis, int) or not -source.dim() <= axis < source.dim():
        raise FormatError(f"axis={echoed(axis)} is none of the tensor's {source.dim()} axes; pass -1 for the last")
    if out is not None and (out.shape != source.shape or out.device != source.device):
        raise FormatError(
            f"out has the shape {tuple(out.shape)}, the tensor {tuple(source.shape)}; pass out= of the same shape"
        )
    is_last = axis in (-1, source.dim() - 1)
    laid = source.detach() if is_last else source.detach().movedim(axis, -1)
    size = laid.shape[-1]
    padding = -size % fmt.block_size
    laid = torch.nn.functional.pad(laid, (0, padding)).contiguous() if padding else laid.contiguous()
    if out is not None and is_last and not padding and out.dtype is torch.float32 and out.is_contiguous():
        rounded = out
    else:
        rounded = torch.empty_like(laid, dtype=torch.uint8 if is_code else torch.float32)
    blocks_shape = (*laid.shape[:-1], laid.shape[-1] // fmt.block_size)
    scales = torch.empty(blocks_shape, dtype=torch.uint8, device=source.device)
    tensor_scale = _tensor_scale(laid, fmt)
    if not _is_reachable(laid, rounded):
        _generic_blocks(laid, rounded, scales, tensor_scale, fmt, rounding, seed, offset, is_code=is_code)
    else:
        _entries().round_blocks_at(
            laid.data_ptr(),
            _KINDS[laid.dtype],
            rounded.data_ptr(),
            CODES if is_code else FLOAT32,
            scales.data_ptr(),
            laid.numel(),
            fmt.block_size,
            _address(_target(fmt.element, Overflow.SATURATE)),
            fmt.element.max_exponent,
            0.0 if tensor_scale is None else float(tensor_scale),
            _MODES[rounding],
            _signed(seed),
            _signed(offset),
        )
    return rounded, scales, tensor_scale, size


def _generic_blocks(
    laid: Tensor,
    rounded: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    fmt: BlockFormat,
    rounding: Rounding,
    seed: int,
    offset: int,
    *,
    is_code: bool,
) -> None:
    element = _target(fmt.element, Overflow.SATURATE)
    numbers = laid.float().reshape(-1, fmt.block_size)
    top = (numbers.view(torch.int32) & 0x7FFFFFFF).amax(dim=-1, keepdim=True)
    if tensor_scale is not None:
        scale_target = _target(fmt.scale, Overflow.SATURATE)
        inverse, factor, code = generic.nvfp4_scales(top, tensor_scale, scale_target)
    else:
        inverse, factor, code = generic.mx_scales(top, fmt.element.max_exponent)
    scaled = torch.where(factor.isnan(), 0.0, numbers * inverse)
    near = generic.round_values(scaled.flatten(), element, rounding, seed, offset)
    scales.copy_(code.to(torch.uint8).view(scales.shape))
    if is_code:
        _fill(rounded, generic.encode_values(near, element), True)
    else:
        rounded.copy_((near.view_as(numbers) * factor).view(rounded.shape))


def _tensor_scale(laid: Tensor, fmt: BlockFormat) -> Tensor | None:
    """Return NVFP4's scale of the tensor, amax / (largest scale * largest element), over finite numbers."""
    if not fmt.has_tensor_scale:
        return None
    one = torch.ones((), dtype=torch.float32, device=laid.device)
    if laid.numel() == 0:
        return one
    amax = laid.float().abs().nan_to_num(0.0, posinf=0.0).amax()
    scale = amax / (FLOAT8_E4M3FN.max * fmt.element.max)
    return torch.where(scale > 0, scale, one)


def is_measurable(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers of a known format that `range_stats` can read."""
    return tensor.dtype in _FORMATS and has_numbers(tensor)


def range_stats(source: Tensor) -> RangeStats:
    """Return counts, ends and the exponent histogram of a floating-point tensor of any shape; waits for the device.

    A float64 beyond float32's range is counted at the end of the histogram. Raises FormatError for other dtypes.
    """
    if not is_plain(source):
        source = readable(source, "source")
        if source.is_meta or type(source).__name__ == "FakeTensor":
            raise FormatError("source must have numbers, got a meta or fake tensor; pass one on a real device")
    fmt = format_of(source.dtype)
    if source.dtype not in _KINDS and source.dtype is not torch.float64:
        source = source.detach().float()
    if source.dtype not in _KINDS or not _is_reachable(source):
        try:
            return generic.range_stats(
                source.detach().flatten() if fmt.bits == 64 else _as_float32(source), fmt.min_exponent
            )
        except (RuntimeError, NotImplementedError) as error:
            name = type(source).__name__
            raise FormatError(
                f"source must be a tensor whose numbers can be read here, got a {name}: "
                f"{str(error)[:120]}; pass a plain tensor of its numbers"
            ) from error
    import numpy as np

    found = np.zeros(NUM_COUNTS, np.int64)
    kind = _KINDS[source.dtype]
    largest, smallest = _entries().range_counts_at(source.data_ptr(), kind, source.numel(), found)
    counts = found.tolist()
    exponents = tuple(counts[:NAN])
    return RangeStats(
        count=source.numel(),
        nans=counts[NAN],
        infinities=counts[INF],
        zeros=counts[ZERO],
        subnormals=num_below(exponents, counts[ZERO], fmt.min_exponent),
        amax=largest,
        smallest=smallest,
        exponents=exponents,
    )


def add_range_counts(source: Tensor, counts: Any) -> tuple[float, float, int] | None:
    """Add a tensor's numbers to running counts, in microseconds; None where the compiled loops cannot walk it.

    `counts` is an int64 array of `NUM_COUNTS` places as `kernels.stats.range_counts` fills it. Returns the largest
    finite and the smallest other than 0 of this tensor, and how many of its numbers are infinities or NaN.
    """
    kind = _KINDS.get(source.dtype)
    if kind is None or not _is_reachable(source):
        return None
    before = counts[_SPECIAL]
    largest, smallest = _entries().range_counts_at(source.data_ptr(), kind, source.numel(), counts)
    return largest, smallest, int(counts[_SPECIAL] - before)


@cache
def _entries() -> Any:
    """Return the compiled loops; importing them takes half a second, so it waits for the first call."""
    from mezzotint.kernels import entries

    return entries


def _is_reachable(one: Tensor, other: Tensor | None = None, *, needs_order: bool = False) -> bool:
    """Return whether the compiled loops can walk one tensor, or two side by side, as dense CPU memory.

    Dense tensors of equal strides are walked in storage order, whatever the order of their axes, unless `needs_order`.
    """
    if torch.compiler.is_compiling() or not is_plain(one):
        return False
    if other is None:
        return one.is_contiguous() or _is_dense(one)
    if not is_plain(other):
        return False
    if not (one.is_contiguous() and other.is_contiguous()) and (
        needs_order or one.stride() != other.stride() or not _is_dense(one)
    ):
        return False
    return not _overlap(one, other)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill their stretch of memory, each place once."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors share memory without being the same words."""
    start, begin = one.data_ptr(), other.data_ptr()
    if start == begin and one.dtype is other.dtype:
        return False
    return start < begin + other.nbytes and begin < start + one.nbytes


def _signed(number: int) -> int:
    """Return the int64 that has a number's last 64 bits: one type for all, as each other would be compiled anew."""
    if not isinstance(number, int):
        raise FormatError(f"seed and offset must be whole numbers, got {echoed(number)}; pass an int")
    number &= _MASK_64
    return number - (1 << 64) if number >> 63 else number


def target_address(fmt: FloatFormat, overflow: Overflow) -> int:
    """Return where the numbers lie that compiled loops round to a format by; they stay there for good."""
    return _address(_target(fmt, overflow))


_arrays: dict[Target, Any] = {}


def _address(numbers: Target) -> int:
    """Return where a target's numbers lie as uint32; they stay there for good."""
    found = _arrays.get(numbers)
    if found is None:
        import numpy as np

        array = np.array(numbers, np.uint32)
        found = _arrays[numbers] = (array, array.ctypes.data)
    return int(found[1])


def _as_float32(source: Tensor) -> Tensor:
    return source.detach().float().contiguous().flatten()


def _fill(out: Tensor, flat: Tensor, is_code: bool) -> None:
    """Write numbers, or codes as int32, into `out` of any layout."""
    if not is_code or out.dtype in (torch.bfloat16, torch.float16, torch.float32):
        numbers = flat if not is_code else flat.to(torch.int16).view(out.dtype)
        out.detach().copy_(numbers.view(out.shape))
        return
    stored = _WORDS[out.element_size()]
    out.detach().copy_(flat.to(stored).view(out.dtype).view(out.shape))


def _target(fmt: FloatFormat, overflow: Overflow | None) -> Target:
    # torch.compile warns of a cache that it sees through
    found: Target = target.__wrapped__(fmt, overflow) if torch.compiler.is_compiling() else target(fmt, overflow)
    return found


def _check_source(dtype: torch.dtype, rounding: Rounding) -> None:
    if dtype not in _KINDS:
        raise FormatError(f"tensors of {dtype} are not rounded; pass one of {_listed(_KINDS)}")
    if rounding not in _MODES:
        raise FormatError(f"unknown rounding {rounding!r}; pass one of {', '.join(Rounding)}")


def _takes_codes(out_dtype: torch.dtype, fmt: FloatFormat) -> bool:
    """Return whether a result of `out_dtype` takes codes rather than numbers."""
    if out_dtype in _KINDS:
        if _holds(_FORMATS[out_dtype], fmt):
            return False
        raise FormatError(f"{out_dtype} does not hold every number of {fmt.name}; pass out= of float32")
    if out_dtype is dtype_of(fmt) or (out_dtype is torch.uint8 and fmt.bits <= 8):
        return True
    raise FormatError(f"{out_dtype} stores neither the numbers nor the codes of {fmt.name}; pass out= of float32")


def _holds(container: FloatFormat, fmt: FloatFormat) -> bool:
    return (
        container.mantissa_bits >= fmt.mantissa_bits
        and container.max >= fmt.max
        and container.smallest_subnormal <= fmt.smallest_subnormal
    )


def _format(fmt: FloatFormat | str) -> FloatFormat:
    if not isinstance(fmt, str | FloatFormat):
        raise FormatError(f"fmt={echoed(fmt)} is no number format; pass a name such as 'bfloat16', or a FloatFormat")
    return find_format(fmt) if isinstance(fmt, str) else fmt


def _block_format(fmt: BlockFormat | str) -> BlockFormat:
    if not isinstance(fmt, str | BlockFormat):
        raise FormatError(f"fmt={echoed(fmt)} is no block format; pass a name such as 'mxfp8_e4m3', or a BlockFormat")
    return find_block_format(fmt) if isinstance(fmt, str) else fmt


def _listed(dtypes: Any) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)
