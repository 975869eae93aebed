"""The modes that every torch call of a program on the ghost GPU goes through.

The function mode sees Python's calls and turns the face to CUDA. The dispatch mode, below autocast and autograd,
answers C++'s questions about devices and numbers, keeps CPU tensors real, and gives everything else to PyTorch's fake
kernels. CPU tensors stay real because batches are indexed and shapes computed with them; only large floating-point ones
made on the CPU become fake, so that a model of any size costs nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mezzotint.errors import GhostError
from mezzotint.ghost.access import NONE, Access, access_of, num_turned
from mezzotint.ghost.compiled import CompiledRegions
from mezzotint.ghost.faces import Face, Faces
from mezzotint.ghost.kernels import KERNELS
from mezzotint.ghost.refusals import refuse
from mezzotint.ghost.storages import Storages
from mezzotint.ghost.tensor_types import with_devices
from mezzotint.ghost.twins import follow, remember, results_of, twin_of
from mezzotint.ghost.values import Values, here
from mezzotint.torch_internals import dispatch
from mezzotint.torch_internals.dispatch import TorchDispatchMode, disable_torch_dispatch, disable_torch_function
from mezzotint.torch_internals.fake import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from mezzotint.torch_internals.operators import aten
from mezzotint.torch_internals.trees import tree_leaves, tree_map

MAX_REAL = 4096
"""Floating-point CPU tensors with more elements than this are made fake."""

MAX_TRIED = 1 << 22
"""Operations without a fake kernel are tried on the CPU up to so many elements."""

_META = torch.device("meta")
_CPU = torch.device("cpu")
_GHOST = torch.device("cuda", 0)
_CONVOLUTIONS = {"convolution": 0, "convolution_backward": 1}  # and where the input is, before the weight
_PRODUCTS = frozenset({"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_grouped_mm"})
_COPIES = frozenset({"_to_copy", "copy_"})
CAUSAL = {
    "_scaled_dot_product_flash_attention": 4,
    "_scaled_dot_product_flash_attention_backward": 11,
    "_scaled_dot_product_efficient_attention": 6,
    "_scaled_dot_product_efficient_attention_backward": 11,
    "_scaled_dot_product_cudnn_attention": 6,
    "_scaled_dot_product_cudnn_attention_backward": 14,
}
"""Where the attention operations say whether their mask is causal."""
_AUTOGRAD = dispatch.DispatchKey.AutogradFunctionality
_DEVICE = torch.ops.prim.device.default
_ITEMS = (aten._local_scalar_dense.default, torch.ops.aten.item.default)
_EQUAL = (torch.ops.aten.equal.default, torch.ops.aten.allclose.default)
_PACK = aten._pack_padded_sequence.default
_NO_ANSWER = object()
_UNIQUE = frozenset({"_unique2", "_unique", "unique_consecutive"})


class GhostFakeMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """PyTorch's fake kernels, never a real one of CUDA's, whatever `torch.cuda.is_available` says."""

    avoid_device_init = True

    def __init__(self) -> None:
        super().__init__(allow_fallback_kernels=False, allow_non_fake_inputs=True)


class FaceMode(TorchFunctionMode):
    """Turns the face to CUDA for every call from Python, also from hooks inside the engine."""

    def __init__(self, face: Face) -> None:
        super().__init__()
        self._face = face

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call with the face set to CUDA, unless another dispatch mode passes on what C++ called."""
        if func is _DEVICE or (type(func) is dispatch.OpOverload and dispatch.is_key_excluded(_AUTOGRAD)):
            return func(*args, **(kwargs or {}))
        args, kwargs = with_devices(func, args, kwargs)
        face = self._face
        was_meta = face.is_meta
        face.is_meta = False
        try:
            return func(*args, **(kwargs or {}))
        finally:
            face.is_meta = was_meta


class GhostMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operations on fake tensors or for real, and notes memory and assumptions."""

    def __init__(
        self,
        face: Face,
        faces: Faces,
        fake: GhostFakeMode,
        values: Values,
        storages: Storages,
        regions: CompiledRegions,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._face = face
        self._faces = faces
        self._fake = fake
        self._values = values
        self._storages = storages
        self._names: dict[Any, tuple[str, frozenset[int | str]]] = {}
        self.on_causal: Callable[[], object] = int
        self.on_wait: Callable[[], object] = int
        self.on_host: Callable[[], object] = int
        self.on_card: Callable[[], object] = int
        self.on_transfer: Callable[[], object] = int
        self.on_channels_last: Callable[[], object] = int
        self.on_access: Callable[[Access], object] = tuple
        self.on_turned: Callable[[int], object] = int
        self.workspace_bytes = 0
        self.regions = regions

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Save the wrapper that would keep dynamo out: nothing is compiled on a ghost."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation."""
        face = self._face
        if func is _DEVICE:
            tensor = args[0]
            if isinstance(tensor, FakeTensor):
                return _META if face.is_meta or self._fake.in_kernel_invocation else tensor.fake_device
            return tensor.device
        was_meta = face.is_meta
        face.is_meta = False
        try:
            with dispatch.exclude_keys(self._faces.excluded):
                return self._run(func, args, kwargs or {}, was_meta)
        finally:
            face.is_meta = was_meta

    def _run(self, func: Any, args: Any, kwargs: Any, was_meta: bool) -> Any:
        ghosts, reals = _split(args, kwargs)
        device = kwargs.get("device")
        if device is not None:
            if was_meta and device.type == "meta":
                # a composite inside autograd's kernel made it from a tensor whose face is meta
                device = _GHOST
                kwargs = {**kwargs, "device": device}
            elif device.type == "cuda" and device.index:
                raise GhostError(f"{here()}cuda:{device.index}: a ghost GPU is one card, cuda:0; put everything there")
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        name, writes = self._traits(func)
        if not ghosts and (device is None or device.type != "cuda"):
            is_on_cpu = device is None or device.type == "cpu"
            if reals or not is_on_cpu or not _is_large(name, args, kwargs):
                self.on_host()
                with disable_torch_dispatch():
                    return func(*args, **kwargs)
        self.on_card()  # operations that nobody counts may have been taken for this one
        answer = self._answer(func, name, args, kwargs, writes)
        if answer is not _NO_ANSWER:
            return answer
        given = args, kwargs
        if reals:
            args, kwargs = _map(args, self._as_fake), {key: self._as_fake_any(v) for key, v in kwargs.items()}
        if any(isinstance(one, FakeTensor) and one.fake_device.type == "cuda" for one in args):
            refuse(name, args)
        self._note(name, args, kwargs)
        if name in _COPIES and _crosses(name, args, device):
            self.on_transfer()
        out = self._imitate(func, name, args, kwargs, given)
        self._values.follow(name, args, out)
        follow(func, name, *given, out, writes)
        self._see(out)
        self._note_access(func, name, args, out)
        self.regions.see(is_view=func.is_view)
        if isinstance(out, FakeTensor) and out.fake_device.type == "cpu" and name not in _COPIES:
            self.on_host()
        return out

    def _answer(self, func: Any, name: str, args: Any, kwargs: Any, writes: frozenset[int | str]) -> Any:
        """Return what is known, or has to be said, of the numbers of ghosts; `_NO_ANSWER` for all other operations."""
        if func in _ITEMS:
            if _device_of(args[0]).type == "cuda":
                self.on_wait()
            return self._values.item(args[0])
        if func in _EQUAL:
            found = results_of(func, name, args, kwargs)
            if found is None:
                self._values.note(f"torch.{name}, taken for unequal")
            return bool(found)
        if func is _PACK:
            return self._pack(*args, **kwargs)
        if 0 in writes and args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
            if results_of(func, name, args, kwargs) is None:
                self._values.note("copy to a CPU tensor")  # a ghost has no numbers to copy: it keeps those it has
            return args[0]
        if name == "_to_copy" and kwargs.get("device") == _CPU:
            real = _known_copy(func, args, kwargs)
            if real is not None:
                self.on_transfer()
                return real
        return _NO_ANSWER

    def _imitate(self, func: Any, name: str, args: Any, kwargs: Any, given: tuple[Any, Any]) -> Any:
        """Run an operation on fake tensors; `given` are its arguments with real tensors still real."""
        kernel = KERNELS.get(func)
        try:
            with self._fake, disable_torch_function():
                return kernel(func, args, kwargs) if kernel is not None else func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            out = self._computed(func, name, *given)
            return self._guess(func, name, args, kwargs) if out is None else out
        except UnsupportedOperatorException:
            out = self._tried(func, args, kwargs)
            if out is None:
                raise GhostError(
                    f"{here()}{func} has no fake kernel, so a ghost GPU cannot run it; register one with "
                    "torch.library.register_fake, or replace the operation"
                ) from None
            return out

    def _note(self, name: str, args: Any, kwargs: Any) -> None:
        """Note what shapes do not tell: a library's workspace, and whether attention has a causal mask."""
        if name in _PRODUCTS and self.workspace_bytes:
            self._storages.add_workspace(self.workspace_bytes)
            self.workspace_bytes = 0
        if name in _CONVOLUTIONS and _is_channels_last(*args[_CONVOLUTIONS[name] : _CONVOLUTIONS[name] + 2]):
            self.on_channels_last()
        if name in CAUSAL and _is_causal(name, args, kwargs):
            self.on_causal()

    def _note_access(self, func: Any, name: str, args: Any, out: Any) -> None:
        """Note what strides add to the bytes that an operation moves; products have kernels for each order."""
        if name in _PRODUCTS:
            self.on_turned(num_turned(args))
        elif not func.is_view:
            access = access_of(args, out)
            if access != NONE:
                self.on_access(access)

    def _traits(self, func: Any) -> tuple[str, frozenset[int | str]]:
        """Return the name of an operation and which of its arguments it writes to."""
        found = self._names.get(func)
        if found is None:
            schema = dispatch.schema_of(func)
            if schema is None:
                found = (str(func), frozenset())
            else:
                writes = frozenset(
                    one.name if one.kwarg_only else place
                    for place, one in enumerate(schema.arguments)
                    if one.alias_info is not None and one.alias_info.is_write
                )
                found = (schema.name.partition("::")[2], writes)
            self._names[func] = found
        return found

    def _as_fake(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return self.make_fake(value, _CPU)
        return value

    def _as_fake_any(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return _map(value, self._as_fake)
        return self._as_fake(value)

    def make_fake(self, real: Tensor, device: torch.device) -> FakeTensor:
        """Return a fake tensor of the same shape, strides and dtype as a real one."""
        with disable_torch_dispatch(), disable_torch_function():
            if real.layout is not torch.strided:
                raise GhostError(f"a ghost GPU takes dense tensors; got one with layout {real.layout}")
            meta = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device="meta")
            return FakeTensor(self._fake, meta, device)

    def _see(self, out: Any) -> None:
        if isinstance(out, FakeTensor):
            if out.layout is not torch.strided:
                raise GhostError(
                    f"{here()}a tensor with layout {out.layout}, whose size depends on numbers: a ghost GPU takes "
                    "dense ones; leave out sparse=True where an embedding has it"
                )
            if out.fake_device.type == "cuda":
                self._storages.see(out)
        elif isinstance(out, (list, tuple)):
            for one in out:
                self._see(one)

    def _computed(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Return what an operation gives whose shape depends on numbers that are all known, else None."""
        reals = results_of(func, name, args, kwargs)
        if reals is None:
            return None
        device = next((_device_of(one) for one in args if isinstance(one, FakeTensor)), _GHOST)
        made = []
        for real in reals if isinstance(reals, (tuple, list)) else (reals,):
            made.append(self.make_fake(real, device))
            remember(made[-1], real)
        return tuple(made) if isinstance(reals, (tuple, list)) else made[0]

    def _tried(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Return what an operation without a fake kernel gives, learned from its CPU kernel on ones; None without."""
        total = sum(one.numel() for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))
        if total > MAX_TRIED:
            return None
        device = next((_device_of(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)), _GHOST)

        def stand_in(value: Any) -> Any:
            if isinstance(value, Tensor):
                return torch.ones(value.shape, dtype=value.dtype)
            return _CPU if isinstance(value, torch.device) else value

        try:
            with (
                disable_torch_dispatch(),
                disable_torch_function(),
                torch.random.fork_rng(devices=()),
            ):
                found = func(*tree_map(stand_in, args), **tree_map(stand_in, kwargs))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        if self._traits(func)[1]:
            return args[0]
        return tree_map(lambda one: self.make_fake(one, device) if isinstance(one, Tensor) else one, found)

    def _guess(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Give a tensor whose shape depends on data: masks are taken to be true, numbers to be different."""
        tensor = next(one for one in args if isinstance(one, Tensor))
        device = _device_of(tensor)
        count = tensor.numel()
        made: list[tuple[tuple[int, ...], torch.dtype]] = []
        what = f"every element of {name}"
        if name == "nonzero":
            made = [((count, tensor.dim()), torch.int64)]
        elif name == "masked_select":
            shape = torch.broadcast_shapes(tensor.shape, args[1].shape)  # type: ignore[no-untyped-call]
            num_true = _num_true(args[1]) if args[1].shape == shape else None
            made = [((shape.numel() if num_true is None else num_true,), tensor.dtype)]
            what = what if num_true is None else ""
        elif name == "index" and (found := _masked_shape(tensor, args[1])) is not None:
            made = [(found, tensor.dtype)]
            if _num_true(next(one for one in args[1] if one is not None)) is not None:
                what = ""
        elif name in _UNIQUE:
            made = [((count,), tensor.dtype), (tuple(tensor.shape), torch.int64), ((count,), torch.int64)]
            what = f"{name}: all elements differ"
        elif name == "unique_dim":
            size = tensor.shape[args[1]]
            made = [(tuple(tensor.shape), tensor.dtype), ((size,), torch.int64), ((size,), torch.int64)]
            what = f"{name}: all slices differ"
        elif name == "bincount" and (size := args[2] if len(args) > 2 else kwargs.get("minlength", 0)):
            weights = args[1] if len(args) > 1 else kwargs.get("weights")
            made = [((size,), torch.int64 if weights is None else torch.float64)]
            what = f"no number beyond the minlength of {name}"
        else:
            raise GhostError(
                f"{here()}{func} makes a shape that depends on the numbers in a tensor, and a ghost GPU has none; "
                "give it a fixed size (multiply by a mask instead of indexing with it), or run this part on the CPU"
            )
        if what:
            self._values.note(what)
        with self._fake:
            out = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in made]
        return out[0] if len(dispatch.schema_of(func).returns) == 1 else tuple(out)

    def _pack(self, x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
        """Pack sequences: the sizes of batches are numbers on the CPU, and cuDNN reads them there."""
        steps, batch = (x.shape[1], x.shape[0]) if batch_first else (x.shape[0], x.shape[1])
        known = twin_of(lengths)
        if known is None:
            self._values.note("full length of every sequence")
            known = torch.full((batch,), steps, dtype=torch.int64)
        with disable_torch_dispatch(), disable_torch_function():
            sizes = _PACK(torch.empty(steps, batch, 1), known.cpu(), False)[1]
            total = int(sizes.sum())
        with self._fake, disable_torch_function():
            out = torch.empty((total, *x.shape[2:]), dtype=x.dtype, device=_device_of(x))
        self._see(out)
        return out, sizes


def _crosses(name: str, args: Any, device: torch.device | None) -> bool:
    """Whether a copy goes between the host's memory and the card's."""
    source = args[1] if name == "copy_" and len(args) > 1 else args[0]
    target = _device_of(args[0]) if name == "copy_" else device
    return target is not None and isinstance(source, Tensor) and _device_of(source).type != target.type


def _is_channels_last(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution runs with the channels last: where its input or its weight is stored so."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = formats.get(x.dim())
    return memory_format is not None and any(
        not one.is_contiguous() and one.is_contiguous(memory_format=memory_format) for one in (x, weight)
    )


def _is_causal(name: str, args: Any, kwargs: Any) -> bool:
    place = CAUSAL[name]
    return bool(args[place] if len(args) > place else kwargs.get("is_causal"))


def _device_of(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _masked_shape(tensor: Tensor, indices: Any) -> tuple[int, ...] | None:
    """Return the shape of `tensor[mask]`, every element of an unknown mask true; None for mixed indices."""
    given = [(place, one) for place, one in enumerate(indices) if one is not None]
    if len(given) != 1 or given[0][1].dtype not in (torch.bool, torch.uint8):
        return None
    place, mask = given[0]
    num_true = _num_true(mask)
    count = mask.numel() if num_true is None else num_true
    return (*tensor.shape[:place], count, *tensor.shape[place + mask.dim() :])


def _known_copy(func: Any, args: Any, kwargs: Any) -> Tensor | None:
    """Return a real copy of a ghost whose numbers are known."""
    if not isinstance(args[0], FakeTensor) or args[0].is_floating_point() or twin_of(args[0]) is None:
        return None
    found: Tensor | None = results_of(func, "_to_copy", args, kwargs)
    return found


def _num_true(mask: Tensor) -> int | None:
    """Return how many elements of a mask are true, if they are known."""
    known = twin_of(mask)
    if known is None:
        return None
    with disable_torch_dispatch():
        return int(known.count_nonzero())


def _split(args: Any, kwargs: Any) -> tuple[bool, list[Tensor]]:
    """Return whether there is a ghost among the arguments, and the real tensors."""
    has_ghost = False
    reals: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            if isinstance(value, FakeTensor):
                has_ghost = True
            else:
                reals.append(value)
        elif isinstance(value, (list, tuple)):
            for one in value:
                if isinstance(one, Tensor):
                    if isinstance(one, FakeTensor):
                        has_ghost = True
                    else:
                        reals.append(one)
    return has_ghost, reals


def _map(values: Any, change: Any) -> Any:
    return tuple(
        [change(one) for one in value] if isinstance(value, (list, tuple)) else change(value) for value in values
    )


_FACTORIES = frozenset({"empty", "zeros", "ones", "full", "randn", "rand", "empty_strided", "normal", "eye"})


def _is_large(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a factory makes a large floating-point tensor."""
    if name not in _FACTORIES or not args:
        return False
    size = args[0]
    if not isinstance(size, (list, tuple, torch.Size)):
        return False
    count = 1
    for one in size:
        count *= one
    if count <= MAX_REAL:
        return False
    dtype = kwargs.get("dtype")
    if dtype is None and name == "full":
        return isinstance(args[1], float)
    return (dtype or torch.get_default_dtype()).is_floating_point
