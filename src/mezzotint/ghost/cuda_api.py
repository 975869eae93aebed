"""`torch.cuda` and `torch.accelerator` as a program finds them on a machine with the ghost's card."""

import contextlib
from functools import partial, wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from mezzotint.errors import GhostError
from mezzotint.ghost.checkpoints import Checkpoints
from mezzotint.ghost.flex import patch_flex
from mezzotint.ghost.processes import World
from mezzotint.ghost.tensor_types import patch_types
from mezzotint.ghost.values import here
from mezzotint.patches import Patches
from mezzotint.torch_internals.fake import FakeTensor
from mezzotint.torch_internals.trees import tree_leaves

if TYPE_CHECKING:
    from mezzotint.ghost.session import ghost_gpu

_DEVICE = torch.device("cuda", 0)
_CONTEXT_BYTES = 512 << 20  # what the driver's context takes of the card; 0.3 to 0.6 GiB by card and driver
_NATIVE_BFLOAT16 = (8, 0)


class GhostEvent:
    """A CUDA event; all of them are over at once, and a millisecond lies between any two."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.cuda_event = 0

    def record(self, _stream: Any = None) -> None:
        """Do nothing."""

    def wait(self, _stream: Any = None) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Everything is done."""
        return True

    def elapsed_time(self, _end: Any) -> float:
        """Return a placeholder in milliseconds; what a step takes is planned, not measured."""
        return 1.0


class GhostStream:
    """A CUDA stream; the ghost has one order of operations."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.device = _DEVICE
        self.cuda_stream = self.stream_id = self.device_index = self.priority = 0
        self.device_type = 1

    def __enter__(self) -> "GhostStream":
        return self

    def __exit__(self, *_error: Any) -> None: ...

    def wait_stream(self, _stream: Any) -> None:
        """Do nothing."""

    def wait_event(self, _event: Any) -> None:
        """Do nothing."""

    def record_event(self, event: Any = None) -> Any:
        """Return the event, over already."""
        return event or GhostEvent()

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Everything is done."""
        return True

    def is_capturing(self) -> bool:
        """No graph is captured."""
        return False


