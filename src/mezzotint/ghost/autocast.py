"""Ask the installed torch what autocast does to each operation, on CUDA without a GPU and on the CPU.

Every operation with a kernel at AutocastCUDA or AutocastCPU is called with tensors of the autocast dtype, of float32
and of both; a dispatch mode takes the call as the kernel passes it on, before it runs, and looks at the dtypes. So the
answers are those of PyTorch's own kernels, whatever shapes the operation wants. Functions that the documentation lists
and that have no kernel (`cross_entropy`) are run, and the operations that they became are listed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.ghost.session import ghost_gpu
from mezzotint.policy.autocast import DEVICES, Rule, Snapshot
from mezzotint.torch_internals import dispatch
from mezzotint.torch_internals.dispatch import TorchDispatchMode
from mezzotint.torch_internals.trees import tree_leaves

_KEYS = {"cuda": "AutocastCUDA", "cpu": "AutocastCPU"}


def autocast_snapshot(dtype: torch.dtype = torch.bfloat16) -> Snapshot:
    """Return what autocast does to each operation of the installed torch.

    `dtype` is the autocast dtype: bfloat16 or float16. Not to be called inside a ghost GPU.
    """
    with ghost_gpu("A100"):
        cuda = _rules("cuda", dtype), _parts("cuda", dtype)
    cpu = _rules("cpu", dtype), _parts("cpu", dtype)
    return Snapshot(
        torch=torch.__version__,
        dtype=str(dtype).removeprefix("torch."),
        rules=dict(zip(DEVICES, (cuda[0], cpu[0]), strict=True)),
        parts=dict(zip(DEVICES, (cuda[1], cpu[1]), strict=True)),
    )


class _CallSeenError(Exception):
    """The operation arrived behind autocast: no need to run it."""


class _Catch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops the first call of an operation, under any of its overloads, and keeps its arguments."""

    def __init__(self, packet: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._packet = packet
        self.leaves: list[Any] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function.overloadpacket is self._packet:
            self.leaves = tree_leaves((args, kwargs or {}))
            raise _CallSeenError
        return function(*args, **(kwargs or {}))


def _rules(device: str, dtype: torch.dtype) -> dict[str, Rule]:
    found = {}
    for name in sorted(dispatch.operator_names()):
        if not name.startswith("aten::") or not dispatch.has_kernel_at(name, _KEYS[device]):
            continue
        if name == "aten::_cudnn_rnn":  # not asked: its kernel, in builds with CUDA, packs the weights by cuDNN itself
            continue
        base, _, overload = name.removeprefix("aten::").partition(".")
        packet = getattr(torch.ops.aten, base)
        found[name.removeprefix("aten::")] = _rule(packet, overload or "default", device, dtype)
    return found


def _rule(packet: Any, overload: str, device: str, dtype: torch.dtype) -> Rule:
    """Classify by what arrives for inputs of the autocast dtype, of float32, and of both."""
    low = _arrived(packet, overload, device, (dtype,), dtype)
    wide = _arrived(packet, overload, device, (torch.float32,), dtype)
    if isinstance(low, Rule) or isinstance(wide, Rule):
        return low if isinstance(low, Rule) else Rule.UNKNOWN
    if torch.float32 in low[1]:
        return Rule.OUTPUT
    if low[0] == wide[0] == {dtype}:
        return Rule.LOWER
    if low[0] == wide[0] == {torch.float32}:
        return Rule.FLOAT32
    mixed = _arrived(packet, overload, device, (dtype, torch.float32), dtype)
    if isinstance(mixed, Rule):
        return Rule.UNKNOWN
    return Rule.PROMOTE if mixed[0] == {torch.float32} else Rule.NONE


def _arrived(
    packet: Any, overload: str, device: str, given: tuple[torch.dtype, ...], dtype: torch.dtype
) -> tuple[set[torch.dtype], set[torch.dtype]] | Rule:
    """Return the dtypes of the tensors, and of the dtype arguments, with which the operation arrives."""
    op = getattr(packet, overload)
    tensors = _Tensors(device, given)
    try:
        arguments = [
            tensors.argument(str(one.type)) for one in dispatch.schema_of(op).arguments if not one.has_default_value()
        ]
    except KeyError:
        return Rule.UNKNOWN
    with dispatch.below_autograd(), _Catch(packet) as catch:
        try:
            with torch.autocast(device, dtype=dtype):
                op(*arguments)
        except _CallSeenError:
            floats = {one.dtype for one in catch.leaves if isinstance(one, Tensor) and one.is_floating_point()}
            return floats, {one for one in catch.leaves if isinstance(one, torch.dtype)}
        except RuntimeError:  # of autocast where the same call arrives without it, else of these arguments
            try:
                op(*arguments)
            except _CallSeenError:
                return Rule.ERROR
            except RuntimeError:
                return Rule.UNKNOWN
    return Rule.UNKNOWN


class _Tensors:
    """Arguments by schema type; tensors take the given dtypes in turn."""

    def __init__(self, device: str, dtypes: tuple[torch.dtype, ...]) -> None:
        self._device, self._dtypes, self._count = device, dtypes, 0

    def _tensor(self) -> Tensor:
        dtype = self._dtypes[self._count % len(self._dtypes)]
        self._count += 1
        return torch.ones(2, 2, dtype=dtype, device=self._device)

    def argument(self, kind: str) -> Any:
        """Return a value of a schema type; raises KeyError for a type that autocast's operations do not take."""
        if kind in ("Tensor", "Optional[Tensor]"):
            return self._tensor()
        if kind == "List[Tensor]":
            return [self._tensor(), self._tensor()]
        if kind == "List[Optional[Tensor]]":  # indices
            return [torch.zeros(2, dtype=torch.long, device=self._device)]
        if kind.startswith("Optional["):
            return None
        return _PLAIN[kind]


_PLAIN: Mapping[str, Any] = {
    "int": 1, "SymInt": 1, "float": 1.0, "number": 1, "bool": False, "str": "mean", "List[int]": [1],
    "List[SymInt]": [1], "List[bool]": [False], "ScalarType": torch.float64, "int[]": [1],
}  # fmt: skip


# what the documentation lists, or readers expect there, without a kernel on one of the devices: run on (4, 8)
_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long, device=x.device)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "softmin": lambda x: F.softmin(x, dim=-1),
    "softmax": lambda x: F.softmax(x, dim=-1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "mean": lambda x: x.mean(-1),
    "sum": lambda x: x.sum(-1),
    "var": lambda x: x.var(-1),
    "norm": torch.norm,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "square": torch.square,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "einsum": lambda x: torch.einsum("ij->i", x),
}


def _parts(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Return what each function became, as `_log_softmax bfloat16, nll_loss_forward float32`."""
    found = {}
    for name, function in _FUNCTIONS.items():
        x = torch.ones(4, 8, dtype=dtype, device=device)
        with _Listing() as listing:
            try:
                with torch.no_grad(), torch.autocast(device, dtype=dtype):
                    function(x)
            except RuntimeError as error:
                found[name] = f"error: {str(error).splitlines()[0]}"
                continue
        found[name] = ", ".join(listing.parts)
    return found


class _Listing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists the operations that compute on floats, with what they read and wrote."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parts: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        read = _float_dtypes((args, kwargs))
        out = function(*args, **(kwargs or {}))
        written = _float_dtypes(out)
        if read and written and not function.is_view:
            words = " and ".join(read) if read == written else f"{' and '.join(read)} to {' and '.join(written)}"
            self.parts.append(f"{function.overloadpacket.__name__} {words}")
        return out


def _float_dtypes(tree: Any) -> list[str]:
    found = {one.dtype for one in tree_leaves(tree) if isinstance(one, Tensor) and one.is_floating_point()}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found)
