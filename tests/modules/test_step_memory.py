"""What a training step of the 10M-parameter model holds, over float32: figures that repeat to the byte."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mezzotint as mz
from mezzotint.lowprec import gate, switch
from mezzotint.models.gpt import GPT
from mezzotint.modules.rms_norm import RMSNorm
from mezzotint.modules.swiglu import SwiGLU
from mezzotint.recipes.catalog import find_recipe
from mezzotint.training.memory import measure_step

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _packed() -> Iterator[None]:
    """Compute 16 bits by our kernels, whatever this processor does natively."""
    patch = pytest.MonkeyPatch()
    patch.setenv(switch.VARIABLE, "packed")
    saved, packs = dict(switch._choices), dict(gate._packs)
    switch._choices.clear()
    yield
    patch.undo()
    switch._choices.clear()
    switch._choices.update(saved)
    gate._packs.update(packs)


@cache
def peak(policy: str, vocab_size: int, is_lean: bool) -> int:
    """Return the peak of a step above weights and states; a lean one has our modules and the chunked loss."""
    config = find_recipe("small-10m")
    torch.manual_seed(0)
    shape = replace(config.model, vocab_size=vocab_size, is_residual_compact=is_lean)
    model = GPT(shape, norm=RMSNorm, feed_forward=SwiGLU) if is_lean else GPT(shape)
    engine = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), policy=policy)
    ids = torch.randint(0, vocab_size, (config.train.batch_size, config.model.block_size + 1))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def forward() -> Tensor:
        with engine.forward():
            if is_lean:
                return model(inputs, targets, keep_logits=False)[1]
            return F.cross_entropy(model(inputs)[0].float().flatten(0, 1), targets.flatten())

    memory = measure_step(forward, engine.backward, torch.device("cpu"))
    return memory.peak_bytes


@pytest.mark.parametrize(
    ("policy", "vocab_size", "is_lean", "most"),
    [
        ("bf16-mixed", 256, False, 0.70),
        ("bf16-mixed", 256, True, 0.50),
        ("bf16-mixed", 8192, True, 0.42),
        ("bf16-saved", 256, False, 0.58),
        ("fp8-mixed", 256, False, 0.66),
    ],
)
def test_peak_over_float32(policy: str, vocab_size: int, is_lean: bool, most: float) -> None:
    assert peak(policy, vocab_size, is_lean) <= most * peak("float32", vocab_size, False)
