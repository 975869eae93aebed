"""torchtitan's Llama 3 and Qwen 3 as its graph trainer runs them: FlexAttention is compiled, the rest is as in eager.

Written after torchtitan of June and July 2026 (commits d1f650285 and 28ed62e43, whose messages state the measurements):
`inductor_compilation` is "regional", weights are float32 and cast to bfloat16 where they are used, also on one card,
queries, keys and values are one product, rotary embeddings are float32, and the loss goes through the head in eight
pieces of the sequence, each with its backward. AdamW is fused, gradients are clipped.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

PIECES = 8


class Linear(nn.Linear):
    """A linear layer without bias that casts its weight."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply in bfloat16."""
        return F.linear(x, self.weight.bfloat16())


class Norm(nn.RMSNorm):
    """A norm that casts its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize in bfloat16."""
        return F.rms_norm(x, self.normalized_shape, self.weight.bfloat16(), self.eps)


class Block(nn.Module):
    """Attention and SwiGLU; Qwen 3 normalizes queries and keys, and turns halves of a head instead of neighbours."""

    def __init__(self, d: int, heads: int, kv: int, size: int, ffn: int, *, is_qwen: bool) -> None:
        super().__init__()
        self.heads, self.kv, self.size, self.is_qwen = heads, kv, size, is_qwen
        self.attention_norm, self.ffn_norm = Norm(d), Norm(d)
        self.wqkv, self.wo = Linear(d, (heads + 2 * kv) * size), Linear(heads * size, d)
        self.w1, self.w2, self.w3 = Linear(d, ffn), Linear(ffn, d), Linear(d, ffn)
        self.q_norm, self.k_norm = (Norm(size), Norm(size)) if is_qwen else (None, None)

    def forward(self, x: Tensor, turns: Tensor, mask: BlockMask, attend: Callable[..., Tensor]) -> Tensor:
        """Return the block's output."""
        batch, length, _ = x.shape
        qkv = self.wqkv(self.attention_norm(x)).view(batch, length, self.kv, -1, self.size)
        q, k, v = (
            one.reshape(batch, length, -1, self.size).contiguous()
            for one in qkv.split([self.heads // self.kv, 1, 1], dim=-2)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        turn = _turn_halves if self.is_qwen else _turn_neighbours
        q, k = turn(q, turns), turn(k, turns)
        out = attend(*(one.transpose(1, 2) for one in (q, k, v)), block_mask=mask, enable_gqa=True)
        x = x + self.wo(out.transpose(1, 2).contiguous().view(batch, length, -1))
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


def _turn_neighbours(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(3).type_as(x)


def _turn_halves(x: Tensor, turns: Tensor) -> Tensor:
    cos, sin = turns.chunk(2, dim=-1)
    y = x.float()
    first, second = y.chunk(2, dim=-1)
    return (y * cos + torch.cat((-second, first), dim=-1) * sin).type_as(x)


class Model(nn.Module):
    """The decoder up to the head, whose weight is the embedding's."""

    def __init__(self, sizes: dict[str, int], *, is_qwen: bool) -> None:
        super().__init__()
        d, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        size = 128 if is_qwen else d // heads
        self.embedding = nn.Embedding(sizes["vocab_size"], d)
        self.layers = nn.ModuleList(
            Block(d, heads, sizes["num_key_value_heads"], size, sizes["intermediate_size"], is_qwen=is_qwen)
            for _ in range(sizes["num_hidden_layers"])
        )
        self.norm = Norm(d)
        shape = (1, sizes["max_position_embeddings"], 1, 2 * size if is_qwen else size // 2)
        self.register_buffer("turns", torch.ones(shape, dtype=torch.float32 if is_qwen else torch.complex64))
        self.attend = torch.compile(flex_attention)

    def forward(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Return what the head gets; `table` is the embedding in bfloat16."""
        x = F.embedding(tokens, table)
        length = tokens.shape[1]
        mask = create_block_mask(lambda _b, _h, q, kv: q >= kv, None, None, length, length, device="cuda")
        for layer in self.layers:
            x = layer(x, self.turns, mask, self.attend)
        return self.norm(x)


def make_step(kind: str, sizes: dict[str, int], batch: int, scope: str) -> Callable[[], None]:
    """Return a function that makes one step."""
    length = sizes["max_position_embeddings"]
    with torch.device("cuda"):
        model = Model(sizes, is_qwen=kind == "torchtitan-qwen3")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)

    def step() -> None:
        tokens = torch.randint(0, sizes["vocab_size"], (batch, length), device="cuda")
        table = model.embedding.weight.bfloat16()  # once: the trainer removes casts that are there twice
        hidden = model(tokens, table)
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device="cuda")
        for place in range(0, length, length // PIECES):
            piece = slice(place, place + length // PIECES)
            x = hidden[:, piece].contiguous().detach().requires_grad_()
            logits = F.linear(x, table).flatten(0, 1).float()
            loss = F.cross_entropy(logits, tokens[:, piece].flatten(), reduction="sum") / tokens.numel()
            loss.backward()
            gradient[:, piece] = x.grad
        hidden.backward(gradient.bfloat16())
        if scope == "train_step":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()

    return step
