"""Whether a tensor's numbers can be read at its address: the one check before compiled code gets an address.

A tensor may look like dense CPU memory and have none: zero tensors of forward-mode differentiation, wrappers of
`torch.func`, negative views, nested and quantized tensors, storages that FSDP resized to 0. Reading their address ends
the process, so every entry that hands an address to compiled code asks here first.
"""

from functools import cache

import torch
from torch import Tensor

from mezzotint.errors import FormatError
from mezzotint.torch_internals.dispatch import keys_of, keys_without_negative
from mezzotint.torch_internals.transforms import is_functional, is_legacy_batched, is_wrapped, is_zero_tensor

_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


@cache
def _plain_keys() -> frozenset[int]:
    """Return the dispatch keys, as bits, of tensors that are CPU memory and nothing else."""
    with torch.inference_mode(False):
        plain = keys_of(torch.empty(0, device="cpu"))
    with torch.inference_mode():
        inference = keys_of(torch.empty(0, device="cpu"))
    return frozenset((plain, inference)) - {0}


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is plain strided CPU memory, all of it within its storage, that can be read by address.

    Any other kind has a dispatch key of its own: another device or layout, a subclass, a wrapper of `torch.func`, a
    zero tensor, a negative or conjugate view, a quantized or nested tensor.
    """
    if type(tensor) not in _PLAIN_TYPES or keys_of(tensor) not in _plain_keys():
        return False
    return _is_within_storage(tensor)


def has_numbers(tensor: Tensor) -> bool:
    """Return whether torch operations can read the numbers of a tensor without harm, and watchers should.

    False for meta and fake tensors, subclasses, wrappers of `torch.func`, layouts other than strided, tensors without
    elements, and those whose storage was given up.
    """
    if type(tensor) not in _PLAIN_TYPES or not tensor.numel():
        return False
    if tensor.is_cpu:
        return is_plain(tensor) or (_is_view_of_numbers(tensor) and _is_within_storage(tensor))
    return (
        tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_nested
        and not tensor.is_quantized
        and not is_wrapped(tensor)
        and not is_zero_tensor(tensor)
        and _is_within_storage(tensor)
    )


def _is_view_of_numbers(tensor: Tensor) -> bool:
    """Return whether a tensor is plain memory but for its sign: a negative view."""
    return tensor.is_neg() and keys_without_negative(tensor) in _plain_keys()


def _is_within_storage(tensor: Tensor) -> bool:
    size = tensor.numel()
    if not size:
        return True
    if tensor.is_contiguous():
        extent = size
    else:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (tensor.storage_offset() + extent) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def readable(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor whose numbers torch operations read, for a public call; a zero tensor as zeros.

    Raises FormatError, which calls the tensor `name`, for layouts other than strided and for a storage that is too
    small for the tensor's shape. Subclasses and wrappers of `torch.func` serve themselves, and stay as they are.
    """
    if not isinstance(tensor, Tensor):
        raise FormatError(f"{name} must be a tensor, got a {type(tensor).__name__}; pass torch.tensor(...)")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else tensor.layout
        raise FormatError(f"{name} must be a dense tensor, got a {kind} one; pass its values as a strided tensor")
    if type(tensor) not in _PLAIN_TYPES or tensor.is_meta or is_wrapped(tensor):
        return tensor
    if is_zero_tensor(tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    if is_functional(tensor) or is_legacy_batched(tensor):
        return tensor
    if not _is_within_storage(tensor):
        raise FormatError(
            f"{name} must have memory for its shape {str(tuple(tensor.shape))[:80]}, got a storage of "
            f"{tensor.untyped_storage().nbytes()} bytes; bring its memory back (FSDP frees it between uses)"
        )
    return tensor.resolve_neg()
