"""Parts of tensors, storages and modules that have no public name, or a slower one."""

from typing import Any

import torch
from torch import Tensor, nn

from mezzotint.patches import Patches
from mezzotint.torch_internals.registry import Feature, Internal, declare

declare(
    Internal(
        "torch.UntypedStorage._cdata",
        "which storage a tensor without data has",
        needed_by=(Feature.GHOST,),
        check=lambda: hasattr(torch.empty(0, device="cpu").untyped_storage(), "_cdata"),
    )
)
for _name in ("_parameters", "_buffers", "_modules"):
    declare(
        Internal(
            f"torch.nn.Module.{_name}",
            "the parts of a module by name, those that are None included",
            needed_by=(Feature.RECORDING, Feature.GHOST),
            check=lambda name=_name: name in vars(nn.Module()),  # type: ignore[misc]
        )
    )
declare(Internal("torch.nn.Module._apply", "moving a module to a device", needed_by=(Feature.GHOST,)))


def storage_number(storage: Any) -> int:
    """Return a number that no other storage has at the same time."""
    found: int = storage._cdata
    return found


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the parameters of a module itself."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the buffers of a module itself."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the modules in a module itself."""
    return module._modules


def apply_to(module: nn.Module, change: Any) -> None:
    """Change the tensors of a module and of those in it, as `Module.to` does."""
    module._apply(change)  # type: ignore[no-untyped-call]


def replace_apply(patches: Patches, apply: Any) -> None:
    """Make `Module.to` and its like call `apply(module, change, recurse)`."""
    patches.replace(nn.Module, "_apply", apply)


def numbers_of_sparse(tensor: Tensor) -> Tensor:
    """Return the numbers of a sparse tensor, which need not be coalesced."""
    return tensor._values()


declare(Internal("torch.Tensor._values", "the numbers of a sparse gradient", needed_by=(Feature.ENGINE,)))


def is_replica(module: nn.Module) -> bool:
    """Return whether `DataParallel` made a module as a copy."""
    return bool(getattr(module, "_is_replica", False))


def _marks_replicas() -> bool:
    replicate = getattr(nn.Module, "_replicate_for_data_parallel", None)
    return replicate is not None and is_replica(replicate(nn.Module()))


declare(
    Internal(
        "torch.nn.Module._is_replica",
        "whether DataParallel copied a module; without it, copies get names of their own",
        check=_marks_replicas,
    )
)


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wrapped, or the module itself."""
    inner = getattr(module, "_orig_mod", module)
    return inner if isinstance(inner, nn.Module) else module


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile` wraps a module, or has compiled it in place."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


declare(
    Internal(
        "torch._dynamo.OptimizedModule._orig_mod",
        "the module that torch.compile wrapped",
        check=lambda: hasattr(torch.compile(nn.Identity()), "_orig_mod"),  # compiles nothing before a call
    )
)
declare(Internal("torch.nn.Module._compiled_call_impl", "whether Module.compile compiled a module"))
