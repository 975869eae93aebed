"""Programs that run on any device: the ghost's operations are compared with those of a real run on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Step = Callable[[], None]


def _loop(model: nn.Module, loss: Callable[[], Tensor], optimizer: Any, clip: float | None = 1.0) -> Step:
    def step() -> None:
        loss().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def perceptron(device: str) -> Step:
    """Layer norm, GELU and a foreach AdamW."""
    model = nn.Sequential(nn.Linear(100, 200), nn.GELU(), nn.LayerNorm(200), nn.Linear(200, 10)).to(device)
    x, y = torch.randn(64, 100).to(device), torch.zeros(64, 10).to(device)
    return _loop(model, lambda: F.mse_loss(model(x), y), torch.optim.AdamW(model.parameters(), foreach=True))


def convolution(device: str) -> Step:
    """Convolutions with batch norm and pooling, SGD with momentum."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)
    ).to(device)
    x, y = torch.randn(4, 3, 8, 8).to(device), torch.zeros(4, dtype=torch.long).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
    return _loop(model, lambda: F.cross_entropy(model(x), y), optimizer)


def tied(device: str) -> Step:
    """An embedding whose weight is the head's too."""
    embed, head = nn.Embedding(1000, 64), nn.Linear(64, 1000, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head).to(device)
    assert model[0].weight is model[1].weight
    tokens = torch.arange(64).view(4, 16).to(device)
    optimizer = torch.optim.Adam(model.parameters(), foreach=True)
    return _loop(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()), optimizer)


def attention(device: str) -> Step:
    """Attention written out, with a causal mask."""
    query, out = nn.Linear(32, 96).to(device), nn.Linear(32, 32).to(device)
    model = nn.ModuleList([query, out])
    x = torch.randn(2, 16, 32).to(device)
    mask = torch.ones(16, 16, dtype=torch.bool).tril().to(device)

    def loss() -> Tensor:
        q, k, v = query(x).chunk(3, -1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -torch.inf).softmax(-1)
        return out(scores @ v).pow(2).mean()

    return _loop(model, loss, torch.optim.AdamW(model.parameters(), foreach=False))


def checkpointed(device: str, *, use_reentrant: bool) -> Step:
    """Activation checkpointing."""
    block, head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to(device), nn.Linear(32, 1).to(device)
    model = nn.ModuleList([block, head])
    x = torch.randn(8, 32).to(device).requires_grad_()

    def loss() -> Tensor:
        return head(checkpoint(block, x, use_reentrant=use_reentrant)).sum()

    return _loop(model, loss, torch.optim.SGD(model.parameters(), lr=0.1, foreach=True))


class Cube(torch.autograd.Function):
    """A custom function with saved tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """x**3."""
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """3 x**2."""
        (x,) = ctx.saved_tensors
        return gradient * x * x * 3


def custom_function(device: str) -> Step:
    """A custom autograd function, a hook, and gradient accumulation."""
    model = nn.Linear(16, 16).to(device)
    x = torch.randn(4, 16).to(device)
    optimizer = torch.optim.RMSprop(model.parameters(), foreach=False)
    hidden: list[Tensor] = []

    def loss() -> Tensor:
        y = Cube.apply(model(x))
        y.register_hook(lambda gradient: gradient * 0.5)
        hidden.append(y)
        return y.sum()

    def step() -> None:
        for _ in range(2):
            (loss() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        hidden.clear()

    return step


def penalty(device: str) -> Step:
    """A gradient of a gradient."""
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
    x = torch.randn(4, 8).to(device).requires_grad_()

    def loss() -> Tensor:
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (gradient.norm(dim=1) - 1).pow(2).mean()

    return _loop(model, loss, torch.optim.Adam(model.parameters(), foreach=True), clip=None)


def averaged(device: str) -> Step:
    """An exponential average of weights, in place, and a scheduler."""
    model = nn.Linear(16, 4).to(device)
    average = nn.Linear(16, 4).to(device).requires_grad_(False)
    x = torch.randn(4, 16).to(device)
    optimizer = torch.optim.Adagrad(model.parameters(), foreach=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.parameters(), strict=True):
                old.lerp_(new, 0.1)

    return step


PROGRAMS: dict[str, Callable[[str], Step]] = {
    "perceptron": perceptron,
    "convolution": convolution,
    "tied": tied,
    "attention": attention,
    "checkpointed": lambda device: checkpointed(device, use_reentrant=False),
    "checkpointed, reentrant": lambda device: checkpointed(device, use_reentrant=True),
    "custom function": custom_function,
    "penalty": penalty,
    "averaged": averaged,
}


def grouped(device: str) -> Step:
    """Transposed convolution, group norm, channels last."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.SiLU(), nn.ConvTranspose2d(8, 3, 3, stride=2)
    ).to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 9, 9).to(device)
    return _loop(model, lambda: F.l1_loss(model(x), x), torch.optim.Adamax(model.parameters(), foreach=True))


