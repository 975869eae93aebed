"""The reference model against plain formulas: loss, gradients, causality, positions, memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.models.gpt import GPT, FeedForward, rotary_tables, rotate
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.models.loss import chunked_loss

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


EXACT = {"rtol": 1e-10, "atol": 1e-13}  # float64 sums of at most 1000 terms of order 1: 1000 * 2**-53 = 1e-13
# float32: 48 tokens and 53 columns are summed in another order, so 100 roundings of 2**-24 at worst, where the terms
# do not cancel; gradients are of order 0.01 and cancel, hence the absolute part
ROUNDED = {"rtol": 100 * 2**-24, "atol": 0.01 * 100 * 2**-24}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, ROUNDED)])
@pytest.mark.parametrize("chunk_rows", [1, 7, 48, 1000])
@pytest.mark.parametrize("is_head_tied", [False, True])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy(
    keep_logits: bool, is_head_tied: bool, chunk_rows: int, dtype: torch.dtype, tolerance: dict
) -> None:
    model, inputs, targets = build(is_head_tied=is_head_tied, loss_chunk_rows=chunk_rows)
    model.to(dtype)
    targets = targets.clone()
    targets[0, :5] = -100
    logits, loss = model(inputs, targets, keep_logits=keep_logits)
    assert (logits is None) == (not keep_logits)
    plain, _ = model(inputs)
    if keep_logits:
        assert torch.equal(logits, plain)
    expected = F.cross_entropy(plain.flatten(0, 1), targets.flatten())
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected, **tolerance)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("how", ["autocast", "bfloat16 weights"])
def test_the_loss_of_low_precision_logits_is_taken_in_float32(how: str) -> None:
    """In bfloat16 the log-softmax alone would be off by 2**-9."""
    model, inputs, targets = build()
    if how == "bfloat16 weights":
        model.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        logits, loss = model(inputs, targets)
        _, again = model(inputs, targets, keep_logits=False)
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    for ours in (loss, again):
        torch.testing.assert_close(ours, expected, **ROUNDED)


def head_gradient_error(
    dtype: torch.dtype, chunk_rows: int, *, num_rows: int, vocab_size: int, scale: float, is_autocast: bool
) -> tuple[float, float]:
    """Return the relative errors of the gradients of hidden states and head, against float64, for a scaled loss."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, 16, generator=generator).to(dtype)
    weight = (0.1 * torch.randn(vocab_size, 16, generator=generator)).to(dtype)
    targets = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].T, targets).backward()
    ours = [(tensor.float() if is_autocast else tensor).detach().requires_grad_() for tensor in (hidden, weight)]
    with torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
        loss = chunked_loss(ours[0], ours[1], targets, chunk_rows)
    (loss * scale).backward()
    errors = [
        float((our.grad.double() / scale - true.grad).norm() / true.grad.norm())
        for our, true in zip(ours, exact, strict=True)
    ]
    return errors[0], errors[1]


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 65536.0)])
@pytest.mark.parametrize("chunk_rows", [2048, 16])
def test_the_gradient_of_the_head_does_not_worsen_with_the_number_of_chunks(
    chunk_rows: int, dtype: torch.dtype, scale: float, is_autocast: bool
) -> None:
    """Summed over 128 chunks in their own dtype, it would be off by several times this.

    Two things are rounded to half precision, each by eps / 2 at most: the gradient of the logits and, of each chunk,
    the gradient of the head. The sum is float32. Weights stored in half precision round the result once more.
    """
    _, error = head_gradient_error(
        dtype, chunk_rows, num_rows=2048, vocab_size=64, scale=scale, is_autocast=is_autocast
    )
    assert error < (2 if is_autocast else 3) * torch.finfo(dtype).eps / 2


