"""Another solution of CS336's first assignment (GAOYUEtianc/Stanford-CS336-assignments), where it differs in cost.

Tokens are looked up by a product with one-hot rows, scores pass `nan_to_num`, rotary tables are as wide as a head and
gathered in every block, and the forward pass keeps what backward would need even where backward is not measured.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plan_programs import cs336


class RMSNorm(cs336.RMSNorm):
    """Divides by the root instead of multiplying with its inverse."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d)."""
        dtype = x.dtype
        x = x.to(torch.float32)
        normed = x / torch.sqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-5)
        return (normed * self.weight).to(dtype)


class RotaryEmbedding(nn.Module):
    """Tables hold every angle twice; each block gathers the rows that it needs."""

    def __init__(self, length: int, d: int) -> None:
        super().__init__()
        angle = torch.outer(torch.arange(length).float(), 10000.0 ** -(torch.arange(0, d, 2) / d))
        for name, table in (("cos", angle.cos()), ("sin", angle.sin())):
            self.register_buffer(name, table.repeat_interleave(2, dim=-1), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(..., T, d), (T,)."""
        cos, sin = self.cos[positions], self.sin[positions]
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * cos[..., 0::2] - odd * sin[..., 0::2], even * sin[..., 1::2] + odd * cos[..., 1::2])
        return torch.stack(turned, dim=-1).flatten(-2)


class Attention(cs336.Attention):
    """Masked in place of `where`, and cleaned of NaN."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d)."""
        batch, length, _ = x.shape
        q, k, v = (
            one(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(length, device=x.device)
        q, k = self.rope(q, positions), self.rope(k, positions)
        mask = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        scores = torch.einsum("...nd,...md->...nm", q, k) / k.shape[-1] ** 0.5
        weights = torch.nan_to_num(cs336.softmax(scores.masked_fill(~mask, float("-inf"))), nan=0.0)
        out = torch.einsum("...nm,...mv->...nv", weights, v)
        return self.output_proj(out.transpose(1, 2).contiguous().view(batch, length, -1))


class LM(cs336.LM):
    """The same shapes, with the parts above."""

    def __init__(self, layers: int, d: int, heads: int, ffn: int, vocab: int, length: int) -> None:
        super().__init__(layers, d, heads, ffn, vocab, length)
        rope = RotaryEmbedding(length, d // heads)
        for block in self.layers:
            block.attn, block.ln1, block.ln2 = Attention(d, heads, rope), RMSNorm(d), RMSNorm(d)
        self.ln_final = RMSNorm(d)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to (B, T, V)."""
        rows = F.one_hot(tokens, num_classes=self.embedding.shape[0]).to(self.embedding.dtype)
        x = torch.einsum("...n,nd->...d", rows, self.embedding)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.ln_final(x))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over rows."""
    shifted = logits - logits.max(dim=-1, keepdim=True).values
    total = shifted.exp().sum(dim=-1).log()
    return (total - shifted.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()


def make_step(config: tuple[int, int, int, int, int, int], batch: int, mode: str, scope: str) -> Callable[[], None]:
    """Return the step of scope fwd or fwd_bwd."""
    model = LM(*config).to("cuda")
    tokens = torch.randint(0, config[4], (batch, config[5]), device="cuda")
    targets = torch.randint(0, config[4], (batch, config[5]), device="cuda")
    kept = []

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, mode == "amp-bf16"):
            logits = model(tokens)
            kept[:] = [logits]  # lives until the next step has its own
            if scope != "fwd":
                loss = cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
        if scope != "fwd":
            loss.backward()
            model.zero_grad()
        torch.cuda.synchronize()

    return step
