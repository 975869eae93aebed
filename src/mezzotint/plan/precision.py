"""Running a program in another precision than it was written in: what `plan --policy` does to autocast.

A program that opens autocast regions has them opened with another dtype, or not at all; one that opens none has its
outermost modules called inside one, and its losses computed outside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from mezzotint.errors import PlanError
from mezzotint.hardware.devices import DeviceSpec
from mezzotint.patches import Patches
from mezzotint.torch_internals import flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """One column of a plan. `dtype` is autocast's, None for none; `has_tf32` sets torch's switch for products."""

    name: str
    dtype: torch.dtype | None = None
    has_tf32: bool | None = None
    has_fp8: bool = False
    is_as_written: bool = False

    @property
    def format(self) -> str:
        """The format that most products run in, as the peaks of cards name it."""
        if self.has_fp8:
            return "float8_e4m3fn"
        if self.dtype is not None:
            return str(self.dtype).removeprefix("torch.")
        return "tfloat32" if self.has_tf32 else "float32"


AS_WRITTEN = Precision(name="as written", is_as_written=True)
_ALL = (
    AS_WRITTEN,
    Precision(name="float32", has_tf32=False),
    Precision(name="tf32", has_tf32=True),
    Precision(name="fp16", dtype=torch.float16, has_tf32=True),
    Precision(name="bf16", dtype=torch.bfloat16, has_tf32=True),
    Precision(name="fp8", dtype=torch.bfloat16, has_tf32=True, has_fp8=True),
)
_ALIASES = {
    "script": "as written", "fp32": "float32", "tfloat32": "tf32", "float16": "fp16", "fp16-mixed": "fp16",
    "bfloat16": "bf16", "bf16-mixed": "bf16", "fp8-mixed": "fp8", "float8": "fp8",
}  # fmt: skip


def find_precision(name: str) -> Precision:
    """Return the precision of a name. Raises PlanError for one that cannot be planned."""
    key = _ALIASES.get(name.lower(), name.lower())
    for one in _ALL:
        if one.name == key:
            return one
    raise PlanError(f"{name!r} cannot be planned; choose among {', '.join(one.name for one in _ALL)}")


def default_precisions(card: DeviceSpec) -> tuple[Precision, ...]:
    """Return what is worth comparing on a card: as written, and all that its tensor cores have."""
    capability = card.compute_capability or (0, 0)
    names = ["as written", "float32"]
    names += ["tf32"] if capability >= (8, 0) else []
    names += ["fp16"] if capability >= (7, 0) else []
    names += ["bf16"] if capability >= (8, 0) else []
    names += ["fp8"] if capability >= (8, 9) else []
    return tuple(find_precision(name) for name in names)


@contextmanager
def in_precision(precision: Precision) -> Iterator[None]:
    """Run what is inside in another precision than it was written in."""
    if precision.is_as_written:
        yield
        return
    patches, regions = Patches(), [0]

    def init(
        original: Any, region: Any, device_type: str, dtype: Any = None, enabled: bool = True, **rest: Any
    ) -> None:
        if device_type == "cuda" and enabled:
            regions[0] += 1
            dtype, enabled = precision.dtype or dtype, precision.dtype is not None
        original(region, device_type, dtype, enabled, **rest)

    depth: list[Any] = []

    def before(module: Any, _args: Any) -> None:
        depth.append(module)
        if len(depth) == 1 and precision.dtype is not None and not regions[0]:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", precision.dtype)
            torch.autocast_increment_nesting()

    def after(module: Any, _args: Any, _output: Any) -> None:
        while depth:
            found = depth.pop()
            if found is module:
                break
        if not depth and precision.dtype is not None and not regions[0] and torch.is_autocast_enabled("cuda"):
            if torch.autocast_decrement_nesting() == 0:
                torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)

    patches.wrap(torch.amp.autocast_mode.autocast, "__init__", init)
    patches.replace(torch, "set_float32_matmul_precision", lambda _precision: None)
    removers = [
        register_module_forward_pre_hook(before).remove,
        register_module_forward_hook(after, always_call=True).remove,
    ]
    had_tf32 = flags.allows_tf32_matmul()
    flags.allow_tf32_matmul(bool(precision.has_tf32))
    try:
        yield
    finally:
        flags.allow_tf32_matmul(had_tf32)
        for remove in removers:
            remove()
        patches.undo()