def test_the_loss_scale_reaches_the_gradients_before_float16_does() -> None:
    """A gradient of the logits is 1 / (4096 * 2048) = 2**-23 here, and float16 is spaced by 2**-24 below 2**-14.

    Unscaled, it is rounded by up to a quarter of itself. That must not have happened before the scale comes in.
    """
    shape = {"num_rows": 4096, "vocab_size": 2048, "is_autocast": True}
    unscaled = head_gradient_error(torch.float16, 512, scale=1.0, **shape)
    scaled = head_gradient_error(torch.float16, 512, scale=65536.0, **shape)
    eps = torch.finfo(torch.float16).eps
    assert max(scaled) < eps
    assert min(unscaled) > 2 * eps


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("keep_logits", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_computes_the_same(backend: str, keep_logits: bool, is_autocast: bool) -> None:
    """In one graph. The backends that generate no code leave every bit as it was."""
    model, inputs, targets = build()
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    losses = []
    for way in (compiled, model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            losses.append(way(inputs, targets, keep_logits=keep_logits)[1])
    assert torch.equal(*losses)
    for ours, theirs in zip(gradients(model, losses[0]), gradients(model, losses[1]), strict=True):
        assert torch.equal(ours, theirs)


def test_ignored_tokens_have_no_say() -> None:
    model, inputs, targets = build()
    targets = targets.clone()
    targets[0] = -100
    without = model(inputs[1:], targets[1:])[1]
    torch.testing.assert_close(model(inputs, targets)[1], without, **ROUNDED)  # other chunks, so another order
    targets[:] = -100
    assert model(inputs, targets)[1].isnan()  # the mean of nothing, as F.cross_entropy has it


class Watch(TorchDispatchMode):
    """Counts the elements of the largest float32 tensor that an operation makes out of logits.

    These are the tensors whose last axis is the vocabulary, and those of any shape with exactly `whole` elements.
    """

    def __init__(self, width: int, whole: int) -> None:
        super().__init__()
        self.width, self.whole = width, whole
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if not isinstance(item, Tensor) or item.dtype != torch.float32:
                continue
            if item.shape[-1:] == (self.width,) or item.numel() == self.whole:
                self.largest = max(self.largest, item.numel())
        return out


@pytest.mark.parametrize("is_body_frozen", [False, True])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_float32_logits_never_exist_as_a_whole(keep_logits: bool, is_body_frozen: bool) -> None:
    model, inputs, targets = build(vocab_size=53)
    model.requires_grad_(not is_body_frozen)
    model.head.requires_grad_()
    with Watch(53, inputs.numel() * 53) as watch:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, loss = model(inputs, targets, keep_logits=keep_logits)
        loss.backward()
    assert loss.dtype == torch.float32
    assert 0 < watch.largest <= SMALL.loss_chunk_rows * 53 < inputs.numel() * 53


@pytest.mark.parametrize("keep_logits", [False, True])
def test_float32_logits_are_not_saved_for_backward(keep_logits: bool) -> None:
    """Chunk by chunk they could still add up to the whole until backward."""
    model, inputs, targets = build(vocab_size=53)
    for is_body_frozen in (False, True):
        model.requires_grad_(not is_body_frozen)
        model.head.requires_grad_()
        saved: list[Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=saved: kept.append(tensor) or tensor, id_of),
            torch.autocast("cpu", dtype=torch.bfloat16),
        ):
            model(inputs, targets, keep_logits=keep_logits)
        assert saved
        assert not [tensor for tensor in saved if tensor.dtype == torch.float32 and tensor.shape[-1:] == (53,)]


def id_of(tensor: Tensor) -> Tensor:
    return tensor


def test_the_watch_sees_whole_logits_where_they_are_made() -> None:
    model, inputs, targets = build(vocab_size=53)
    with Watch(53, inputs.numel() * 53) as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        logits, _ = model(inputs)
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    assert watch.largest == inputs.numel() * 53


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("is_residual_compact", [False, True])
def test_the_residual_stream_takes_autocasts_dtype_where_that_is_asked_for(
    is_residual_compact: bool, is_autocast: bool
) -> None:
    model, inputs, targets = build(is_residual_compact=is_residual_compact)
    seen: list[torch.dtype] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        loss = model(inputs, targets)[1]
    assert seen == [torch.bfloat16 if is_residual_compact and is_autocast else torch.float32] * 2
    assert loss.dtype == torch.float32
    loss.backward()
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_compact_stream_changes_nothing_without_autocast() -> None:
    (one, inputs, targets), (other, _, _) = build(), build(is_residual_compact=True)
    assert torch.equal(one(inputs, targets)[1], other(inputs, targets)[1])
    torch.manual_seed(0)
    one, other = one.bfloat16(), other.bfloat16()
    assert torch.equal(one(inputs, targets)[1], other(inputs, targets)[1])


def test_norms_and_feed_forward_layers_of_others_take_their_places() -> None:
    class Wide(FeedForward):
        pass

    config = replace(SMALL, num_layers=2)
    torch.manual_seed(0)
    plain = GPT(config)
    torch.manual_seed(0)
    other = GPT(config, norm=torch.nn.RMSNorm, feed_forward=Wide)
    kinds = [type(module) for module in other.modules()]
    assert kinds.count(torch.nn.RMSNorm) == 5
    assert kinds.count(Wide) == 2
    assert list(plain.state_dict()) == list(other.state_dict())
    assert all(map(torch.equal, plain.state_dict().values(), other.state_dict().values()))
    _, inputs, targets = build()
    assert torch.equal(plain(inputs, targets)[1], other(inputs, targets)[1])  # eps is the same, too


@pytest.mark.parametrize("place", [0, 9, 15])
def test_a_token_changes_only_what_follows(place: int) -> None:
    model, inputs, _ = build()
    changed = inputs.clone()
    changed[:, place] = (changed[:, place] + 1) % SMALL.vocab_size
    before, after = model(inputs)[0], model(changed)[0]
    assert torch.equal(before[:, :place], after[:, :place])
    for later in range(place, 16):
        assert not torch.equal(before[:, later], after[:, later])


def test_a_shorter_sequence_has_the_logits_of_its_beginning() -> None:
    """Also in value: no position looks ahead. Sums of another length round otherwise, by a few 2**-24."""
    model, inputs, _ = build()
    torch.testing.assert_close(model(inputs[:, :5])[0], model(inputs)[0][:, :5], rtol=1e-5, atol=1e-7)


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


def test_rotation_keeps_lengths_and_starts_at_none() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 50, 8, dtype=torch.bfloat16)
    turned = rotate(x, rotary_tables(50, 8, 10000.0, torch.device("cpu")))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    # each entry is rounded once to 8 bits, so the length is off by 2**-9 at most, and float32 adds little
    torch.testing.assert_close(turned.float().norm(dim=-1), x.float().norm(dim=-1), rtol=2**-8, atol=0)


