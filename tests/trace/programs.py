"""Training programs of many kinds, each as a function that builds a step and says which models it trains."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from mezzotint.models.gpt import GPT
from mezzotint.models.gpt_config import GPTConfig


@dataclass
class Program:
    """`step()` runs one training step and returns its loss; `models` are what it trains."""

    step: Callable[[], Tensor]
    models: list[nn.Module]


def language_model() -> Program:
    """GPT under bfloat16 autocast with AdamW and clipping."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=96, block_size=32, num_layers=2, num_heads=2, dim=32, ffn_dim=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> Tensor:
        ids = torch.randint(0, 96, (4, 33))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, loss = model(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return Program(step, [model])


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        layers = (nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mlp = nn.Sequential(*layers)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        x = x + self.drop(self.attention(normed, normed, normed, need_weights=False)[0])
        return x + self.mlp(x)


def vision_transformer() -> Program:
    """Patches, attention with dropout, float16 with a gradient scaler and a fused optimizer."""
    torch.manual_seed(1)
    blocks = (_Block(32), _Block(32))
    model = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.Flatten(2), _Transposed(), *blocks, _Mean(), nn.Linear(32, 5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", growth_interval=4)

    def step() -> Tensor:
        images, labels = torch.randn(4, 3, 16, 16), torch.randint(0, 5, (4,))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return Program(step, [model])


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def convolutional() -> Program:
    """Convolutions with batch norm, gradient accumulation over two micro-batches, SGD with momentum, foreach."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, foreach=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def step() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for _ in range(2):
            images, labels = torch.randn(4, 3, 16, 16), torch.randint(0, 4, (4,))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(images), labels) / 2
            loss.backward()
            total += loss.detach()
        optimizer.step()
        scheduler.step()
        return total

    return Program(step, [model])


def recurrent() -> Program:
    """An LSTM, with LBFGS's closure on a second, tiny model."""
    torch.manual_seed(3)
    model = nn.LSTM(8, 16, num_layers=2, dropout=0.1, batch_first=True)
    head = nn.Linear(16, 8)
    fit = nn.Linear(8, 8)
    optimizer = torch.optim.RMSprop([*model.parameters(), *head.parameters()], lr=1e-3)
    lbfgs = torch.optim.LBFGS(fit.parameters(), max_iter=3)

    def step() -> Tensor:
        x = torch.randn(4, 7, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, _ = model(x[:, :-1])
            loss = F.mse_loss(head(out).float(), x[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        def closure() -> Tensor:
            lbfgs.zero_grad()
            value = F.mse_loss(fit(x), x)
            value.backward()
            return value

        lbfgs.step(closure)
        return loss.detach()

    return Program(step, [model, head, fit])


def adversarial() -> Program:
    """A GAN: two models, two optimizers, a gradient penalty through autograd.grad, one gradient scaler."""
    torch.manual_seed(4)
    generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
    critic = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    for_critic = torch.optim.Adam(critic.parameters(), 1e-3, betas=(0.0, 0.9))
    for_generator = torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.0, 0.9))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step() -> Tensor:
        real = torch.randn(8, 8)
        with torch.autocast("cpu", dtype=torch.float16):
            fake = generator(torch.randn(8, 4))
            loss = critic(fake.detach()).float().mean() - critic(real).float().mean()
        middle = (0.5 * real + 0.5 * fake.detach().float()).requires_grad_(True)
        (slope,) = torch.autograd.grad(scaler.scale(critic(middle).sum()), middle, create_graph=True)
        loss = loss + ((slope / scaler.get_scale()).norm(2, dim=1) - 1).square().mean()
        for_critic.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(for_critic)
        with torch.autocast("cpu", dtype=torch.float16):
            other = -critic(generator(torch.randn(8, 4))).float().mean()
        for_generator.zero_grad()
        scaler.scale(other).backward()
        scaler.step(for_generator)
        scaler.update()
        return loss.detach() + other.detach()

    return Program(step, [generator, critic])


def checkpointed() -> Program:
    """Activation checkpointing in both modes, with dropout, and a tied weight."""
    torch.manual_seed(5)
    blocks = nn.ModuleList([_Block(16) for _ in range(4)])
    embedding = nn.Embedding(32, 16)
    head = nn.Linear(16, 32, bias=False)
    head.weight = embedding.weight
    optimizer = torch.optim.AdamW([*blocks.parameters(), *embedding.parameters()], lr=1e-3)

    def step() -> Tensor:
        ids = torch.randint(0, 32, (2, 9))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = embedding(ids[:, :-1])
            for number, block in enumerate(blocks):
                x = checkpoint(block, x, use_reentrant=number % 2 == 0)
            loss = F.cross_entropy(head(x).float().flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Program(step, [blocks, embedding])


class Scaled(torch.autograd.Function):
    """A product whose backward is written by hand."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def handmade() -> Program:
    """A custom Function, hooks on tensors and weights, pure bfloat16 weights in a second model, an EMA."""
    torch.manual_seed(6)
    weight = nn.Parameter(torch.randn(8, 8))
    weight.register_hook(lambda grad: grad * 0.5)
    low = nn.Linear(8, 8).to(torch.bfloat16)
    average = [one.detach().clone() for one in low.parameters()]
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for_low = torch.optim.AdamW(low.parameters(), lr=1e-2)
    holder = nn.Module()
    holder.weight = weight

    def step() -> Tensor:
        x = torch.randn(4, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = Scaled.apply(x, weight)
        y.register_hook(lambda grad: grad.clamp(-1, 1))
        loss = (low(y).float() - x).square().mean()
        optimizer.zero_grad()
        for_low.zero_grad()
        loss.backward()
        optimizer.step()
        for_low.step()
        with torch.no_grad():
            for one, other in zip(average, low.parameters(), strict=True):
                one.lerp_(other, 0.1)
        return loss.detach()

    return Program(step, [holder, low])


EAGER = {
    function.__name__: function
    for function in (
        language_model, vision_transformer, convolutional, recurrent, adversarial, checkpointed, handmade,
    )
}  # fmt: skip
