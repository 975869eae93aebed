"""The reference model with adopted layers is the same model, and keeps less."""

from dataclasses import replace

import pytest
import torch
from saved import saved_bytes

from mezzotint.models.gpt import GPT
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.modules.rms_norm import RMSNorm
from mezzotint.modules.swiglu import SwiGLU

CONFIG = GPTConfig(vocab_size=64, dim=64, ffn_dim=160, num_layers=3, block_size=32, loss_chunk_rows=16)


def build(config: GPTConfig, *, is_adopted: bool) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(config, norm=RMSNorm, feed_forward=SwiGLU) if is_adopted else GPT(config)
    ids = torch.randint(0, config.vocab_size, (2, config.block_size + 1), generator=torch.Generator().manual_seed(1))
    return model, ids[:, :-1], ids[:, 1:]


def test_parameters_have_the_same_names_and_first_values() -> None:
    plain, adopted = (build(CONFIG, is_adopted=is_adopted)[0] for is_adopted in (False, True))
    assert sum(isinstance(module, (RMSNorm, SwiGLU)) for module in adopted.modules()) == 3 * 3 + 1
    assert list(plain.state_dict()) == list(adopted.state_dict())
    assert all(map(torch.equal, plain.state_dict().values(), adopted.state_dict().values()))
    adopted.load_state_dict(plain.state_dict())
    plain.load_state_dict(adopted.state_dict())
    assert {module.eps for module in adopted.modules() if isinstance(module, RMSNorm)} == {plain.norm.eps}


def test_float32_losses_and_gradients_agree() -> None:
    """Both round to float32, at other places: 3 layers of sums of up to 160 terms."""
    results = []
    for is_adopted in (False, True):
        model, inputs, targets = build(CONFIG, is_adopted=is_adopted)
        loss = model(inputs, targets)[1]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=3 * 160 * 2**-24 * 0.1)


@pytest.mark.parametrize("is_adopted", [False, True])
def test_bfloat16_losses_stay_near_those_of_float32(is_adopted: bool) -> None:
    """A logit is off by a few roundings of 2^-9 per layer; the mean of 64 losses is off by less."""
    model, inputs, targets = build(replace(CONFIG, is_residual_compact=True), is_adopted=is_adopted)
    expected = model(inputs, targets)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs, targets)[1]
    torch.testing.assert_close(loss, expected, rtol=4 * 2**-9, atol=0)
    assert loss != expected


def test_a_compact_stream_with_adopted_layers_keeps_the_least() -> None:
    kept = {}
    for is_adopted in (False, True):
        for is_residual_compact in (False, True):
            config = replace(CONFIG, is_residual_compact=is_residual_compact)
            model, inputs, targets = build(config, is_adopted=is_adopted)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                kept[is_adopted, is_residual_compact] = saved_bytes(
                    lambda model=model, inputs=inputs, targets=targets: model(inputs, targets, keep_logits=False)[1],
                    tuple(model.parameters()),
                )
    assert kept[True, True] < min(kept[True, False], kept[False, True]) <= kept[False, False]
    # an element costs the chain of a norm at least 8 bytes, the adopted one 2 at most, and 4 a row; the chain of a gate
    # keeps 2 bytes more
    tokens, num_norms = inputs.numel(), 2 * CONFIG.num_layers + 1
    of_norms = num_norms * tokens * (8 * CONFIG.dim - 2 * CONFIG.dim - 4)
    of_gates = CONFIG.num_layers * 2 * tokens * CONFIG.ffn_dim
    assert kept[False, True] - kept[True, True] >= of_norms + of_gates


@pytest.mark.parametrize("is_autocast", [False, True])
def test_the_adopted_model_compiles_in_one_graph(is_autocast: bool) -> None:
    model, inputs, targets = build(replace(CONFIG, num_layers=1, is_residual_compact=True), is_adopted=True)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = []
    for way in (compiled, model):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
            losses.append(way(inputs, targets)[1])
    torch.testing.assert_close(*losses, rtol=2**-8 if is_autocast else 1e-5, atol=0)
    losses[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
