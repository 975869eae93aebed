"""Models of other kinds than the language model, of a size that a CPU trains, in plain torch."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.models.gpt import GPT, rotate
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.modules.rms_norm import RMSNorm
from mezzotint.modules.swiglu import SwiGLU


class ViT(nn.Module):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): 6 layers of 192, patches of 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 192, 16, stride=16)
        self.positions = nn.Parameter(torch.randn(1, 64, 192) * 0.02)
        layer = nn.TransformerEncoderLayer(192, 3, 768, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(192, 100)

    def example(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(16, 3, 128, 128, generator=generator), torch.randint(0, 100, (16,), generator=generator)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return F.cross_entropy(self.head(self.layers(x).mean(1)).float(), labels)


class Residual(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for _ in range(2))
        self.way = nn.Conv2d(before, after, 1, stride, bias=False) if before != after else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(x)))
        return F.relu(self.norms[1](self.second(hidden)) + self.way(x))


class ResNet(nn.Module):
    """A residual network (He et al. 2016, arXiv 1512.03385) for 32 x 32 pictures: 64, 128 and 256 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.stages = nn.Sequential(Residual(64, 64, 1), Residual(64, 128, 2), Residual(128, 256, 2))
        self.head = nn.Linear(256, 10)

    def example(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(32, 3, 32, 32, generator=generator), torch.randint(0, 10, (32,), generator=generator)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stages(F.relu(self.stem(images)))
        return F.cross_entropy(self.head(x.mean((2, 3))).float(), labels)


class LanguageLSTM(nn.Module):
    """Two LSTM layers of 512 over 256 symbols, as language was modelled before transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 512)
        self.layers = nn.LSTM(512, 512, num_layers=2, batch_first=True)
        self.head = nn.Linear(512, 256)

    def example(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = torch.randint(0, 256, (32, 65), generator=generator)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        hidden, _ = self.layers(self.embed(inputs))
        return F.cross_entropy(self.head(hidden).float().flatten(0, 1), targets.flatten())


class PlainAttention(GPT):
    """The language model with attention written out: scores, mask, softmax, sum."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.attention.__class__ = _WrittenOut


class _WrittenOut(nn.Module):
    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = rotate(q, tables) @ rotate(k, tables).transpose(-2, -1) / (D // self.num_heads) ** 0.5
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(v.dtype)
        return self.out((weights @ v).transpose(1, 2).reshape(B, T, D))


def fused_gpt(config: GPTConfig) -> GPT:
    """Return the language model with mezzotint's modules and a residual stream in the compute format."""
    return GPT(replace(config, is_residual_compact=True), norm=RMSNorm, feed_forward=SwiGLU)
