"""Programs written for several processes, as the one process that a ghost GPU is: a world of one.

`init_process_group` with one process sets nothing up; collectives of one process copy at most, and DDP around a model
keeps its buckets of gradients and nothing else. Several processes are refused.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, nn

from mezzotint.errors import GhostError
from mezzotint.ghost.values import here
from mezzotint.patches import Patches
from mezzotint.torch_internals.trees import tree_map_only


class _Done:
    """The handle of a collective that is over."""

    def wait(self, *_args: Any) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """It is."""
        return True


class GhostDataParallel(nn.Module):
    """`DistributedDataParallel` of one process: the module, and the memory of its buckets."""

    def __init__(
        self, module: nn.Module, device_ids: Any = None, *_args: Any, gradient_as_bucket_view: bool = False,
        **_kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.module = module
        self.device_ids = device_ids
        self.require_backward_grad_sync = True
        sizes: dict[Any, int] = {}
        for weight in module.parameters():
            if weight.requires_grad and not gradient_as_bucket_view:
                key = weight.device, weight.dtype
                sizes[key] = sizes.get(key, 0) + weight.numel()
        self._buckets = [torch.empty(size, device=device, dtype=dtype) for (device, dtype), size in sizes.items()]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module, with its inputs on the card where DDP would move them."""
        if self.device_ids:
            args, kwargs = tree_map_only(Tensor, lambda one: one.to("cuda"), (args, kwargs))
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients without exchanging them."""
        was = self.require_backward_grad_sync
        self.require_backward_grad_sync = False
        try:
            yield
        finally:
            self.require_backward_grad_sync = was

    def join(self, *_args: Any, **_kwargs: Any) -> Any:
        """Uneven inputs are no matter of one process."""
        return contextlib.nullcontext()

    def register_comm_hook(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing is sent."""

    def _set_static_graph(self) -> None: ...


class World:
    """The state of `torch.distributed` while a ghost GPU is on."""

    def __init__(self) -> None:
        self.backend = ""
        self._group = object()

    def patch(self, patches: Patches) -> None:
        """Replace what would talk to other processes."""
        distributed = torch.distributed
        if not distributed.is_available():
            return
        values: dict[str, Any] = {
            "init_process_group": self._begin,
            "destroy_process_group": self._end,
            "is_initialized": lambda: bool(self.backend),
            "get_rank": lambda _group=None: self._checked(0),
            "get_world_size": lambda _group=None: self._checked(1),
            "get_node_local_rank": lambda _fallback=None: 0,
            "get_backend": lambda _group=None: self._checked(self.backend),
            "get_process_group_ranks": lambda _group=None: [0],
            "get_global_rank": lambda _group, _rank: 0,
            "get_group_rank": lambda _group, _rank: 0,
            "new_group": lambda *_a, **_k: self._group,
            "barrier": _nothing,
            "monitored_barrier": _nothing,
            "all_reduce": _nothing,
            "reduce": _nothing,
            "broadcast": _nothing,
            "broadcast_object_list": _nothing,
            "all_gather": lambda out, one, *_a, **k: _copied(out[0], one, k),
            "all_gather_into_tensor": lambda out, one, *_a, **k: _copied(out, one, k),
            "reduce_scatter": lambda out, ones, *_a, **k: _copied(out, ones[0], k),
            "reduce_scatter_tensor": lambda out, one, *_a, **k: _copied(out, one, k),
            "all_to_all": lambda out, ones, *_a, **k: _copied(out[0], ones[0], k),
            "all_to_all_single": lambda out, one, *_a, **k: _copied(out, one, k),
            "gather": lambda one, out=None, *_a, **k: _copied(out[0], one, k) if out else _nothing(**k),
            "scatter": lambda out, ones=None, *_a, **k: _copied(out, ones[0], k) if ones else _nothing(**k),
            "all_gather_object": lambda out, one, *_a, **_k: _set(out, one),
            "gather_object": lambda one, out=None, *_a, **_k: _set(out, one),
            "scatter_object_list": lambda out, ones, *_a, **_k: _set(out, ones[0]),
            "_get_default_group": _refusing(
                "a process group itself (FSDP, tensor or pipeline parallelism): a ghost GPU is one card in one "
                "process; plan the model without it, and let --world extrapolate"
            ),
        }
        for name in ("send", "recv", "isend", "irecv", "batch_isend_irecv"):
            values[name] = _refusing(
                f"torch.distributed.{name}: a ghost GPU is one process and has no other to talk to"
            )
        for owner in (distributed, distributed.distributed_c10d):
            for name, value in values.items():
                if hasattr(owner, name):
                    patches.replace(owner, name, value)
        for owner in (torch.nn.parallel, torch.nn.parallel.distributed):
            patches.replace(owner, "DistributedDataParallel", GhostDataParallel)
        patches.replace(torch.nn.DataParallel, "scatter", _scattered)
        for name in ("spawn", "start_processes"):
            patches.replace(torch.multiprocessing, name, _spawn)

    def _begin(self, backend: str | None = None, *_args: Any, world_size: int = -1, **_kwargs: Any) -> None:
        size = world_size if world_size > 0 else int(os.environ.get("WORLD_SIZE", "1"))
        if size != 1:
            raise GhostError(
                f"{here()}torch.distributed with {size} processes: a ghost GPU is one card in one process; run it with "
                f"WORLD_SIZE=1, and let mezzotint plan --world {size} extrapolate"
            )
        self.backend = backend or "nccl"

    def _end(self, _group: Any = None) -> None:
        self.backend = ""

    def _checked(self, value: Any) -> Any:
        if not self.backend:
            raise ValueError(
                "Default process group has not been initialized, please make sure to call init_process_group."
            )
        return value


def _scattered(_self: Any, inputs: Any, kwargs: Any, _device_ids: Any) -> Any:
    """What `DataParallel` does with its inputs, on one card."""
    return tree_map_only(Tensor, lambda one: one.to("cuda"), ((inputs,), (kwargs,)))


def _nothing(*_args: Any, async_op: bool = False, **_kwargs: Any) -> _Done | None:
    return _Done() if async_op else None


def _copied(out: Tensor, one: Tensor, kwargs: Any) -> _Done | None:
    with torch.no_grad():
        out.copy_(one.view_as(out))
    return _Done() if kwargs.get("async_op") else None


def _set(out: list[Any] | None, one: Any) -> None:
    if out:
        out[0] = one


def _spawn(function: Callable[..., Any], args: Any = (), nprocs: int = 1, *_rest: Any, **_kwargs: Any) -> None:
    """Run the function of a single process here."""
    if nprocs != 1:
        raise GhostError(
            f"{here()}torch.multiprocessing starts {nprocs} processes: a ghost GPU is one card in one process"
        )
    function(0, *args)


def _refusing(message: str) -> Any:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise GhostError(f"{here()}{message}")

    return refuse
