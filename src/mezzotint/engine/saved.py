"""Activations that wait for backward in bfloat16 while everything is computed in float32 (the policy's `saved`).

What forward keeps passes through hooks of autograd. They round what is an activation and leave the rest:

- tensors without a history of their own, which are statistics (the log-sum-exp of attention, means and deviations of
  norms) or the user's data, held elsewhere anyway;
- parameters and views of them;
- log-probabilities, whose gradient takes their exponential: at -10, rounding would move it by 2 %;
- columns of one number for each row, such as 1 / rms: they weigh nothing.

A tensor that several operations keep is rounded once, together with its views.
"""

import weakref
from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mezzotint.torch_internals.autograd import version_of

_EXACT = ("LogSoftmaxBackward0",)


class Packed:
    """A rounded tensor, and the shape in which it is handed back; `place` is (offset, shape, strides)."""

    __slots__ = ("place", "rounded")

    def __init__(self, rounded: Tensor, place: tuple[int, torch.Size, tuple[int, ...]] | None) -> None:
        self.rounded = rounded
        self.place = place

    def restore(self) -> Tensor:
        """Return the numbers in float32."""
        wide = self.rounded.float()
        if self.place is None:
            return wide
        offset, shape, strides = self.place
        return wide.as_strided(shape, strides, offset)


class SavedActivations:
    """The context of a forward pass; may be entered again and again."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = tuple(modules)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._weights: set[int] = set()
        # by storage and version: what was rounded of it, for as long as some operation keeps that
        self._known: dict[tuple[int, int], tuple[StorageWeakRef, weakref.ref[Tensor]]] = {}

    def __enter__(self) -> None:
        self._weights = {
            parameter.untyped_storage().data_ptr() for module in self._modules for parameter in module.parameters()
        }
        self._hooks.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        self._known.clear()

    def _pack(self, tensor: Tensor) -> Tensor | Packed:
        if tensor.dtype is not torch.float32 or tensor.grad_fn is None or type(tensor) is not Tensor:
            return tensor
        if tensor.dim() == 0 or tensor.shape[-1] == 1 or tensor.layout is not torch.strided:
            return tensor
        if tensor.grad_fn.name() in _EXACT or tensor.untyped_storage().data_ptr() in self._weights:
            return tensor
        source = tensor.detach()
        num_stored = source.untyped_storage().nbytes() // source.element_size()
        if num_stored != source.numel():
            return Packed(source.to(torch.bfloat16), None)
        place = int(source.storage_offset()), source.shape, tuple(source.stride())
        return Packed(self._round_whole(source, num_stored), place)

    def _round_whole(self, source: Tensor, num_stored: int) -> Tensor:
        """Return all numbers behind a tensor, rounded, in the order in which they are stored."""
        storage = StorageWeakRef(source.untyped_storage())  # type: ignore[no-untyped-call]
        key = (storage.cdata, version_of(source))
        found = self._known.get(key)
        if found is not None and not found[0].expired():  # type: ignore[no-untyped-call]
            rounded = found[1]()
            if rounded is not None:
                return rounded
        rounded = source.as_strided((num_stored,), (1,), 0).to(torch.bfloat16)
        self._known[key] = storage, weakref.ref(rounded)
        return rounded


def _unpack(kept: Tensor | Packed) -> Tensor:
    return kept.restore() if isinstance(kept, Packed) else kept
