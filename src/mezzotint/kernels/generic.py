"""What the compiled loops do, in torch operations: for other devices, fake tensors and graphs.

The steps are those of `loops`, `blocks`, `philox` and `stats`, and the results the same, bit for bit (but for the
payload of a NaN). All tensors are flat; numbers come in and go out as float32.
"""

import math

import torch
from torch import Tensor

from mezzotint.formats.rounding import Rounding
from mezzotint.kernels.constants import BLOCK_WORDS, COUNTERS, HALVES, KEY_STEPS, MULTIPLIERS, ROUNDS
from mezzotint.kernels.ranges import BIAS, NUM_FIELDS, RangeStats
from mezzotint.kernels.target import Target

_MAGNITUDE, _INFINITY, _QUIET = 0x7FFFFFFF, 0x7F800000, 0x00400000
_SIGN = -(1 << 31)
_LOW = 0xFFFFFFFF


def round_values(numbers: Tensor, target: Target, rounding: Rounding, seed: int, offset: int) -> Tensor:
    """Return float32 `numbers` rounded to the format that `target` describes."""
    bits = numbers.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    sign = bits & _SIGN
    if target.is_wide:
        near = _wide(magnitude, target, rounding, seed, offset)
    else:
        near, sign = _narrow(magnitude, sign, target, rounding, seed, offset)
    is_nan = magnitude > _INFINITY
    return torch.where(is_nan, bits | _QUIET, near | sign).view(torch.float32)


def encode_values(rounded: Tensor, target: Target) -> Tensor:
    """Return the codes, int32, of float32 numbers that the format has."""
    bits = rounded.view(torch.int32)
    magnitude = bits & _MAGNITUDE
    sign = (bits < 0).to(torch.int32) * target.sign_bit
    if target.is_wide:
        return (magnitude >> target.dropped) | sign
    near, exponent = _clamped(magnitude, target)
    shift = exponent + (target.dropped << 23)
    count = (near + shift.view(torch.float32)).view(torch.int32) - shift
    code = ((exponent - target.lowest) >> target.dropped) + count
    code = torch.where(code > target.largest_code, target.beyond_code, code)
    code = torch.where(magnitude > _INFINITY, target.nan_code, code)
    if not target.keeps_zero_sign:
        sign = torch.where(code == 0, 0, sign)
    return code | sign


def _wide(magnitude: Tensor, target: Target, rounding: Rounding, seed: int, offset: int) -> Tensor:
    dropped, beyond = target.dropped, target.beyond
    mask = (1 << dropped) - 1
    if rounding is Rounding.TOWARD_ZERO:
        return torch.where(magnitude == _INFINITY, beyond, magnitude & ~mask)
    if rounding is Rounding.STOCHASTIC:
        added = halves(magnitude.numel(), seed, offset, magnitude.device) & mask
    else:
        added = (mask >> 1) + ((magnitude >> dropped) & (mask & 1))
    # the sum wraps for a NaN alone, which the caller puts back
    near = (magnitude + added) & ~mask
    return torch.where(near >= _INFINITY, beyond, near)


def _narrow(
    magnitude: Tensor, sign: Tensor, target: Target, rounding: Rounding, seed: int, offset: int
) -> tuple[Tensor, Tensor]:
    places = target.dropped << 23
    number, exponent = _clamped(magnitude, target)
    shift = (exponent + places).view(torch.float32)
    near = (number + shift) - shift
    if rounding is not Rounding.NEAREST_EVEN:
        place = exponent + places - (23 << 23)
        near = torch.where(near > number, near - place.view(torch.float32), near)
        if rounding is Rounding.STOCHASTIC:
            scale = (((127 + 127 + 31) << 23) - place).view(torch.float32)
            way = ((number - near) * scale).to(torch.int32)
            noise = (words(magnitude.numel(), seed, offset, magnitude.device) >> 1).to(torch.int32)
            near = torch.where(noise < way, near + place.view(torch.float32), near)
    bits = near.view(torch.int32)
    over = target.largest if rounding is Rounding.TOWARD_ZERO else target.beyond
    bits = torch.where(bits > target.largest, over, bits)
    bits = torch.where(magnitude == _INFINITY, target.beyond, bits)
    if not target.keeps_zero_sign:
        sign = torch.where(bits == 0, 0, sign)
    return bits, sign


