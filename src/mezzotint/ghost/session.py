"""`mz.ghost_gpu`: a simulated GPU for the time of a `with` block.

with mz.ghost_gpu("H100") as gpu:
    train()                       # unmodified: .cuda(), autocast, GradScaler, backward, optimizers
print(gpu.peak_allocated, gpu.assumed)
"""

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from mezzotint.errors import GhostError, echoed
from mezzotint.ghost.access import Access
from mezzotint.ghost.addresses import Addresses
from mezzotint.ghost.allocator import MIB, CachingAllocator
from mezzotint.ghost.compiled import CompiledRegions
from mezzotint.ghost.cuda_api import patch_cuda
from mezzotint.ghost.faces import Face, Faces
from mezzotint.ghost.guard import install_guard
from mezzotint.ghost.kernels import Overrides
from mezzotint.ghost.mode import FaceMode, GhostFakeMode, GhostMode
from mezzotint.ghost.modules import MovedParameters
from mezzotint.ghost.owners import Owners
from mezzotint.ghost.storages import MemoryEvent, Storages
from mezzotint.ghost.twins import twin_of
from mezzotint.ghost.values import Values
from mezzotint.hardware.devices import DeviceSpec
from mezzotint.hardware.gpus import find_gpu
from mezzotint.patches import Patches
from mezzotint.torch_internals import fake, flags
from mezzotint.torch_internals.autograd import wrap_backward, wrap_backward_of_checkpoints
from mezzotint.torch_internals.dispatch import disable_torch_dispatch, disable_torch_function
from mezzotint.torch_internals.fake import FakeTensor
from mezzotint.torch_internals.registry import Feature, require
from mezzotint.torch_internals.registry import notes as missing_notes
from mezzotint.torch_internals.tensors import replace_apply

_active: list["ghost_gpu"] = []


def workspace_bytes(spec: DeviceSpec) -> int:
    """Return what cuBLAS takes at the first product: 32 MiB on Hopper and later, else 8.125 (torch's default)."""
    return 32 * MIB if (spec.compute_capability or (0, 0)) >= (9, 0) else 8 * MIB + MIB // 8


_FAKE_LOG = logging.getLogger(fake.LOGGER)


