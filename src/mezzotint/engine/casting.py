"""Policy to torch: dtypes, and the contexts that forward and backward run in.

The context is torch's own autocast, so that what runs in which dtype is PyTorch's list and not ours. On a CPU without
units for the format, `mezzotint.lowprec` makes the same operations fast.
"""

from types import TracebackType
from typing import Any, Protocol

import torch

from mezzotint.errors import PolicyError
from mezzotint.policy.policy import Policy

COMPUTE_FORMATS = ("float32", "bfloat16", "float16")
PARAM_FORMATS = ("float32", "bfloat16")


class Context(Protocol):
    """A context manager whose enter and exit may be called in turn, again and again."""

    def __enter__(self) -> Any: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Any: ...


def check_engine_policy(policy: Policy) -> None:
    """Refuse what this engine does not do, whatever the device; raise PolicyError."""
    if policy.compute not in COMPUTE_FORMATS:
        raise PolicyError(
            f"compute={policy.compute} is not offered by the engine; pass one of {', '.join(COMPUTE_FORMATS)}"
        )
    if policy.params not in PARAM_FORMATS:
        raise PolicyError(
            f"params={policy.params} is not offered by the engine; pass one of {', '.join(PARAM_FORMATS)}"
        )
    if policy.params == "bfloat16" and policy.compute != "bfloat16":
        raise PolicyError(
            f"params=bfloat16 with compute={policy.compute} is refused: the weights are rounded to bfloat16 "
            "already, so nothing is won; pass compute=bfloat16"
        )
    if policy.loss != "float32":
        raise PolicyError(f"loss={policy.loss} is refused: the engine computes the loss in float32; pass loss=float32")
    if policy.saved != "float32" and policy.params != "float32":
        raise PolicyError(
            f"saved={policy.saved} with params={policy.params} is refused: only float32 activations are rounded for "
            "backward, and there are few; pass saved=float32"
        )
    if policy.keep and (policy.params != "float32" or policy.compute == "float32"):
        raise PolicyError(
            f"keep={'|'.join(policy.keep)} with params={policy.params}, compute={policy.compute} is refused: it keeps "
            "modules in float32 that autocast would lower, from float32 weights; pass params=float32 and a lower "
            "compute, or leave keep out"
        )
    if policy.reduce not in ("float32", policy.params):
        raise PolicyError(
            f"reduce={policy.reduce} with params={policy.params} is refused: gradients are kept in float32 or in the "
            f"format of the weights; pass {' or '.join(dict.fromkeys(('reduce=float32', f'reduce={policy.params}')))}"
        )


def torch_dtype(format_name: str) -> torch.dtype:
    """Return the torch dtype of a format's full name."""
    dtype = getattr(torch, format_name, None)
    if not isinstance(dtype, torch.dtype):
        raise PolicyError(f"torch {torch.__version__} has no dtype for the format {format_name}")
    return dtype


def compute_contexts(policy: Policy, device: torch.device, *, is_compiled: bool = False) -> list[Context]:
    """Return fresh contexts for one forward pass under `policy` on `device`, outermost first.

    `is_compiled` says that a model is a graph of torch.compile, whose operations have other names.
    """
    if not policy.is_mixed:
        # a float32 policy means float32, also below an autocast of the caller's
        return [torch.autocast(device.type, enabled=False)] if torch.is_autocast_enabled(device.type) else []
    return [
        *kernel_contexts(policy, device, is_compiled=is_compiled),
        torch.autocast(device.type, dtype=torch_dtype(policy.compute)),
    ]


def kernel_contexts(policy: Policy, device: torch.device, *, is_compiled: bool = False) -> list[Context]:
    """Return the contexts that forward and backward both need: fast kernels on a CPU, nothing elsewhere."""
    if device.type != "cpu" or not policy.is_mixed:
        return []
    from mezzotint.lowprec.switch import fast_cpu

    return [fast_cpu(policy.compute, compiled=is_compiled)]
