"""The last layer and its loss against torch's two."""

import pytest
import torch
from saved import saved_bytes
from torch import nn
from torch.nn import functional as F

from mezzotint.modules.cross_entropy import LinearCrossEntropy

# float64 sums of at most 100 terms of order 1
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, 8, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(0, 11, (4, 5), generator=generator)


@pytest.mark.parametrize("chunk_rows", [1, 7, 20, 1000])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_loss_and_gradients_are_those_of_a_linear_layer_and_cross_entropy(ignore_index: int, chunk_rows: int) -> None:
    hidden, targets = inputs()
    targets[0, :2] = ignore_index
    layer = LinearCrossEntropy(8, 11, ignore_index=ignore_index, chunk_rows=chunk_rows, dtype=torch.float64)
    loss = layer(hidden, targets)
    logits = F.linear(hidden, layer.weight)
    assert torch.equal(layer.logits(hidden), logits)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index)
    torch.testing.assert_close(loss, expected, **EXACT)
    leaves = (hidden, layer.weight)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_it_begins_as_a_linear_layer_and_takes_its_weights() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(8, 11, bias=False)
    torch.manual_seed(0)
    layer = LinearCrossEntropy(8, 11)
    assert torch.equal(layer.weight, linear.weight)
    layer.load_state_dict(linear.state_dict())
    assert str(layer) == "LinearCrossEntropy(8, 11, ignore_index=-100, chunk_rows=512)"


def test_a_tied_weight_gets_the_gradients_of_both_uses() -> None:
    embed, layer = nn.Embedding(11, 8), LinearCrossEntropy(8, 11)
    layer.weight = embed.weight
    _, targets = inputs()
    layer(embed(targets), targets).backward()
    assert embed.weight.grad is layer.weight.grad is not None
    assert sum(p.numel() for p in nn.ModuleList([embed, layer]).parameters()) == 88


def test_autocast_gives_a_float32_loss_of_bfloat16_logits() -> None:
    hidden, targets = inputs(torch.float32)
    layer = LinearCrossEntropy(8, 11, chunk_rows=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = layer(hidden, targets)
        logits = layer.logits(hidden)
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, expected, rtol=30 * 2**-24, atol=0)  # 20 rows and 11 columns in another order
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32


def test_no_logits_are_kept() -> None:
    """Hidden states, targets and a count alone: the float32 logits would be 4 * 20 * 1100 bytes."""
    hidden, targets = inputs(torch.float32)
    layer = LinearCrossEntropy(8, 1100, chunk_rows=6)
    kept = saved_bytes(lambda: layer(hidden, targets), (layer.weight,))
    assert kept <= hidden.nbytes + targets.nbytes + 64


def test_nothing_to_learn_from_is_nan_and_what_does_not_fit_is_refused() -> None:
    hidden, targets = inputs(torch.float32)
    layer = LinearCrossEntropy(8, 11)
    assert layer(hidden, torch.full_like(targets, -100)).isnan()
    with pytest.raises(ValueError, match=r"hidden states \(4, 5, 8\), targets \(20,\)"):
        layer(hidden, targets.flatten())
    with pytest.raises(ValueError, match="do not fit"):
        layer(hidden[..., :7], targets)
    with pytest.raises(ValueError, match="chunk_rows=0 is refused"):
        LinearCrossEntropy(8, 11, chunk_rows=0)