PROGRAMS["group norm"] = grouped


def graph(device: str) -> Step:
    """Messages along the edges of a graph: gather, index_add, scatter."""
    first, second = nn.Linear(8, 16).to(device), nn.Linear(16, 3).to(device)
    model = nn.ModuleList([first, second])
    x, source = torch.randn(20, 8).to(device), (torch.arange(60) % 20).to(device)
    target, labels = (torch.arange(60) * 7 % 20).to(device), (torch.arange(20) % 3).to(device)

    def loss() -> Tensor:
        hidden = first(x).relu()
        messages = torch.zeros_like(hidden).index_add(0, target, hidden[source])
        degree = torch.zeros(20, device=device).scatter_add(0, target, torch.ones(60, device=device))
        return F.nll_loss(F.log_softmax(second(messages / degree.clamp(min=1).unsqueeze(1)), 1), labels)

    return _loop(model, loss, torch.optim.NAdam(model.parameters(), foreach=True))


def autoencoder(device: str) -> Step:
    """A variational autoencoder with upsampling, time features and a parametrized weight."""
    down = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, stride=2, padding=1)).to(device)
    up = nn.Conv2d(4, 3, 3, padding=1).to(device)
    model = nn.ModuleList([down, up])
    x, noise = torch.randn(2, 3, 8, 8).to(device), torch.randn(2, 4, 4, 4).to(device)

    def loss() -> Tensor:
        mean, log_variance = down(x).chunk(2, 1)
        z = mean + noise * (0.5 * log_variance).exp()
        image = up(F.interpolate(z, scale_factor=2, mode="nearest"))
        return F.smooth_l1_loss(image, x) - 0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()

    return _loop(model, loss, torch.optim.RAdam(model.parameters(), foreach=True))


class NewtonSchulz(torch.optim.Optimizer):
    """A custom optimizer that orthogonalises updates."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Momentum, five iterations, and the update."""
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                update = state["momentum"].lerp_(weight.grad, 0.1)
                update = update / (update.norm() + 1e-7)
                for _ in range(5):
                    product = update @ update.T
                    update = 3.4445 * update + (-4.775 * product + 2.0315 * product @ product) @ update
                weight.add_(update, alpha=-group["lr"])


def orthogonalised(device: str) -> Step:
    """Two losses of a contrastive model, and the custom optimizer."""
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Tanh(), nn.Linear(16, 16, bias=False)).to(device)
    x, y = torch.randn(8, 16).to(device), torch.randn(8, 16).to(device)

    def loss() -> Tensor:
        a, b = F.normalize(model(x), dim=1), F.normalize(model(y), dim=1)
        scores = a @ b.T / 0.07
        places = torch.arange(8, device=device)
        return (F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)) / 2

    return _loop(model, loss, NewtonSchulz(model.parameters()), clip=None)


PROGRAMS |= {"graph": graph, "autoencoder": autoencoder, "orthogonalised": orthogonalised}
