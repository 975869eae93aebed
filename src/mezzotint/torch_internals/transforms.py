"""What traces or transforms a call: compilers, `torch.func`, and legacy batching."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mezzotint.torch_internals.registry import Feature, value

_NEEDED = (Feature.FAST_CPU, Feature.LAYERS)

tracing_state: Callable[[], Any] = value("torch._C._get_tracing_state", "whether torch.jit traces", needed_by=_NEEDED)
is_inside_transform: Callable[[], bool] = value(
    "torch._C._are_functorch_transforms_active", "whether torch.func transforms a call", needed_by=_NEEDED
)
is_legacy_batched: Callable[[Tensor], bool] = value(
    "torch._C._functorch.is_legacy_batchedtensor",
    "whether torch.autograd.grad maps over gradients",
    needed_by=_NEEDED,
)