class CapturedGraph:
    """CUDA graphs, which are refused when one is made; a class, as annotations name it."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        raise GhostError(f"{here()}torch.cuda.CUDAGraph: a ghost GPU captures no graphs; run the step without them")


def patch_cuda(patches: Patches, gpu: "ghost_gpu") -> None:
    """Replace what would ask the driver."""
    spec, allocator = gpu.spec, gpu.allocator
    capability = spec.compute_capability or (8, 0)
    total = spec.memory_bytes or 80 << 30
    has_bfloat16 = capability >= _NATIVE_BFLOAT16
    properties = SimpleNamespace(
        name=f"NVIDIA {spec.name}",
        major=capability[0],
        minor=capability[1],
        total_memory=total,
        multi_processor_count=spec.num_multiprocessors or 108,
        L2_cache_size=spec.l2_bytes or 40 << 20,
        warp_size=32,
        max_threads_per_multi_processor=2048 if capability in ((7, 0), (8, 0), (9, 0), (10, 0)) else 1536,
        max_threads_per_block=1024,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448 if capability >= (9, 0) else 166912,
        shared_memory_per_multiprocessor=233472 if capability >= (9, 0) else 167936,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName=f"sm_{capability[0]}{capability[1]}",
        uuid="ghost",
    )
    stream = GhostStream()

    def answer(value: Any) -> Any:
        return lambda *_args, **_kwargs: value

    def stats(*_args: Any, **_kwargs: Any) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": allocator.allocated,
            "allocated_bytes.all.peak": allocator.peak_allocated,
            "reserved_bytes.all.current": allocator.reserved,
            "reserved_bytes.all.peak": allocator.peak_reserved,
            "active_bytes.all.current": allocator.allocated,
            "active_bytes.all.peak": allocator.peak_allocated,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    def mem_info(*_args: Any, **_kwargs: Any) -> tuple[int, int]:
        return max(0, total - _CONTEXT_BYTES - allocator.reserved), total

    def reset(*_args: Any, **_kwargs: Any) -> None:
        allocator.reset_peaks()

    def summary(*_args: Any, **_kwargs: Any) -> str:
        return (
            f"ghost {spec.name}: {allocator.allocated} bytes allocated (peak {allocator.peak_allocated}), "
            f"{allocator.reserved} reserved (peak {allocator.peak_reserved})"
        )

    cpu_state = torch.get_rng_state

    values: dict[str, Any] = {
        "is_available": answer(True),
        "is_initialized": answer(True),
        "init": answer(None),
        "_lazy_init": answer(None),
        "_lazy_call": lambda function, **_k: None,
        "device_count": answer(1),
        "_device_count_nvml": answer(1),
        "current_device": answer(0),
        "set_device": answer(None),
        "_exchange_device": answer(0),
        "_maybe_exchange_device": answer(0),
        "get_device_name": answer(properties.name),
        "get_device_capability": answer(capability),
        "get_device_properties": answer(properties),
        "_get_device_properties": answer(properties),
        "get_arch_list": answer([f"sm_{capability[0]}{capability[1]}"]),
        "can_device_access_peer": answer(False),
        "is_bf16_supported": lambda including_emulation=True: has_bfloat16 or bool(including_emulation),
        "is_tf32_supported": answer(has_bfloat16),
        "synchronize": answer(None),
        "empty_cache": allocator.empty_cache,
        "ipc_collect": answer(None),
        "memory_allocated": lambda *_a, **_k: allocator.allocated,
        "max_memory_allocated": lambda *_a, **_k: allocator.peak_allocated,
        "memory_reserved": lambda *_a, **_k: allocator.reserved,
        "max_memory_reserved": lambda *_a, **_k: allocator.peak_reserved,
        "memory_cached": lambda *_a, **_k: allocator.reserved,
        "max_memory_cached": lambda *_a, **_k: allocator.peak_reserved,
        "memory_stats": stats,
        "memory_stats_as_nested_dict": stats,
        "memory_summary": summary,
        "mem_get_info": mem_info,
        "reset_peak_memory_stats": reset,
        "reset_max_memory_allocated": reset,
        "reset_max_memory_cached": reset,
        "reset_accumulated_memory_stats": answer(None),
        "set_per_process_memory_fraction": answer(None),
        "utilization": answer(100),
        "Event": GhostEvent,
        "Stream": GhostStream,
        "ExternalStream": GhostStream,
        "current_stream": answer(stream),
        "default_stream": answer(stream),
        "set_stream": answer(None),
        "stream": lambda *_a, **_k: contextlib.nullcontext(),
        "manual_seed": answer(None),
        "manual_seed_all": answer(None),
        "seed": answer(None),
        "seed_all": answer(None),
        "initial_seed": answer(0),
        "get_rng_state": lambda *_a, **_k: cpu_state(),
        "set_rng_state": answer(None),
        "get_rng_state_all": lambda: [cpu_state()],
        "set_rng_state_all": answer(None),
        "is_current_stream_capturing": answer(False),
        "current_blas_handle": answer(0),
        "CUDAGraph": CapturedGraph,
        "graph": CapturedGraph,
        "make_graphed_callables": _refusing("make_graphed_callables: a ghost GPU captures no graphs"),
    }
    for name, value in values.items():
        if hasattr(torch.cuda, name):
            patches.replace(torch.cuda, name, value)
    for module in (torch.cuda.memory, torch.cuda.random, torch.cuda.streams):
        for name, value in values.items():
            if name in vars(module):
                patches.replace(module, name, value)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        patches.replace(torch.cuda.nvtx, name, answer(0))
    patches.replace(torch.cuda.nvtx, "range", lambda *_a, **_k: contextlib.nullcontext())
    accelerator = {
        "is_available": answer(True),
        "device_count": answer(1),
        "current_accelerator": answer(torch.device("cuda")),
        "current_device_index": answer(0),
        "current_device_idx": answer(0),
        "set_device_index": answer(None),
        "set_device_idx": answer(None),
        "current_stream": answer(stream),
        "set_stream": answer(None),
        "synchronize": answer(None),
        "empty_cache": allocator.empty_cache,
        **{name: values[name] for name in ("memory_allocated", "max_memory_allocated", "memory_reserved",
           "max_memory_reserved", "memory_stats", "reset_peak_memory_stats", "reset_accumulated_memory_stats")},
        "get_memory_info": mem_info,
    }  # fmt: skip
    for name, value in accelerator.items():
        if hasattr(torch.accelerator, name):
            patches.replace(torch.accelerator, name, value)
    _patch_rest(patches, gpu)


def _refusing(message: str) -> Any:
    def refuse(*_args: Any, **_kwargs: Any) -> Any:
        raise GhostError(f"{here()}{message}")

    return refuse


def _patch_rest(patches: Patches, gpu: "ghost_gpu") -> None:
    """Compilation, generators, pinned memory, workers, and what cannot be done."""
    patches.replace(torch.backends.cudnn, "is_available", lambda: True)
    patches.replace(torch.backends.cudnn, "version", lambda: 91002)
    # recurrent layers ask whether to lay their weights out in one block: the memory is the same either way
    patches.replace(torch.backends.cudnn, "is_acceptable", lambda _tensor: False)
    Checkpoints(gpu.notes).patch(patches)
    World().patch(patches)
    patch_types(patches)
    make_generator = torch.Generator

    class Generator(make_generator):  # type: ignore[misc,valid-type]
        """A generator on the ghost's card is one on the CPU."""

        def __new__(cls, device: Any = "cpu") -> Any:
            return make_generator("cpu" if torch.device(device).type == "cuda" else device)

    patches.replace(torch, "Generator", Generator)

    def as_python(made: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        note = "torch.jit.script and trace are run as the Python that they were made from"
        if note not in gpu.notes:
            gpu.notes.append(note)
        return made

    patches.replace(torch, "compile", gpu.regions.compile)
    for name in ("script", "trace", "trace_module", "freeze", "optimize_for_inference"):
        patches.replace(torch.jit, name, as_python)
    patches.replace(torch.nn.Module, "compile", lambda self, *_a, **_k: gpu.regions.compile(self) and None)
    patches.replace(torch.Tensor, "pin_memory", lambda self, *_a, **_k: self)
    patches.replace(torch.Tensor, "is_pinned", lambda _self, *_a, **_k: False)
    patches.replace(torch.Tensor, "record_stream", lambda _self, *_a, **_k: None)

    def loader(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        workers = kwargs.get("num_workers", args[5] if len(args) > 5 else 0)
        if workers:
            note = "data is loaded in this process: workers would not see the ghost GPU"
            if note not in gpu.notes:
                gpu.notes.append(note)
            args = (*args[:5], 0, *args[6:]) if len(args) > 5 else args
            for name in ("prefetch_factor", "persistent_workers", "multiprocessing_context", "worker_init_fn"):
                kwargs.pop(name, None)
            kwargs["num_workers"] = 0
            if len(args) > 5:
                del kwargs["num_workers"]
        kwargs["pin_memory"] = False
        original(self, *args, **kwargs)

    patches.wrap(torch.utils.data.DataLoader, "__init__", loader)
    patch_flex(patches, gpu)
    for name in ("grad", "vmap", "jacrev", "jacfwd", "hessian", "vjp", "jvp", "grad_and_value", "linearize"):
        for owner in (torch.func, torch):
            if callable(getattr(owner, name, None)):
                patches.wrap(owner, name, partial(_transform, name))


def _transform(name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Do what a transform of `torch.func` does on real tensors, and refuse it for ghosts."""
    _refuse_ghosts(name, args, kwargs)
    made = original(*args, **kwargs)
    if not callable(made):
        return made

    @wraps(made)
    def transformed(*inner: Any, **named: Any) -> Any:
        _refuse_ghosts(name, inner, named)
        return made(*inner, **named)

    return transformed


def _refuse_ghosts(name: str, args: Any, kwargs: Any) -> None:
    if any(isinstance(one, FakeTensor) for one in tree_leaves((args, kwargs))):
        raise GhostError(
            f"{here()}torch.func.{name}: a ghost GPU cannot follow the transforms of torch.func, whose wrappers keep a "
            "device of their own; use torch.autograd.grad, or run this part on the CPU"
        )
