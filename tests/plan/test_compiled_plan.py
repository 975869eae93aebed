"""Plans of programs under torch.compile: what is fused, how far intervals reach, and what programs ask the compiler."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mezzotint.plan.recording import GhostRun, Recording
from mezzotint.plan.roofline import plan_time
from mezzotint.trace.recorder import Recorder

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from plan_programs import torchtitan_graph

SIZES = {
    "num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 512, "vocab_size": 4096, "max_position_embeddings": 256,
}  # fmt: skip


def recorded(make: Callable[[], Callable[[], None]]) -> GhostRun:
    """Run two steps on a ghost H100."""
    recording, recorder = Recording("H100"), Recorder(has_ranges=False)
    with recording.within(recorder), recorder:
        step = make()
        for _ in range(2):
            step()
        del step
    return recording.run(recorder.trace())


class Gated(nn.Module):
    """A product between runs of operations that only move bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(1024, 1024), nn.Linear(1024, 1024)

    def forward(self, x: Tensor) -> Tensor:
        y = (self.one(x).sigmoid() * x + 1.0).tanh() * 2.0
        return (self.other(y).exp() - y).square().mean()


def gated(*, is_compiled: bool) -> GhostRun:
    """Two steps of it."""

    def make() -> Callable[[], None]:
        model = Gated().cuda()
        called = torch.compile(model) if is_compiled else model
        return lambda: called(torch.randn(16384, 1024, device="cuda")).backward()

    return recorded(make)


def test_intervals_of_compiled_programs_reach_from_all_fused_to_nothing_fused() -> None:
    eager, compiled = (plan_time(gated(is_compiled=one), first=0) for one in (False, True))
    assert compiled.num_launches < eager.num_launches
    assert compiled.works["product"] * compiled.gpu == pytest.approx(eager.works["product"] * eager.gpu)
    assert compiled.gpu < 0.9 * eager.gpu
    assert compiled.low <= compiled.seconds < eager.seconds <= compiled.high
    # beyond kernels of their own nothing is taken: the host of compiled code is the faster one
    assert compiled.high <= eager.high


def test_compiled_transformers_mask_attention_as_if_sequences_were_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = ModuleType("transformers.masking_utils")
    masks.find_packed_sequence_indices = lambda positions: positions * 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", masks)
    found = []

    def ask(x: Tensor) -> Tensor:
        found.append(masks.find_packed_sequence_indices(x))  # type: ignore[attr-defined]
        return x

    recorded(lambda: lambda: (ask(torch.ones(3, device="cuda")), torch.compile(ask)(torch.ones(3, device="cuda"))))
    assert [one is not None for one in found] == [False, True, False, True]


@pytest.mark.parametrize("kind", ["torchtitan-llama", "torchtitan-qwen3"])
def test_graph_trainer_compiles_attention_alone(kind: str) -> None:
    run = recorded(lambda: torchtitan_graph.make_step(kind, SIZES, 2, "train_step"))
    time = plan_time(run, first=0)
    names = [one.call.name for one in run.trace.operations]
    assert names.count("_scaled_dot_product_flash_attention") == 2 * SIZES["num_hidden_layers"]
    pieces = [one.call.inputs[0].shape for one in run.trace.operations if one.call.name == "_log_softmax"]
    rows = 2 * SIZES["max_position_embeddings"] // torchtitan_graph.PIECES
    assert pieces == [(rows, SIZES["vocab_size"])] * (2 * torchtitan_graph.PIECES)
    assert not run.is_compiled
    assert not time.uncovered
