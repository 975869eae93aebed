"""Gradients of one update: unscale, check, measure, clip, in this order.

The arithmetic is torch's (the fused unscale-and-check of its GradScaler, `get_total_norm`, `clip_grads_with_norm_`),
so that a run equals the hand-written loop bit for bit.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mezzotint.torch_internals.optimizers import unscale_in_place
from mezzotint.torch_internals.tensors import numbers_of_sparse


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientReport:
    """What was found: are all gradients finite, and their 2-norm (not finite where they are not)."""

    are_finite: bool
    norm: float


def prepare_gradients(
    parameters: Sequence[nn.Parameter], *, multiplier: float, is_scaled: bool, max_norm: float | None
) -> GradientReport:
    """Multiply all gradients by `multiplier`, check and measure them, and clip their 2-norm to `max_norm`.

    `multiplier` is 1 / loss scale, times the correction of an incomplete accumulation. Gradients that are not finite
    are left as they are: the caller drops them. One synchronisation with the device.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            # rows that occur twice count as their sum, as in the dense gradient
            parameter.grad = parameter.grad.coalesce()
    grads = [p.grad for p in parameters if p.grad is not None]
    values = [_values(grad) for grad in grads]
    if is_scaled or multiplier != 1.0:
        are_finite = not _unscale(grads, multiplier)
        if not are_finite:
            return GradientReport(are_finite=False, norm=math.nan)
        total_norm = get_total_norm(values)
        norm = float(total_norm)
    else:
        total_norm = get_total_norm(values)
        norm = float(total_norm)
        if not math.isfinite(norm) and any_nonfinite(grads):
            return GradientReport(are_finite=False, norm=norm)
    if not math.isfinite(norm):
        # finite gradients whose squares leave float32, above about 1.8e19: measure in float64
        total_norm = _norm_float64(grads)
        norm = float(total_norm)
    # torch multiplies by min(1, max_norm / (norm + 1e-6)) always; a factor of exactly 1 changes no bit and is left
    # out. The margin covers torch's float32 quotient, which may fall below 1 where this float64 one does not.
    if max_norm is not None and max_norm / (norm + 1e-6) < 1.0 + 1e-6:
        for part, grad in zip(values, grads, strict=True):
            if grad.is_sparse:
                part.mul_(torch.clamp(max_norm / (total_norm + 1e-6), max=1.0).to(part.device))
        clip_grads_with_norm_([p for p in parameters if p.grad is None or not p.grad.is_sparse], max_norm, total_norm)
    return GradientReport(are_finite=True, norm=norm)


def nonfinite_parameters(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters whose gradient holds NaN or infinity, in the order given."""
    return [p for p in parameters if p.grad is not None and any_nonfinite([p.grad])]


def any_nonfinite(grads: Iterable[Tensor]) -> bool:
    """Return whether any gradient holds NaN or infinity."""
    return any(not bool(torch.isfinite(_values(grad)).all()) for grad in grads)


def _unscale(grads: Sequence[Tensor], multiplier: float) -> bool:
    """Multiply in place; return whether anything was not finite."""
    by_place: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        by_place.setdefault((grad.device, grad.dtype), []).append(_values(grad))
    found: list[Tensor] = []
    for (device, _dtype), group in by_place.items():
        flag = torch.zeros((), dtype=torch.float32, device=device)
        factor = torch.full((), multiplier, dtype=torch.float32, device=device)
        unscale_in_place(group, flag, factor)
        found.append(flag)
    return any(bool(flag.item()) for flag in found)


def _values(grad: Tensor) -> Tensor:
    """Return the tensor that holds a gradient's numbers; that of a sparse gradient is its values."""
    return numbers_of_sparse(grad) if grad.is_sparse else grad


def _norm_float64(grads: Sequence[Tensor]) -> Tensor:
    device = grads[0].device
    norms = [torch.linalg.vector_norm(_values(grad), dtype=torch.float64).to(device) for grad in grads]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
