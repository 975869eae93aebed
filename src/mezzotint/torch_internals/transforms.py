"""What traces or transforms a call: compilers, `torch.func`, and legacy batching.

Where torch does not tell, calls count as transformed, and compiled kernels leave them to torch's operations.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mezzotint.torch_internals.registry import Feature, value

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
is_wrapped: Callable[[Tensor], bool] = value(
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "whether torch.func wraps a tensor",
    needed_by=(Feature.RECORDING,),
    otherwise=lambda _tensor: False,
)
is_zero_tensor: Callable[[Tensor], bool] = value(
    "torch._is_zerotensor",
    "whether a tensor of forward-mode differentiation has no memory",
    needed_by=(Feature.RECORDING,),
    otherwise=lambda _tensor: False,
)
is_functional: Callable[[Tensor], bool] = value(
    "torch._is_functional_tensor",
    "whether functionalization wraps a tensor",
    needed_by=(Feature.RECORDING,),
    otherwise=lambda _tensor: False,
)