class ghost_gpu:  # noqa: N801  used as a verb: with mz.ghost_gpu("H100"):
    """Make one simulated GPU of the kind named by `gpu` the machine's only CUDA device.

    `gpu` is a name from the table of cards ("H100", "A100-40GB", "RTX 4090") or a DeviceSpec. Inside, tensors on
    `cuda` have shape, dtype and strides but no data; what the program asks of their numbers is answered by a
    placeholder and counted in `assumed`. Nothing is left behind. One object can be entered several times, one after
    the other: each time starts with empty memory. Raises GhostError inside another one, outside the main thread, or
    where this torch cannot be stood in for; PlanError for an unknown card.
    """

    def __init__(self, gpu: str | DeviceSpec = "H100") -> None:
        if not isinstance(gpu, str | DeviceSpec):
            raise GhostError(f"gpu={echoed(gpu)} is no name of a GPU; pass one such as 'H100', or a DeviceSpec")
        self.spec = gpu if isinstance(gpu, DeviceSpec) else find_gpu(gpu)
        if self.spec.compute_capability is None:
            raise GhostError(
                f"{self.spec.name} is no CUDA GPU, whose autocast the simulated GPU follows; pass one such as 'H100'"
            )
        self._reset()

    def _reset(self) -> None:
        """Make the state of one `with` block: memory, assumptions and notes of an earlier one do not count."""
        self.values = Values()
        self.storages = Storages()
        self.owners = Owners(self.storages)
        self.causal: set[int] = set()
        self.waits: set[int] = set()
        self.transfers: set[int] = set()
        self.on_host: set[int] = set()
        self.channels_last: set[int] = set()
        self.access: dict[int, Access] = {}
        self.turned: dict[int, int] = {}
        self.allocator = CachingAllocator()
        self.out_of_memory: str | None = None
        self.regions = CompiledRegions()
        self.notes: list[str] = []
        self.on_exit: list[Callable[[], None]] = []
        self._face = Face()
        self._faces = Faces(self._face)
        self._fake = GhostFakeMode()
        self._patches = Patches()
        self._moved = MovedParameters()
        self._function_mode: FaceMode | None = None
        self._stack = ExitStack()

    @property
    def assumed(self) -> dict[tuple[str, int, str], int]:
        """How often a number was asked for that only a real run has: (file, line, what) to count."""
        return dict(self.values.assumed)

    @property
    def peak_allocated(self) -> int:
        """The most bytes that were allocated at once."""
        return self.allocator.peak_allocated

    def __enter__(self) -> "ghost_gpu":
        """Switch it on."""
        if _active:
            raise GhostError("a ghost GPU is on already; leave it before the next")
        if threading.current_thread() is not threading.main_thread():
            raise GhostError("a ghost GPU works in the main thread only; enter it there")
        self._reset()
        if torch.cuda.is_available():
            self.notes.append("this machine has a GPU, which the ghost hides and leaves alone")
        self._check_torch()
        stack = self._stack
        try:
            _active.append(self)
            stack.callback(_active.remove, self)
            stack.callback(torch.set_rng_state, torch.get_rng_state())
            stack.callback(_restore_flags(), None)
            stack.callback(_FAKE_LOG.setLevel, _FAKE_LOG.level)
            _FAKE_LOG.setLevel(logging.CRITICAL)  # it prints a traceback of its own before it raises
            self.storages.on_event = self._on_memory
            stack.callback(self._moved.restore)
            stack.callback(self._patches.undo)
            stack.callback(self.regions.remove)
            self.regions.install()
            self._patch()
            stack.callback(self._faces.remove)
            self._faces.install()
            stack.callback(self.owners.remove)
            self.owners.install()
            overrides = Overrides(self.spec)
            stack.callback(overrides.remove)
            overrides.install()
            self._fake.__enter__()
            stack.push(self._fake.__exit__)
            mode = GhostMode(self._face, self._faces, self._fake, self.values, self.storages, self.regions)
            mode.on_causal = lambda: self.causal.add(self.storages.clock())
            mode.on_wait = lambda: self.waits.add(self.storages.clock())
            mode.on_host = lambda: self.on_host.add(self.storages.clock())
            mode.on_card = lambda: self.on_host.discard(self.storages.clock())
            mode.on_transfer = lambda: self.transfers.add(self.storages.clock())
            mode.on_channels_last = lambda: self.channels_last.add(self.storages.clock())
            mode.on_access = lambda access: self.access.update({self.storages.clock(): access})
            mode.on_turned = lambda count: self.turned.update({self.storages.clock(): count})
            mode.workspace_bytes = workspace_bytes(self.spec)
            mode.__enter__()  # type: ignore[no-untyped-call]
            stack.push(mode.__exit__)
            self._function_mode = FaceMode(self._face)
            self._function_mode.__enter__()  # type: ignore[no-untyped-call]
            stack.push(self._function_mode.__exit__)
        except BaseException:
            stack.close()
            raise
        return self

    def _check_torch(self) -> None:
        """Raise GhostError where this torch cannot be stood in for; note what it lacks otherwise."""
        require(Feature.GHOST, GhostError)
        self.notes.extend(missing_notes(Feature.GHOST))
        install_guard()

    def __exit__(self, *error: Any) -> None:
        """Switch it off, whatever happened."""
        self._stack.__exit__(*error)

    def _on_memory(self, event: MemoryEvent) -> None:
        if event.nbytes > 0:
            self.allocator.allocate(event.storage, event.nbytes)
        else:
            self.allocator.release(event.storage)

    def _patch(self) -> None:
        patches, face = self._patches, self._face

        def run_backward(original: Any, *args: Any, **kwargs: Any) -> Any:
            was_meta = face.is_meta
            face.is_meta = True
            try:
                # `Tensor.backward` comes through the function mode with the mode popped, and hooks must see it
                with FaceMode(face):
                    return original(*args, **kwargs)
            finally:
                face.is_meta = was_meta

        wrap_backward_of_checkpoints(patches, run_backward)
        wrap_backward(patches, run_backward)
        # builds with CUDA would start the driver before the first fake tensor
        fake.leave_drivers_alone(patches)
        _patch_function_apply(patches, face)
        _patch_fake_tensor(patches, self.values)
        replace_apply(patches, lambda module, fn, recurse=True: self._moved.apply(module, fn, recurse))
        Addresses(self.values).patch(patches)
        patch_cuda(patches, self)


def _patch_function_apply(patches: Patches, face: Face) -> None:
    """Build nodes of custom functions, which go around the dispatcher, with the face set to meta."""
    owner = next(c for c in torch.autograd.Function.__mro__ if "apply" in vars(c))
    original = vars(owner)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        was_meta = face.is_meta
        face.is_meta = True
        try:
            return original.__get__(None, cls)(*args, **kwargs)
        finally:
            face.is_meta = was_meta

    patches.replace(owner, "apply", classmethod(apply))


def _is_on(kind: str, tensor: FakeTensor) -> bool:
    return tensor.fake_device.type == kind


