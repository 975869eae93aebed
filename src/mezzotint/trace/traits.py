"""What is known about an ATen operation from its schema: what it writes, whether it is a view or random; its cost.

FLOPs of products, convolutions and attention come from the formulas of `torch.utils.flop_counter`; elementwise
operations and reductions count one per element. What has neither has no figure.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from mezzotint.torch_internals.dispatch import schema_of
from mezzotint.torch_internals.operators import aten
from mezzotint.trace.record import Kind

_MAKERS = frozenset(
    {
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "zeros",
        "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like", "new_full", "arange", "rand",
        "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "eye", "linspace", "logspace",
        "scalar_tensor", "normal_", "uniform_", "random_", "bernoulli_", "zero_", "fill_", "_foreach_zero_",
        "lift_fresh", "tril_indices", "triu_indices", "normal", "bernoulli", "exponential_", "set_", "resize_",
        "_foreach_fill_", "trunc_normal_",
    }
)  # fmt: skip
_UNWRITTEN = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted", "set_", "resize_"}
)
_ALIASES = frozenset({"detach", "alias", "lift_fresh", "_unsafe_view", "_reshape_alias"})
_ARRANGED = frozenset({"clone", "contiguous", "stack", "cat", "repeat", "index_select", "permute_copy", "flip", "roll"})
_CASTS = frozenset({"_to_copy", "to"})
_COPIES = frozenset({"copy_", "_foreach_copy_", "clone", "contiguous", "detach", "alias", "lift_fresh_copy"})
_REDUCTIONS = frozenset(
    {"sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "norm", "linalg_vector_norm"}
)


COLLECTIVES = ("c10d", "_c10d_functional", "c10d_functional")
"""Namespaces of the operations between processes."""
UNDERSTOOD = ("allreduce", "all_reduce", "reduce", "_reduce_scatter", "allgather", "all_gather", "_allgather", "gather",
              "broadcast", "barrier", "monitored_barrier", "scatter", "alltoall", "all_to_all", "send", "recv",
              "wait_tensor", "_wrap_tensor")  # fmt: skip
"""How the names of those begin of which it is known whether they add numbers up."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What an operation does, whatever it is called with. `written` are the positions and names of written arguments;
    what `is_arranged` holds the numbers of its inputs in another order; a marker is a note or a question, no work."""

    op: str
    name: str
    kind: Kind
    is_view: bool
    is_random: bool
    is_unwritten: bool
    is_copy: bool
    is_arranged: bool
    written: tuple[int | str, ...]
    cost: Callable[..., Any] | None
    is_elementwise: bool
    is_marker: bool
    num_results: int | None = None


_SEVERAL_RESULTS = {
    "_cudnn_rnn": 3, "_thnn_fused_lstm_cell": 2, "mkldnn_rnn_layer": 3, "miopen_rnn": 3,
    "_aminmax": 2, "_linalg_svd": 3, "_linalg_eigh": 2, "_linalg_slogdet": 2,
}  # fmt: skip
_INTERNAL = ("_", "native_", "cudnn_", "miopen_", "mkldnn_")
_ALL_RESULTS = ("_foreach_", "_fused_", "_amp_", "_unpack", "_pack", "_unique")


def num_results_of(base: str) -> int | None:
    """Return how many leading outputs are results, None for all: the others are tables kept for backward.

    Operations that torch calls under another name than the user did (`ctc_loss` is `_ctc_loss`) return, behind their
    result, what only their own backward reads: logsumexp, saved means, lattices of path probabilities.
    """
    if "backward" in base or base.startswith(_ALL_RESULTS):
        return None
    if base in _SEVERAL_RESULTS:
        return _SEVERAL_RESULTS[base]
    is_internal = base.startswith(_INTERNAL) or base.endswith(("_forward", "_with_indices", "_flash_attention"))
    return 1 if is_internal else None


def traits_of(func: Any) -> Traits:
    """Return the traits of an operation (an OpOverload, or a higher-order operator)."""
    schema = schema_of(func)
    if schema is None:
        name = str(func)
        return Traits(name, name, Kind.COMPUTE, False, True, False, False, False, (), None, False, False)
    namespace, _, base = schema.name.partition("::")
    written = tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    tags = func.tags
    if func.is_view or base in _ALIASES:
        kind = Kind.VIEW
    elif base in _MAKERS:
        kind = Kind.MAKE
    elif base in _CASTS:
        kind = Kind.CAST
    else:
        kind = Kind.COMPUTE
    return Traits(
        op=f"{namespace}.{base}.{schema.overload_name or 'default'}",
        name=base,
        kind=kind,
        is_view=kind is Kind.VIEW,
        is_random=torch.Tag.nondeterministic_seeded in tags,
        # a collective may still be under way when it returns; `wait_tensor` has its numbers
        is_unwritten=base in _UNWRITTEN or namespace == "fsdp" or (namespace in COLLECTIVES and base != "wait_tensor"),
        is_copy=base in _COPIES or base in _CASTS,
        is_arranged=base in _ARRANGED,
        written=written,
        cost=_COSTS.get(func.overloadpacket),
        is_elementwise=torch.Tag.pointwise in tags or torch.Tag.reduction in tags or base in _REDUCTIONS,
        is_marker=namespace in ("profiler", "prim"),
        num_results=None if written else num_results_of(base),
    )


def flops_of(traits: Traits, args: Any, kwargs: Any, out: Any, largest: int) -> int | None:
    """Return the FLOPs of one execution, None where they are not known; `largest` elements go in or come out."""
    if traits.kind in (Kind.VIEW, Kind.CAST, Kind.MAKE) or traits.is_copy:
        return 0
    if traits.cost is not None:
        try:
            return int(traits.cost(*args, **kwargs, out_val=out))
        except (TypeError, ValueError, AssertionError, AttributeError, IndexError):
            return None  # a formula that does not fit this call is no formula
    return largest if traits.is_elementwise else None


def _lstm_flops(
    input: Tensor, weight0: Tensor, weight1: Tensor, *_args: Any, out_val: Any = None, **_kwargs: Any
) -> int:
    """Return the FLOPs of one layer of `mkldnn_rnn_layer`: two products per time step."""
    steps = input.shape[0] * input.shape[1]
    return 2 * steps * (weight0.shape[0] * weight0.shape[1] + weight1.shape[0] * weight1.shape[1])


_sdpa_flops: Callable[..., int] = flop_counter.sdpa_flop_count
_sdpa_backward_flops: Callable[..., int] = flop_counter.sdpa_backward_flop_count


def _attention_flops(
    query: Tensor, key: Tensor, value: Tensor, *_args: Any, out_val: Any = None, **_kwargs: Any
) -> int:
    return int(_sdpa_flops(query.shape, key.shape, value.shape))


def _attention_backward_flops(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_args: Any, out_val: Any = None, **_kwargs: Any
) -> int:
    return int(_sdpa_backward_flops(grad.shape, query.shape, key.shape, value.shape))


_COSTS: dict[Any, Callable[..., Any]] = {
    **flop_counter.flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten.mkldnn_rnn_layer: _lstm_flops,
}
