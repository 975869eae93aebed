"""The permanent proof: without autocast, the ghost runs the operations that a real CPU run does, in the same order."""

import pytest
from ghost_programs import PROGRAMS

from mezzotint.ghost.session import ghost_gpu
from mezzotint.trace.record import Phase
from mezzotint.trace.recorder import Recorder


def operations(name: str, device: str) -> list[tuple[str, str, tuple[tuple[int, ...], ...]]]:
    """Return phase, name and output shapes of each operation of two training steps."""
    step = PROGRAMS[name](device)
    with Recorder(has_ranges=False) as recorder:
        step()
        step()
    return [
        (one.call.phase, _common(one.call.op), tuple(meta.shape for meta in one.call.outputs if meta.numel))
        for one in recorder.trace().operations
        if one.call.phase is not Phase.OTHER or "copy" not in one.call.op
        if one.call.op != "aten.empty.memory_format" or any(meta.numel for meta in one.call.outputs)
    ]


def _common(op: str) -> str:
    """Return the CPU's name of what cuDNN does on a card; its workspace of no bytes is left out."""
    return op.replace("aten.cudnn_batch_norm", "aten.native_batch_norm")


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_ghost_runs_what_a_cpu_runs(name: str) -> None:
    real = operations(name, "cpu")
    with ghost_gpu("H100"):
        ghost = operations(name, "cuda")
    assert ghost == real
    assert len(real) > 20
    assert {Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER} <= {phase for phase, _, _ in real}
