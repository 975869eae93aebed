"""The hand-written loops that the engine must equal, and the toy problems they train on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ToyModel(nn.Module):
    """Two linear layers around a norm and dropout; returns a scalar loss."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(0.1)
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.last(self.drop(F.gelu(self.norm(self.first(x)))))
        return out, F.cross_entropy(out, y)


def toy(seed: int = 0) -> tuple[ToyModel, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = ToyModel()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(size, 8, generator=generator)
    return x, x[:, :4].argmax(dim=1)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def spoil(model: nn.Module, steps: set[int], step: int) -> None:
    """Make one gradient infinite at the given steps, as an overflow in backward would."""
    if step in steps:
        parameter = next(model.parameters())
        assert parameter.grad is not None
        parameter.grad[0] = float("inf")
