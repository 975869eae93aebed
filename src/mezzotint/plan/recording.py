"""A few steps of a program on the ghost GPU, recorded: operations, memory, and what had to be assumed."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch

from mezzotint.ghost.access import Access
from mezzotint.ghost.compiled import CompiledRegions
from mezzotint.ghost.owners import GRADIENTS, WEIGHTS
from mezzotint.ghost.session import ghost_gpu
from mezzotint.ghost.storages import MemoryEvent
from mezzotint.hardware.devices import DeviceSpec
from mezzotint.patches import Patches
from mezzotint.torch_internals import flags
from mezzotint.trace.record import Trace
from mezzotint.trace.recorder import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostRun:
    """What a program did on a ghost GPU.

    `memory` are allocations and releases in order; `owners` says which storages are weights, gradients or optimizer
    states. Sets of operations by index: `causal` attention with a causal mask, `waits` for a number from the GPU,
    `transfers` between the host's memory and the card's, those `on_host` that the GPU has no part in, convolutions with
    `channels_last`; `syncs` are those before which the program waited for the GPU (`torch.cuda.synchronize`). `access`
    is what operations move beyond their elements because of strides, `turned` how many of a product's matrices do not
    lie along the axis it sums over. `compiled` are names of what the program asked torch.compile for, `compiled_share`
    their share of forward.
    `has_tf32_products` and `has_tf32_convolutions` are torch's switches as the program left them. `assumed` counts
    answers without knowledge by (file, line, what).
    """

    spec: DeviceSpec
    trace: Trace
    memory: tuple[MemoryEvent, ...]
    owners: Mapping[int, str]
    causal: frozenset[int]
    waits: frozenset[int]
    transfers: frozenset[int]
    on_host: frozenset[int]
    channels_last: frozenset[int]
    syncs: frozenset[int]
    access: Mapping[int, Access]
    turned: Mapping[int, int]
    has_tf32_products: bool
    has_tf32_convolutions: bool
    compiled: tuple[str, ...]
    compiled_share: float
    assumed: Mapping[tuple[str, int, str], int]
    notes: tuple[str, ...]

    @property
    def is_compiled(self) -> bool:
        """Whether most of the forward pass ran in what the program asked torch.compile for."""
        return self.compiled_share > 0.5


class Recording:
    """Records a program on one card: `with recording.within(recorder): with recorder: run()`, then `run(trace)`."""

    def __init__(self, gpu: str | DeviceSpec) -> None:
        self.gpu = ghost_gpu(gpu)
        self._switches = (False, True)
        self._syncs: set[int] = set()

    @contextmanager
    def within(self, recorder: Recorder) -> Iterator[None]:
        """Switch the ghost on around a recorder, whose operations give memory its time."""
        with self.gpu as gpu:
            gpu.storages.clock = lambda: recorder.num_operations
            patches = Patches()
            patches.replace(torch.cuda, "synchronize", lambda *_: self._syncs.add(recorder.num_operations))
            masks = sys.modules.get("transformers.masking_utils")
            if masks is not None:
                find = partial(_packed, masks.find_packed_sequence_indices, gpu.regions)
                patches.replace(masks, "find_packed_sequence_indices", find)
            try:
                yield
            finally:
                patches.undo()
                self._switches = flags.allows_tf32_matmul(), flags.allows_tf32_convolution()
                for weight, buffers in recorder.known_tensors():
                    gpu.owners.name(weight, WEIGHTS)
                    if weight is not None and weight.grad is not None:
                        gpu.owners.name(weight.grad, GRADIENTS)
                    for buffer in buffers:
                        gpu.owners.name(buffer, WEIGHTS)

    def run(self, trace: Trace) -> GhostRun:
        """Return what was recorded."""
        notes = [note for note in trace.notes if "torch.compile" not in note]
        return GhostRun(
            spec=self.gpu.spec,
            trace=_without_notes(trace, notes),
            memory=tuple(self.gpu.storages.events),
            owners=dict(self.gpu.owners.classes),
            causal=frozenset(self.gpu.causal),
            waits=frozenset(self.gpu.waits),
            transfers=frozenset(self.gpu.transfers),
            on_host=frozenset(self.gpu.on_host),
            channels_last=frozenset(self.gpu.channels_last),
            syncs=frozenset(self._syncs),
            access=dict(self.gpu.access),
            turned=dict(self.gpu.turned),
            has_tf32_products=self._switches[0],
            has_tf32_convolutions=self._switches[1],
            compiled=tuple(self.gpu.regions.names),
            compiled_share=self.gpu.regions.share,
            assumed=self.gpu.assumed,
            notes=(*notes, *self.gpu.notes),
        )


def _packed(
    find: Callable[[torch.Tensor], torch.Tensor | None], regions: CompiledRegions, positions: torch.Tensor
) -> torch.Tensor | None:
    """Look for packed sequences as transformers does, in numbers that ghosts have not: there are none.

    Where it is compiled it cannot look either, and masks attention as if there were (masking_utils.py says so).
    """
    return find(positions) if regions.is_inside else None


def _without_notes(trace: Trace, notes: list[str]) -> Trace:
    return replace(trace, notes=notes)
