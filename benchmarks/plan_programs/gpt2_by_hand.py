"""GPT-2 as a book builds it (S. Raschka, Build a Large Language Model From Scratch, chapter 4): layers by hand.

Layer normalisation and GELU are written out, projections have no bias, attention is masked scores with dropout, and the
head is a weight of its own.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DROPOUT = 0.1


class LayerNorm(nn.Module):
    """Mean and variance as operations of their own."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(d)), nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d)."""
        mean = x.mean(dim=-1, keepdim=True)
        normed = (x - mean) / torch.sqrt(x.var(dim=-1, keepdim=True, unbiased=False) + 1e-5)
        return self.scale * normed + self.shift


class GELU(nn.Module):
    """The approximation by tanh, written out."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        inner = torch.sqrt(torch.tensor(2.0 / math.pi)) * (x + 0.044715 * torch.pow(x, 3))
        return 0.5 * x * (1 + torch.tanh(inner))


class Attention(nn.Module):
    """Causal attention with a mask that is kept as a buffer."""

    def __init__(self, d: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.out, self.dropout = nn.Linear(d, d), nn.Dropout(DROPOUT)
        self.register_buffer("mask", torch.ones(length, length).triu(diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d)."""
        batch, length, d = x.shape
        k, q, v = (
            one(x).view(batch, length, self.heads, d // self.heads).transpose(1, 2)
            for one in (self.key, self.query, self.value)
        )
        scores = q @ k.transpose(2, 3)
        scores.masked_fill_(self.mask.bool()[:length, :length], -torch.inf)
        weights = self.dropout(torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1))
        return self.out((weights @ v).transpose(1, 2).contiguous().view(batch, length, d))


class Block(nn.Module):
    """Normalise, attend, add; normalise, two layers, add."""

    def __init__(self, d: int, heads: int, length: int) -> None:
        super().__init__()
        self.attention, self.norm1, self.norm2 = Attention(d, heads, length), LayerNorm(d), LayerNorm(d)
        self.layers = nn.Sequential(nn.Linear(d, 4 * d), GELU(), nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d)."""
        x = self.dropout(self.attention(self.norm1(x))) + x
        return self.dropout(self.layers(self.norm2(x))) + x


class GPT(nn.Module):
    """Returns the loss of every next token."""

    def __init__(self, vocab: int = 50257, length: int = 1024, d: int = 768, heads: int = 12, layers: int = 12) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, d), nn.Embedding(length, d)
        self.dropout = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(Block(d, heads, length) for _ in range(layers)))
        self.norm, self.head = LayerNorm(d), nn.Linear(d, vocab, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """(B, T), (B, T)."""
        x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        logits = self.head(self.norm(self.blocks(self.dropout(x))))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
