"""The dispatcher: modes, keys, guards and kernels."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mezzotint.torch_internals.registry import Feature, Internal, declare, value

_GHOST = (Feature.GHOST,)
_Guard = Callable[..., AbstractContextManager[Any]]

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # noqa: PLC0414  told to be exported
else:
    TorchDispatchMode = value(
        "torch.utils._python_dispatch.TorchDispatchMode",
        "seeing every operation below autograd and autocast",
        needed_by=(Feature.RECORDING, Feature.GHOST),
        otherwise=object,
    )

_RECORDING = (Feature.RECORDING,)
mode_stack: Callable[[], list[Any]] = value(
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack", "the modes of this thread", needed_by=_RECORDING
)
push_mode: Callable[[Any], None] = value(
    "torch.utils._python_dispatch._push_mode", "entering a mode below those of the program", needed_by=_RECORDING
)
pop_mode: Callable[[], Any] = value(
    "torch.utils._python_dispatch._pop_mode", "leaving a mode below those of the program", needed_by=_RECORDING
)


def is_of_tracing(mode: Any) -> bool:
    """Return whether a mode is one of torch's own for tracing, which have places of their own in the stack."""
    return getattr(mode, "_mode_key", None) is not None


_keys_of: Callable[[Any], Any] | None = value(
    "torch._C._dispatch_keys",
    "which tensors have numbers at their address; without it, torch's operations are used",
    needed_by=(Feature.RECORDING,),
    otherwise=None,
)


def keys_of(tensor: Any) -> int:
    """Return the dispatch keys of a tensor, as bits; 0 where torch does not tell."""
    return 0 if _keys_of is None else int(_keys_of(tensor).raw_repr())


def keys_without_negative(tensor: Any) -> int:
    """Return what `keys_of` does, without the key of negative views."""
    return 0 if _keys_of is None else int(_keys_of(tensor).remove(DispatchKey.Negative).raw_repr())


disable_current_modes: _Guard = value(
    "torch.utils._python_dispatch._disable_current_modes",
    "reading a file while no dispatch mode is in force",
    needed_by=_GHOST,
)
DispatchKey: Any = value("torch._C.DispatchKey", "dispatch keys", needed_by=(Feature.GHOST, Feature.FAST_CPU))
DispatchKeySet: Any = value(
    "torch._C.DispatchKeySet", "sets of dispatch keys", needed_by=(Feature.GHOST, Feature.FAST_CPU)
)
disable_torch_function: _Guard = value(
    "torch._C.DisableTorchFunction", "calling torch past function modes", needed_by=_GHOST
)
disable_torch_dispatch: _Guard = value(
    "torch._C._DisableTorchDispatch", "calling torch past dispatch modes", needed_by=_GHOST
)
below_autograd: _Guard = value(
    "torch._C._AutoDispatchBelowAutograd", "calling kernels below autograd", needed_by=_GHOST
)
exclude_keys: _Guard = value(
    "torch._C._ExcludeDispatchKeyGuard", "calling kernels below a dispatch key", needed_by=_GHOST
)
dispatch_library: Callable[[str, str, str], Any] = value(
    "torch._C._dispatch_library", "registering kernels for a time", needed_by=_GHOST
)
operator_names: Callable[[], list[str]] = value(
    "torch._C._dispatch_get_all_op_names", "the list of all operators", needed_by=_GHOST
)
has_kernel_at: Callable[[str, str], bool] = value(
    "torch._C._dispatch_has_kernel_for_dispatch_key", "whether an operator has a kernel at a key", needed_by=_GHOST
)
keys_after: Callable[[Any], Any] = value(
    "torch._C._dispatch_keyset_full_after", "the keys that come after a key", needed_by=_GHOST
)
is_key_included: Callable[[Any], bool] = value(
    "torch._C._dispatch_tls_is_dispatch_key_included", "whether this thread includes a key", needed_by=_GHOST
)
is_key_excluded: Callable[[Any], bool] = value(
    "torch._C._dispatch_tls_is_dispatch_key_excluded", "whether this thread excludes a key", needed_by=_GHOST
)
set_key_included: Callable[[Any, bool], None] = value(
    "torch._C._dispatch_tls_set_dispatch_key_included", "making this thread include a key", needed_by=_GHOST
)
set_key_excluded: Callable[[Any, bool], None] = value(
    "torch._C._dispatch_tls_set_dispatch_key_excluded", "making this thread exclude a key", needed_by=_GHOST
)
allows_numbers_as_tensors: Callable[[str], bool] = value(
    "torch._C._should_allow_numbers_as_tensors", "whether an operator takes a number for a tensor", needed_by=_GHOST
)
OpOverload: Any = value("torch._ops.OpOverload", "the type of operators", needed_by=_GHOST, otherwise=object)

declare(
    Internal(
        "torch._ops.OpOverload._schema",
        "the names of an operator's arguments",
        needed_by=(Feature.RECORDING, Feature.GHOST),
        check=lambda: hasattr(_an_operator(), "_schema"),
    )
)
declare(
    Internal(
        "torch._ops.OpOverload._op_dk",
        "calling the kernel of an operator at a dispatch key",
        needed_by=(Feature.FAST_CPU,),
        check=lambda: hasattr(_an_operator(), "_op_dk"),
    )
)


def _an_operator() -> Any:
    import torch

    return torch.ops.aten.lstm.input


def schema_of(operator: Any) -> Any:
    """Return an operator's schema, None for what has none (higher-order operators)."""
    return getattr(operator, "_schema", None)


def call_at_key(operator: Any, key: Any, *args: Any) -> Any:
    """Call the kernel that an operator has at a dispatch key, without holding Python's lock."""
    return operator._op_dk(key, *args)


def original_kernel(name: str, key: str) -> Callable[..., Any]:
    """Return the kernel that an operator of ATen has at a dispatch key now, whatever is registered there later."""
    import torch

    kernel = torch.library.get_kernel(f"aten::{name}", key)
    keys = DispatchKeySet(getattr(DispatchKey, key))
    return lambda *args, **kwargs: kernel.call_boxed(keys, *args, **kwargs)


declare(
    Internal("torch.library.get_kernel", "the kernels that ours are registered over", needed_by=(Feature.FAST_CPU,))
)