def _clamped(magnitude: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Return the numbers, cut off at the power of two after the format's largest, and the exponents of their places."""
    clamped = torch.where(magnitude > target.clamp, target.clamp, magnitude)
    return clamped.view(torch.float32), (clamped & _INFINITY).clamp_min(target.lowest)


def words(count: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """Return the first `count` random words of a seed and an offset, int64 from 0 to 2^32 - 1."""
    num_blocks = -(-count // BLOCK_WORDS)
    counter = torch.arange(num_blocks * COUNTERS, dtype=torch.int64, device=device)
    a, b = counter & _LOW, counter >> 32
    c, d = torch.full_like(a, offset & _LOW), torch.full_like(a, offset >> 32 & _LOW)
    x, y = seed & _LOW, seed >> 32 & _LOW
    for _ in range(ROUNDS):
        p, q = a * MULTIPLIERS[0], c * MULTIPLIERS[1]  # modulo 2^64, all of whose bits are wanted
        a, b = (q >> 32 & _LOW) ^ b ^ x, q & _LOW
        c, d = (p >> 32 & _LOW) ^ d ^ y, p & _LOW
        x, y = (x + KEY_STEPS[0]) & _LOW, (y + KEY_STEPS[1]) & _LOW
    return torch.stack([word.view(num_blocks, COUNTERS) for word in (a, b, c, d)], dim=1).flatten()[:count]


def halves(count: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """Return the first `count` random numbers of 16 bits, int32."""
    num_groups = -(-count // (2 * HALVES))
    whole = words(num_groups * HALVES, seed, offset, device).view(num_groups, HALVES)
    return torch.cat([whole & 0xFFFF, whole >> 16], dim=1).flatten()[:count].to(torch.int32)


def mx_scales(top: Tensor, largest_exponent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return 1/scale, the scale and its code in E8M0 of blocks whose amax has the bits `top`; see `blocks`."""
    field = ((top & _INFINITY) - (largest_exponent << 23)).clamp_min(0)
    is_finite = top < _INFINITY
    factor = torch.where(field > 0, field, 1 << 22).view(torch.float32)
    inverse = torch.where(is_finite, ((254 << 23) - field).view(torch.float32), 0.0)
    return inverse, torch.where(is_finite, factor, math.nan), torch.where(is_finite, field >> 23, 0xFF)


def nvfp4_scales(top: Tensor, tensor_scale: Tensor, scale_target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for NVFP4, with codes in E4M3, whose saturating target is `scale_target`."""
    is_finite = top < _INFINITY
    wanted = top.view(torch.float32) / 6 / tensor_scale
    rounded = round_values(wanted.clamp_max(448.0), scale_target, Rounding.NEAREST_EVEN, 0, 0)
    factor = rounded * tensor_scale
    inverse = torch.where(is_finite & (factor > 0), 1 / factor, 0.0)
    code = torch.where(is_finite, encode_values(rounded, scale_target), 0x7F)
    return inverse, torch.where(is_finite, factor, math.nan), code


def range_stats(numbers: Tensor, min_exponent: int) -> RangeStats:
    """Return the statistics of float32 or float64 numbers; below 2^min_exponent they count as subnormal."""
    magnitude = numbers.abs()
    is_nan, is_inf, is_zero = numbers.isnan(), numbers.isinf(), numbers == 0
    is_number = ~(is_nan | is_inf)
    fields = (torch.frexp(torch.where(is_number, magnitude, 1.0)).exponent.long() - 1 + BIAS).clamp(0, NUM_FIELDS - 2)
    fields = torch.where(is_zero, 0, torch.where(is_number, fields, NUM_FIELDS - 1))
    exponents = torch.bincount(fields, minlength=NUM_FIELDS).tolist()
    finite = torch.where(is_number, magnitude, 0.0)
    apart = torch.where(is_number & ~is_zero, magnitude, math.inf)
    ends = torch.stack([finite.amax(), apart.amin()]).tolist() if numbers.numel() else [0.0, math.inf]
    num_nan, num_inf, num_zero = torch.stack([is_nan.sum(), is_inf.sum(), is_zero.sum()]).tolist()
    subnormals = int((is_number & ~is_zero & (magnitude < 2.0**min_exponent)).sum())
    return RangeStats(
        count=numbers.numel(),
        nans=num_nan,
        infinities=num_inf,
        zeros=num_zero,
        subnormals=subnormals,
        amax=ends[0],
        smallest=ends[1],
        exponents=tuple(exponents),
    )
