"""The engine under policies whose products round their inputs."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mezzotint as mz
from mezzotint.engine.products import _is_emulated
from mezzotint.errors import CheckpointError, PolicyError
from mezzotint.hardware.support import DeviceFacts
from mezzotint.lowprec.rounded_linear import RoundedLinear
from mezzotint.models.gpt import GPT
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.policy.grammar import parse_products

POLICIES = ["fp8-mixed", "fp8-rowwise", "fp8-blockwise", "mxfp8", "nvfp4", "fp16-products"]


class Wide(nn.Module):
    """Layers that float8 hardware could multiply, and two that it could not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.middle = nn.Linear(32, 48)
        self.back = nn.Linear(48, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = F.gelu(self.back(F.gelu(self.middle(F.gelu(self.first(x))))))
        return F.cross_entropy(self.last(hidden).float(), y)


def build(policy: str, seed: int = 0) -> tuple[Wide, mz.Engine]:
    torch.manual_seed(seed)
    model = Wide()
    return model, mz.Engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), policy=policy, max_grad_norm=1.0)


def train(model: Wide, engine: mz.Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
        with engine.forward():
            loss = model(x, x[:, :4].argmax(dim=1))
        engine.backward(loss)
        engine.update()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("policy", POLICIES)
def test_it_learns_about_as_float32_does(policy: str) -> None:
    exact = train(*build("float32"), range(80))
    model, engine = build(policy)
    losses = train(model, engine, range(80))
    assert losses != exact
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert abs(sum(losses[-10:]) - sum(exact[-10:])) < 0.2 * sum(exact[:10])
    rounded = [name for name, module in model.named_modules() if isinstance(module, RoundedLinear)]
    assert rounded == ["middle", "back"]
    assert "2 linear layers round the inputs of their products" in engine.decision.reasons[-1]


@pytest.mark.parametrize("policy", POLICIES)
def test_resume_is_bit_exact(policy: str) -> None:
    model, engine = build(policy)
    expected = train(model, engine, range(12))
    model, engine = build(policy)
    losses = train(model, engine, range(6))
    saved = copy.deepcopy(engine.state_dict())
    other, resumed = build(policy, seed=4)
    train(other, resumed, range(2))
    resumed.load_state_dict(saved)
    assert losses + train(other, resumed, range(6, 12)) == expected


def test_a_checkpoint_of_other_layers_is_refused() -> None:
    _, engine = build("fp8-mixed")
    state = engine.state_dict()
    state["products"] = {}
    with pytest.raises(CheckpointError, match="magnitudes of 0 linear layers"):
        engine.load_state_dict(state)


def test_a_model_without_such_layers_is_refused() -> None:
    model = nn.Linear(8, 4)
    with pytest.raises(PolicyError, match="multiples of 16"):
        mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), policy="mxfp8")
    assert type(model) is nn.Linear


def test_a_head_tied_to_an_embedding_stays_as_it_is() -> None:
    def types(is_head_tied: bool) -> tuple[type, int]:
        model = GPT(GPTConfig(vocab_size=64, dim=32, ffn_dim=64, num_layers=1, is_head_tied=is_head_tied))
        engine = mz.Engine(model, torch.optim.AdamW(model.parameters()), policy="fp8-mixed")
        assert engine.models["model"] is model  # alive: a collected engine gives the layers back
        return type(model.head), sum(isinstance(m, RoundedLinear) for m in model.modules())

    assert types(True) == (nn.Linear, 5)
    assert types(False) == (RoundedLinear, 6)


def test_weights_in_bfloat16_round_too() -> None:
    model = Wide()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = mz.Engine(model, optimizer, policy="bf16-master, products=e4m3(scale=tensor)")
    losses = train(model, engine, range(60))
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


H100 = DeviceFacts(kind="cuda", index=0, name="NVIDIA H100", compute_capability=(9, 0))
A100 = DeviceFacts(kind="cuda", index=0, name="NVIDIA A100", compute_capability=(8, 0))


@pytest.mark.parametrize(
    ("facts", "products", "has_torchao", "is_emulated", "why"),
    [
        (H100, "e4m3(gradients=e5m2, scale=tensor)", True, False, "by torchao"),
        (H100, "e4m3(scale=row)", True, False, "by torchao"),
        (H100, "e4m3(scale=row)", False, True, "pip install"),
        (H100, "e4m3(gradients=e5m2, scale=tensor, history=4)", True, True, "own magnitude only"),
        (H100, "e4m3(scale=block)", True, True, "torchao scales"),
        (H100, "mxfp8", True, True, "no training kernel"),
        (A100, "e4m3(scale=row)", True, True, "8.9"),
    ],
)
def test_what_is_real_and_what_is_emulated(
    facts: DeviceFacts,
    products: str,
    has_torchao: bool,
    is_emulated: bool,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mezzotint.engine.products.find_spec", lambda _: object() if has_torchao else None)
    found, reason = _is_emulated(parse_products(products), facts)
    assert found is is_emulated
    assert why in reason


@pytest.mark.filterwarnings("ignore")
def test_conversion_by_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion itself, with torchao told to emulate, since its kernels need a GPU."""
    float8 = pytest.importorskip("torchao.float8")
    from mezzotint.engine import products

    recipe = float8.Float8LinearConfig.from_recipe_name

    def emulated(name: str) -> object:
        return dataclasses.replace(recipe(name), emulate=True)

    monkeypatch.setattr(float8.Float8LinearConfig, "from_recipe_name", staticmethod(emulated))
    monkeypatch.setattr(products, "_is_emulated", lambda *_: (False, "said so"))
    model, engine = build("fp8-rowwise")
    losses = train(model, engine, range(30))
    ours = train(*build("float32"), range(1))
    assert abs(losses[0] - ours[0]) < 0.05
    assert losses[-1] < losses[0]
    assert type(model.middle).__name__ == "Float8Linear"
    assert type(model.first) is nn.Linear
    assert engine.state_dict()["products"] == {}


@pytest.mark.cuda
@pytest.mark.parametrize("policy", POLICIES)
def test_on_a_gpu(policy: str) -> None:
    torch.manual_seed(0)
    model = Wide().cuda()
    engine = mz.Engine(model, torch.optim.AdamW(model.parameters(), lr=1e-2), policy=policy)
    x = torch.randn(64, 8, device="cuda")
    losses = []
    for _ in range(20):
        with engine.forward():
            loss = model(x, x[:, :4].argmax(dim=1))
        engine.backward(loss)
        engine.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
