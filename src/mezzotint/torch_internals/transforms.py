"""What traces or transforms a call: compilers, `torch.func`, and legacy batching.

Where torch does not tell, calls count as transformed, and compiled kernels leave them to torch's operations.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mezzotint.torch_internals.registry import value

tracing_state: Callable[[], Any] = value(
    "torch._C._get_tracing_state",
    "whether torch.jit traces; without it, torch's operations are used",
    otherwise=lambda: True,
)
is_inside_transform: Callable[[], bool] = value(
    "torch._C._are_functorch_transforms_active",
    "whether torch.func transforms a call; without it, torch's operations are used",
    otherwise=lambda: True,
)
is_legacy_batched: Callable[[Tensor], bool] = value(
    "torch._C._functorch.is_legacy_batchedtensor",
    "whether torch.autograd.grad maps over gradients; without it, torch's operations are used",
    otherwise=lambda _tensor: True,
)
