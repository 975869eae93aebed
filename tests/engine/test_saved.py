"""Activations that wait for backward in bfloat16."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mezzotint as mz
from mezzotint.engine.saved import Packed, SavedActivations
from mezzotint.errors import PolicyError
from mezzotint.models.gpt import GPT
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.training.memory import measure_step

CONFIG = GPTConfig(vocab_size=64, dim=64, ffn_dim=128, num_layers=3, block_size=64)


def gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(CONFIG)


def ids() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 64, (4, 65), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(policy: str, model: nn.Module | None = None) -> tuple[float, list[Tensor]]:
    model = model or gpt()
    engine = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), policy=policy)
    with engine.forward():
        _, loss = model(*ids(), keep_logits=False)
    engine.backward(loss)
    return loss.item(), [p.grad.clone() for p in model.parameters()]


def test_forward_is_float32s_and_gradients_are_near() -> None:
    """Each gradient passes a few rounded factors, each off by at most 2^-9: their norms differ by under a percent."""
    loss, grads = gradients("float32")
    saved_loss, saved_grads = gradients("bf16-saved")
    assert saved_loss == loss
    for one, other in zip(saved_grads, grads, strict=True):
        error = float((one - other).norm() / other.norm())
        assert 0 < error < 0.01


def test_it_halves_what_waits_for_backward() -> None:
    def peak(policy: str) -> int:
        model = gpt()
        engine = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), policy=policy)

        def forward() -> Tensor:
            with engine.forward():
                _, loss = model(*ids(), keep_logits=False)
            return loss

        engine.backward(forward())
        engine.update()
        return measure_step(forward, engine.backward, torch.device("cpu")).activations_bytes

    assert peak("bf16-saved") < 0.6 * peak("float32")


def packed(run: object) -> list[Tensor | Packed]:
    """Return what the hooks made of each tensor that `run` kept."""
    kept: list[Tensor | Packed] = []
    context = SavedActivations(())
    original = context._pack
    context._hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(original(t)) or kept[-1],
        lambda p: p.restore() if isinstance(p, Packed) else p,
    )
    with context:
        run()
    return kept


def test_what_is_left_alone() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(4, 8)
    hidden = x @ weight

    def attention() -> Tensor:
        q = (hidden * 1).view(1, 1, 4, 8)
        return F.scaled_dot_product_attention(q, q, q)

    assert not any(isinstance(p, Packed) for p in packed(lambda: F.linear(x, weight)))  # the user's data and a weight
    assert not any(isinstance(p, Packed) for p in packed(lambda: F.cross_entropy(x, torch.zeros(4, dtype=torch.long))))
    kept = packed(lambda: hidden.log_softmax(-1).sum())
    assert not any(isinstance(p, Packed) for p in kept)
    kinds = [isinstance(p, Packed) for p in packed(attention)]
    assert sum(kinds) == 4, "query, key, value and output; not the log-sum-exp"
    assert not all(kinds)
    double = hidden.double()
    assert not any(isinstance(p, Packed) for p in packed(lambda: double * double))


def test_a_tensor_kept_twice_is_rounded_once() -> None:
    hidden = (torch.randn(16, 8, requires_grad=True) * 1).contiguous()
    kept = [p for p in packed(lambda: (hidden.exp(), hidden * hidden, hidden.t() @ hidden)) if isinstance(p, Packed)]
    wanted = hidden.detach().bfloat16().flatten()
    stores = {p.rounded.data_ptr() for p in kept if torch.equal(p.rounded, wanted)}
    assert len(kept) >= 5
    assert len(stores) == 1


def test_a_change_in_place_is_another_tensor() -> None:
    hidden = torch.randn(16, 8, requires_grad=True) * 1

    def run() -> Tensor:
        first = hidden.sin()
        with torch.no_grad():
            hidden.mul_(2)
        return first + hidden.cos()

    before = hidden.detach().clone()
    first, second = (p for p in packed(run) if isinstance(p, Packed))
    assert torch.equal(first.restore(), before.bfloat16().float())
    assert torch.equal(second.restore(), (2 * before).bfloat16().float())


@pytest.mark.parametrize("shape", ["transposed", "slice", "expanded", "channels_last", "empty"])
def test_every_layout_comes_back(shape: str) -> None:
    base = torch.randn(2, 3, 4, 5, requires_grad=True) * 1
    tensor = {
        "transposed": lambda: base.transpose(1, 3),
        "slice": lambda: base[:, 1:, ::2],
        "expanded": lambda: base[:, :1].expand(2, 3, 4, 5),
        "channels_last": lambda: base.contiguous(memory_format=torch.channels_last),
        "empty": lambda: base[:0],
    }[shape]()
    kept = next(p for p in packed(tensor.sin) if isinstance(p, Packed))
    back = kept.restore()
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor.detach().bfloat16().float())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of objects that are looked at among all others
def test_nothing_is_kept_alive() -> None:
    model = gpt()
    engine = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), policy="bf16-saved")
    for _ in range(2):
        with engine.forward():
            _, loss = model(*ids(), keep_logits=False)
        engine.backward(loss)
        engine.update()
    del loss
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) is Packed]


def test_under_autocast_and_checkpointing() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gpt()

        def forward(self, *args: Tensor, **kwargs: bool) -> tuple[None, Tensor]:
            return checkpoint(self.inner, *args, use_reentrant=False, **kwargs)

    plain, mixed = gradients("bf16-mixed"), gradients("bf16-mixed, saved=bf16")
    assert plain[0] == mixed[0]
    for one, other in zip(mixed[1], plain[1], strict=True):
        assert float((one - other).norm() / other.norm()) < 0.01
    loss, grads = gradients("bf16-saved", Checkpointed())
    assert loss == gradients("float32")[0]
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_refusals() -> None:
    model = gpt()
    with pytest.raises(PolicyError, match="saved=bfloat16 with params=bfloat16"):
        mz.Engine(model, torch.optim.SGD(model.parameters()), policy="bf16-master, saved=bf16")
    with pytest.raises(PolicyError, match="saved=float16 is refused"):
        mz.Policy(saved="float16")
