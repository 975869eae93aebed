"""KernelChoice: for one format, whether torch's own CPU kernels are used or ours, and why. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from mezzotint.hardware.timings import spell_ratio

# Native formats measure at most 1.0 of float32's time, emulated ones at least 4. Half-way between the two, a busy
# machine cannot turn the decision, and a resumed run computes with the kernels of the run it continues.
SLOW_ABOVE = 2.0


class Path(StrEnum):
    """Which kernels compute a format's matrix products, convolutions and attention gradients."""

    STOCK = "stock"  # torch's own
    UPCAST = "upcast"  # operands to float32, torch's float32 kernel, one rounding of the result
    PACKED = "packed"  # the same, but large products by a kernel of ours that converts while it packs


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The choice for one format; `ratios` are stock matmul times over float32's, by layout, empty if not measured."""

    format: str
    path: Path
    ratios: tuple[tuple[str, float], ...]
    reason: str


def decide(format_name: str, ratios: Mapping[str, float], wish: str, *, can_pack: bool) -> KernelChoice:
    """Return the choice for a format from its measured ratios, or from the user's wish ("off", "upcast", "packed").

    `can_pack` says whether this processor suits the kernel that converts while it packs.
    """
    measured = tuple(ratios.items())
    fast = Path.PACKED if can_pack else Path.UPCAST
    if wish != "auto":
        path = {"off": Path.STOCK, "upcast": Path.UPCAST, "packed": fast}[wish]
        return KernelChoice(
            format=format_name, path=path, ratios=measured, reason=f"MEZZOTINT_LOWPREC={wish} asks for it"
        )
    worst = max(ratios.values(), default=0.0)
    if worst > SLOW_ABOVE:
        reason = f"torch's {format_name} matmul takes up to {worst:.3g} times float32's time here"
        return KernelChoice(format=format_name, path=fast, ratios=measured, reason=reason)
    reason = f"torch's {format_name} matmul takes at most {spell_ratio(worst)} of float32's time here"
    return KernelChoice(format=format_name, path=Path.STOCK, ratios=measured, reason=reason)
