"""A decoder-only language model in plain torch: RMSNorm, rotary positions, SDPA, SwiGLU, and a loss in float32.

What is in float32 whatever the precision around it, and why:
- rotary positions: bfloat16 has 8 significant bits, so positions above 256 would fall together. The tables come from
  elementwise float32 operations, which autocast leaves alone; a matmul or einsum would be lowered.
- the loss, in chunks of rows: `mezzotint.models.loss` says why and how.

Norms and feed-forward layers are passed as classes, so that a model may adopt others that have the same parameters.

Shapes: B batch, T tokens, D model width, H heads, K head width, F feed-forward width, V vocabulary, N = B T.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.models.gpt_config import GPTConfig
from mezzotint.models.loss import chunked_loss

EPS = 1e-6  # of all norms
Layer = Callable[..., nn.Module]


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the normalised input, in its own dtype on the CPU and in float32 under CUDA autocast."""
        return F.rms_norm(x_BTD, (x_BTD.shape[-1],), self.weight.to(x_BTD.dtype), self.eps)


def rotary_tables(num_tokens: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each position and frequency, float32 (T, K/2) (Su et al. 2021, arXiv 2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies = torch.full_like(exponents, base) ** -exponents
    angles_TK = torch.arange(num_tokens, device=device, dtype=torch.float32)[:, None] * frequencies[None, :]
    return angles_TK.cos(), angles_TK.sin()


def rotate(x_BHTK: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[k], x[k + K/2]) by its position's angle, in float32; the result has the dtype of the input.

    float64 stays float64, for references.
    """
    cos, sin = tables
    left, right = (x_BHTK if x_BHTK.dtype == torch.float64 else x_BHTK.float()).chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).to(x_BHTK.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Return what each token gathers from itself and the tokens before it."""
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        q_BHTK, k_BHTK, v_BHTK = qkv.unbind(0)
        y_BHTK = F.scaled_dot_product_attention(
            rotate(q_BHTK, tables),
            rotate(k_BHTK, tables),
            v_BHTK,
            is_causal=True,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))
        return out


class FeedForward(nn.Module):
    """SwiGLU: out(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, ffn_dim, bias=False)
        self.up = nn.Linear(dim, ffn_dim, bias=False)
        self.out = nn.Linear(ffn_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the layer's output, (B, T, D)."""
        out: Tensor = self.out(F.silu(self.gate(x_BTD)) * self.up(x_BTD))
        return out


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig, norm: Layer, feed_forward: Layer) -> None:
        super().__init__()
        self.attention_norm = norm(config.dim, eps=EPS)
        self.attention = Attention(config)
        self.feed_forward_norm = norm(config.dim, eps=EPS)
        self.feed_forward = feed_forward(config.dim, config.ffn_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Return the residual stream after this layer, (B, T, D)."""
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), tables))
        out: Tensor = x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return out


class GPT(nn.Module):
    """The language model. `logits, loss = model(input_ids, target_ids)`.

    `norm(dim, eps=...)` and `feed_forward(dim, ffn_dim)` make the layers of these kinds, with parameters called as
    those of `RMSNorm` and `FeedForward` are; matrices are drawn anew, whatever they were made as.
    """

    def __init__(self, config: GPTConfig, *, norm: Layer = RMSNorm, feed_forward: Layer = FeedForward) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, norm, feed_forward) for _ in range(config.num_layers))
        self.norm = norm(config.dim, eps=EPS)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self._initialise()
        if config.is_head_tied:
            self.head.weight = self.embed.weight

    def _initialise(self) -> None:
        """Draw matrices from a normal distribution; what ends in the residual stream is smaller the deeper the model.

        As in GPT-2 (Radford et al. 2019, section 2.3): 1 / sqrt(number of residual additions).
        """
        residual_std = 0.02 / (2 * self.config.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                nn.init.normal_(parameter, std=residual_std if name.endswith("out.weight") else 0.02)

    def forward(
        self, input_ids: Tensor, target_ids: Tensor | None = None, *, keep_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return logits (B, T, V) in the compute dtype, and the mean loss in nats per token, float32, of the targets.

        `input_ids` and `target_ids` are (B, T); a target of -100 does not count. Without targets the loss is None.
        With `keep_logits=False` the logits are None too and exist for one chunk of rows at a time: less memory, at the
        price of the head's forward matmul a second time in backward.

        Raises ValueError for more tokens than the block size.
        """
        B, T = input_ids.shape
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens exceed the block size, {self.config.block_size}; pass shorter sequences")
        tables = rotary_tables(T, self.config.head_dim, self.config.rope_base, input_ids.device)
        x_BTD = self.dropout(self._compact(self.embed(input_ids)))
        for block in self.blocks:
            x_BTD = block(x_BTD, tables)
        x_BTD = self.norm(x_BTD)
        if target_ids is None:
            return self.head(x_BTD), None
        if keep_logits:
            logits = self.head(x_BTD)
            return logits, chunked_loss(logits.view(B * T, -1), None, target_ids.reshape(-1), self._chunk_rows)
        hidden_ND = x_BTD.reshape(B * T, -1)
        return None, chunked_loss(hidden_ND, self.head.weight, target_ids.reshape(-1), self._chunk_rows)

    def _compact(self, x_BTD: Tensor) -> Tensor:
        """Return the embedding as the residual stream begins: in the autocast dtype, where that is wanted."""
        kind = x_BTD.device.type
        is_cast = self.config.is_residual_compact and torch.is_autocast_enabled(kind)
        return x_BTD.to(torch.get_autocast_dtype(kind)) if is_cast else x_BTD

    @property
    def _chunk_rows(self) -> int:
        return self.config.loss_chunk_rows

    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Tensor,
        *,
        num_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return prompt (B, T) and `num_tokens` sampled tokens behind it; the block's latest tokens are the context.

        Temperature 0 takes the likeliest token. Raises ValueError for an empty prompt, a negative temperature or a
        `top_k` below 1.
        """
        if prompt_ids.shape[1] == 0 or not temperature >= 0:
            raise ValueError("generate needs a prompt of at least one token and a temperature of 0 or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} is refused; pass at least 1, or None for all tokens")
        was_training = self.training
        self.eval()
        ids = prompt_ids
        for _ in range(num_tokens):
            logits, _ = self(ids[:, -self.config.block_size :])
            scores = logits[:, -1].float()
            if top_k is not None:
                least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
                scores = scores.masked_fill(scores < least, float("-inf"))
            if temperature == 0:
                chosen = scores.argmax(dim=-1, keepdim=True)
            else:
                chosen = torch.multinomial(torch.softmax(scores / temperature, dim=-1), 1, generator=generator)
            ids = torch.cat((ids, chosen), dim=1)
        self.train(was_training)
        return ids

    @property
    def num_parameters(self) -> int:
        """The number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def flops_per_token(self) -> int:
        """FLOPs of forward and backward for one token, 6 (P + 2 L T D) with P the weights of all matmuls.

        Chowdhery et al. 2022 (PaLM, arXiv 2204.02311), appendix B: attention counts in full, without causality.
        """
        config = self.config
        matmuls = sum(p.numel() for name, p in self.blocks.named_parameters() if p.dim() == 2)
        matmuls += config.vocab_size * config.dim
        return 6 * (matmuls + 2 * config.num_layers * config.block_size * config.dim)