def test_positions_stay_float32_under_autocast_and_in_a_bfloat16_model() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, sin = rotary_tables(4096, 64, 10000.0, torch.device("cpu"))
    # against float64: the angle is a float32 product of float32 factors, of up to 4095, so off by 2 * 4096 * 2**-24
    angles = torch.arange(4096)[:, None].double() * 10000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=4096 * 2**-22)
    torch.testing.assert_close(sin.double(), angles.sin(), rtol=0, atol=4096 * 2**-22)
    assert cos.dtype == sin.dtype == torch.float32
    assert len(cos[:, 0].unique()) > 3000  # in bfloat16, positions above 256 would share their angles
    model, _, _ = build()
    assert not list(model.bfloat16().buffers())


def test_a_tied_head_shares_its_weight() -> None:
    tied, _, _ = build(is_head_tied=True)
    untied, _, _ = build(is_head_tied=False)
    assert tied.head.weight is tied.embed.weight
    assert untied.head.weight is not untied.embed.weight
    assert tied.flops_per_token == untied.flops_per_token
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
    assert torch.equal(sample(0, top_k=10**6), sample(0))
    assert model.training
    model.eval()
    sample(0)
    assert not model.training


def test_generating_sees_the_latest_block() -> None:
    """Greedy, by hand: each token is the likeliest after the 16 before it, which outgrow the block."""
    model, inputs, _ = build()
    ids = inputs[:1, :3]
    for _ in range(30):
        logits, _ = model(ids[:, -16:])
        ids = torch.cat((ids, logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(model.generate(inputs[:1, :3], num_tokens=30, temperature=0), ids)


def test_only_the_likeliest_are_drawn() -> None:
    model, inputs, _ = build()
    for parameter in model.parameters():  # further from uniform, so that chance would show
        parameter.data.mul_(3)
    likeliest = model(inputs[:1])[0][0, -1].topk(3).indices.tolist()
    prompts = inputs[:1].expand(200, -1)
    drawn = model.generate(prompts, num_tokens=1, top_k=3, generator=torch.Generator().manual_seed(0))[:, -1]
    assert set(drawn.tolist()) == set(likeliest)


@pytest.mark.parametrize("settings", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}])
def test_settings_that_draw_nothing(settings: dict) -> None:
    model, inputs, _ = build()
    with pytest.raises(ValueError, match=next(iter(settings))):
        model.generate(inputs, num_tokens=1, **settings)


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
        ({"rope_base": float("nan")}, "rope_base=nan"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"loss_chunk_rows": 0}, "loss_chunk_rows=0"),
    ],
)
def test_shapes_that_cannot_be_built(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **changes)


def test_flops_agree_with_torchs_counter() -> None:
    """Exactly, with attention as plain products: the counter has no formula for the CPU's flash attention.

    No tolerance is needed: causal attention counts in full for both, though half of it is masked, and elementwise
    operations, norms, rotary positions and the loss count as nothing.
    """
    model, inputs, targets = build()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(inputs, targets)[1].backward()
    assert counter.get_total_flops() == inputs.numel() * model.flops_per_token