def _patch_fake_tensor(patches: Patches, values: Values) -> None:
    """Answer what C++ getters would answer for the tensor without data behind a ghost."""
    import numpy

    # optimizers and clipping take lists of tensors at once only for types that they know
    fake.take_many_at_once(patches)
    kinds = ("cuda", "cpu", "meta", "xpu", "mps")
    for kind in kinds:
        patches.replace(FakeTensor, f"is_{kind}", property(partial(_is_on, kind)))
    patches.replace(FakeTensor, "get_device", lambda self: 0 if self.fake_device.type == "cuda" else -1)

    def to_numpy(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        real = twin_of(self)
        if real is not None:
            with disable_torch_dispatch(), disable_torch_function():
                return real.numpy().copy()
        values.note("numpy")
        kind = str(self.dtype).removeprefix("torch.")
        return numpy.zeros(
            tuple(self.shape), dtype=bool if kind == "bool" else kind if kind != "bfloat16" else "float32"
        )

    def to_list(self: Any) -> Any:
        if not self.dim():
            return self.item()
        return to_numpy(self).tolist()

    def to_text(self: Any, spec: str) -> str:
        return repr(self) if self.dim() else format(self.item(), spec)

    def deep_copy(self: Any, memo: Any) -> Any:
        """Copy without asking where the data is, as `Tensor.__deepcopy__` does."""
        if id(self) in memo:
            return memo[id(self)]
        with torch.no_grad():
            new = self.detach().clone(memory_format=torch.preserve_format)
        is_parameter = isinstance(self, torch.nn.Parameter)
        new = torch.nn.Parameter(new, self.requires_grad) if is_parameter else new.requires_grad_(self.requires_grad)
        memo[id(self)] = new
        if self.is_leaf and self.grad is not None:
            new.grad = deep_copy(self.grad, memo)
        return new

    def to_dlpack(self: Any, *_args: Any, **_kwargs: Any) -> Any:
        return _zeros_of(self, values).__dlpack__()

    def reduce(self: Any, protocol: Any) -> Any:
        zeros: Any = _zeros_of(self, values)
        return zeros.__reduce_ex__(protocol)

    def share(self: Any) -> Any:
        values.note("shared memory of a tensor")
        return self

    patches.replace(FakeTensor, "__dlpack__", to_dlpack)
    patches.replace(FakeTensor, "__reduce_ex__", reduce)
    patches.replace(FakeTensor, "share_memory_", share)
    patches.replace(FakeTensor, "__deepcopy__", deep_copy)
    patches.replace(FakeTensor, "numpy", to_numpy)
    patches.replace(FakeTensor, "__array__", to_numpy)
    patches.replace(FakeTensor, "tolist", to_list)
    patches.replace(FakeTensor, "__format__", to_text)
    patches.replace(FakeTensor, "pin_memory", lambda self, *_a, **_k: self)


def _zeros_of(tensor: FakeTensor, values: Values) -> torch.Tensor:
    """Return a real tensor of zeros on the CPU, or the numbers of a tensor where they are known."""
    real = twin_of(tensor)
    with disable_torch_dispatch(), disable_torch_function():
        if real is not None:
            return real.clone()
        values.note("the bytes of a tensor, taken for zeros")
        return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype, device="cpu", requires_grad=False)


def _restore_flags() -> Callable[[Any], None]:
    """Return what sets torch's global switches back to what they are now: programs set them and leave them."""
    cuda: Any = torch.backends.cuda
    matmul, cudnn = flags.allows_tf32_matmul(), flags.allows_tf32_convolution()
    benchmark, deterministic = flags.is_cudnn_benchmark(), flags.is_cudnn_deterministic()
    precision = torch.get_float32_matmul_precision()
    dtype, device, has_grad = torch.get_default_dtype(), fake.default_device(), torch.is_grad_enabled()
    anomaly, checks_nan = torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    attention = [
        (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled()),
        (cuda.enable_math_sdp, cuda.math_sdp_enabled()),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
    ]
    cudnn_enabled, benchmark_limit = torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark_limit
    reduced = cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction
    is_cached = torch.is_autocast_cache_enabled()
    autocast = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cuda", "cpu")]

    def restore(_: Any) -> None:
        torch.set_float32_matmul_precision(precision)
        flags.allow_tf32_matmul(matmul)
        flags.allow_tf32_convolution(cudnn)
        flags.set_cudnn_benchmark(benchmark)
        flags.set_cudnn_deterministic(deterministic)
        torch.set_default_dtype(dtype)
        if device != fake.default_device():
            torch.set_default_device(device)
        torch.set_grad_enabled(has_grad)
        torch.autograd.set_detect_anomaly(anomaly, checks_nan)
        torch.use_deterministic_algorithms(is_deterministic, warn_only=warns)
        for enable, is_enabled in attention:
            enable(is_enabled)
        torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark_limit = cudnn_enabled, benchmark_limit
        cuda.matmul.allow_fp16_reduced_precision_reduction, cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
        torch.set_autocast_cache_enabled(is_cached)
        for kind, is_enabled, low in autocast:
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, low)

    return restore
