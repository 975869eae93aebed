"""The reference model against plain formulas: loss, gradients, causality, positions, memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.models.gpt import GPT, rotary_tables, rotate
from mezzotint.models.gpt_config import GPTConfig

SMALL = GPTConfig(
    vocab_size=50, block_size=16, num_layers=2, num_heads=2, dim=16, ffn_dim=24, is_head_tied=False, loss_chunk_rows=7
)


def build(**changes) -> tuple[GPT, Tensor, Tensor]:
    torch.manual_seed(0)
    config = replace(SMALL, **changes)
    ids = torch.randint(0, config.vocab_size, (3, config.block_size + 1))
    return GPT(config), ids[:, :-1], ids[:, 1:]


def gradients(model: GPT, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("is_head_tied", [False, True])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy(keep_logits: bool, is_head_tied: bool) -> None:
    model, inputs, targets = build(is_head_tied=is_head_tied)
    model.double()
    targets = targets.clone()
    targets[0, :5] = -100
    logits, loss = model(inputs, targets, keep_logits=keep_logits)
    assert (logits is None) == (not keep_logits)
    plain, _ = model(inputs)
    expected = F.cross_entropy(plain.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    # the sum of chunks is kept in float32 or wider, so gradients in float64 agree to its rounding
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12)


class Watch(TorchDispatchMode):
    """Counts the elements of the largest float32 tensor that an operation makes with the given last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, Tensor) and item.dtype == torch.float32 and item.shape[-1:] == (self.width,):
                self.largest = max(self.largest, item.numel())
        return out


@pytest.mark.parametrize("keep_logits", [False, True])
def test_float32_logits_never_exist_as_a_whole(keep_logits: bool) -> None:
    model, inputs, targets = build(vocab_size=53)
    with Watch(53) as watch:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, loss = model(inputs, targets, keep_logits=keep_logits)
        loss.backward()
    assert loss.dtype == torch.float32
    assert 0 < watch.largest <= SMALL.loss_chunk_rows * 53 < inputs.numel() * 53


def test_the_watch_sees_whole_logits_where_they_are_made() -> None:
    model, inputs, targets = build(vocab_size=53)
    with Watch(53) as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = model(inputs)
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    assert watch.largest == inputs.numel() * 53


def test_a_token_changes_only_what_follows() -> None:
    model, inputs, _ = build()
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % SMALL.vocab_size
    before, after = model(inputs)[0], model(changed)[0]
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_rotary_scores_depend_on_the_distance_only() -> None:
    """q_i . k_j is the same for all pairs at one distance, to float32 rounding of 16 terms of order 1."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 32).expand(1, 1, 64, 32), torch.randn(1, 1, 1, 32).expand(1, 1, 64, 32)
    tables = rotary_tables(64, 32, 10000.0, torch.device("cpu"))
    scores = (rotate(q, tables) @ rotate(k, tables).transpose(-1, -2))[0, 0]
    for distance in (0, 1, 7, 40):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert abs(float(scores[0, 0] - scores[20, 0])) > 1e-3


def test_positions_stay_float32_under_autocast_and_in_a_bfloat16_model() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotary_tables(4096, 64, 10000.0, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    assert len(cos[:, 0].unique()) > 3000  # in bfloat16, positions above 256 would share their angles
    model, _, _ = build()
    assert not list(model.bfloat16().buffers())


def test_a_tied_head_shares_its_weight() -> None:
    tied, _, _ = build(is_head_tied=True)
    untied, _, _ = build(is_head_tied=False)
    assert tied.head.weight is tied.embed.weight
    assert untied.num_parameters - tied.num_parameters == SMALL.vocab_size * SMALL.dim


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_leave_in_the_compute_dtype_and_the_loss_in_float32(dtype: torch.dtype) -> None:
    model, inputs, targets = build()
    with torch.autocast("cpu", dtype=dtype):
        logits, loss = model(inputs, targets)
    assert logits.dtype == dtype
    assert loss.dtype == torch.float32
    exact = F.cross_entropy(model.double()(inputs)[0].flatten(0, 1), targets.flatten())
    # at initialisation logits are of order 0.1, so their rounding moves the loss by well under eps
    assert abs(loss.item() - exact.item()) < torch.finfo(dtype).eps


def test_generate() -> None:
    model, inputs, _ = build(dropout=0.5)
    prompt = inputs[:, :3]

    def sample(seed: int, **settings) -> Tensor:
        return model.generate(prompt, num_tokens=20, generator=torch.Generator().manual_seed(seed), **settings)

    assert sample(0).shape == (3, 23)
    assert torch.equal(sample(0)[:, :3], prompt)
    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, temperature=0), sample(1, top_k=1))
    assert model.training


@pytest.mark.parametrize("prompt_length", [0])
def test_generate_needs_a_prompt(prompt_length: int) -> None:
    model, inputs, _ = build()
    with pytest.raises(ValueError, match="prompt of at least one token"):
        model.generate(inputs[:, :prompt_length], num_tokens=1)


def test_too_many_tokens() -> None:
    model, inputs, _ = build()
    with pytest.raises(ValueError, match="17 tokens exceed the block size, 16"):
        model(torch.cat((inputs, inputs[:, :1]), dim=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 15}, "not divisible by num_heads=2"),
        ({"dim": 6}, "even number"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"rope_base": 0.5}, "rope_base=0.5"),
    ],
)
def test_shapes_that_cannot_be_built(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_flops_agree_with_torchs_counter() -> None:
    """Exactly, with attention as plain products: the counter has no formula for the CPU's flash attention."""
    model, inputs, targets = build()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs, targets)[1].backward()
    assert counter.get_total_flops() == inputs.numel() * model.flops_per_token
