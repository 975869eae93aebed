"""The language model of Stanford's CS336, as its students measured it: einsum linears, RMSNorm, RoPE, SwiGLU.

Attention is written out (scores, mask, softmax by hand), the cross entropy too; AdamW updates one parameter at a time.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T without bias, by einsum."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return torch.einsum("...i,oi->...o", x, self.weight)


class RMSNorm(nn.Module):
    """Normalised in float32, back in the dtype that came in."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d)."""
        dtype = x.dtype
        x = x.to(torch.float32)
        rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (self.weight * (x * rms)).to(dtype)


class RotaryEmbedding(nn.Module):
    """Rotation of interleaved pairs; tables in float32."""

    def __init__(self, length: int, d: int) -> None:
        super().__init__()
        frequency = 10000.0 ** -(torch.arange(0, d, 2) / d)
        angle = torch.outer(torch.arange(length).float(), frequency)
        self.register_buffer("cos_sin", torch.stack((angle.cos(), angle.sin())), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(..., T, d), (T,)."""
        x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = self.cos_sin[:, positions, :]
        return torch.stack((cos * x1 - sin * x2, sin * x1 + cos * x2), dim=-1).flatten(-2)


def softmax(x: Tensor) -> Tensor:
    """Over the last axis, by hand; the shifted scores live until the end, as in the course's `nn_utils`."""
    shifted = x - torch.max(x, dim=-1, keepdim=True)[0]
    exps = torch.exp(shifted)
    return exps / torch.sum(exps, dim=-1, keepdim=True)


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, d: int, heads: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.heads, self.rope = heads, rope
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d)."""
        batch, length, _ = x.shape
        q, k, v = (
            one(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for one in (self.q_proj, self.k_proj, self.v_proj)
        )
        positions = torch.arange(length, device=x.device)
        q, k = self.rope(q, positions), self.rope(k, positions)
        seq = torch.arange(length, device=x.device)
        mask = (seq[:, None] >= seq[None, :])[None, None]
        scores = torch.einsum("...qd,...kd->...qk", q, k) / math.sqrt(k.shape[-1])
        scores = torch.where(mask, scores, float("-inf"))
        out = torch.einsum("...qk,...kd->...qd", softmax(scores), v)
        return self.output_proj(out.transpose(1, 2).contiguous().view(batch, length, -1))


class Block(nn.Module):
    """Pre-norm block with SwiGLU."""

    def __init__(self, d: int, heads: int, ffn: int, rope: RotaryEmbedding) -> None:
        super().__init__()
        self.attn, self.ln1, self.ln2 = Attention(d, heads, rope), RMSNorm(d), RMSNorm(d)
        self.w1, self.w2, self.w3 = Linear(d, ffn), Linear(ffn, d), Linear(d, ffn)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, d)."""
        x = x + self.attn(self.ln1(x))
        h = self.ln2(x)
        gate = self.w1(h)
        return x + self.w2(gate * torch.sigmoid(gate) * self.w3(h))


class LM(nn.Module):
    """The whole model; `group` blocks at a time are checkpointed if it is not 0."""

    def __init__(self, layers: int, d: int, heads: int, ffn: int, vocab: int, length: int, group: int = 0) -> None:
        super().__init__()
        self.group = group
        self.embedding = nn.Parameter(torch.empty(vocab, d))
        rope = RotaryEmbedding(length, d // heads)
        self.layers = nn.ModuleList(Block(d, heads, ffn, rope) for _ in range(layers))
        self.ln_final, self.lm_head = RMSNorm(d), Linear(d, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) to (B, T, V)."""
        x = self.embedding[tokens]
        if self.group:
            for start in range(0, len(self.layers), self.group):
                part = nn.Sequential(*self.layers[start : start + self.group])
                x = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False)
        else:
            for layer in self.layers:
                x = layer(x)
        return self.lm_head(self.ln_final(x))


def log_softmax(x: Tensor) -> Tensor:
    """Over the last axis, by hand."""
    x = x - torch.max(x, dim=-1, keepdim=True)[0]
    return x - torch.log(torch.sum(torch.exp(x), dim=-1, keepdim=True))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over all positions, as the course's own `nn_utils` does it."""
    return torch.mean(torch.gather(-log_softmax(logits), -1, targets.unsqueeze(-1)))


class AdamW(torch.optim.Optimizer):
    """One parameter at a time, as in the assignment."""

    def __init__(self, parameters, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})

    def step(self, closure=None) -> None:
        """Update every parameter."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                t = state.get("t", 1)
                m = state.get("m", torch.zeros_like(p))
                v = state.get("v", torch.zeros_like(p))
                g = p.grad.data
                m = beta1 * m + (1 - beta1) * g
                v = beta2 * v + (1 - beta2) * torch.square(g)
                lr = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                p.data -= lr * m / (torch.sqrt(v) + group["eps"])
                p.data -= group["lr"] * group["weight_decay"] * p.data
                state["t"], state["m"], state["v"] = t + 1, m, v


def make_step(
    config: tuple[int, int, int, int, int, int], batch: int, mode: str, scope: str, group: int,
    waits: str = "step", device: str = "cuda",
) -> Callable[[], None]:  # fmt: skip
    """Return the step of scope fwd, fwd_bwd or train_step; it waits for the GPU after each `step` or `phase`."""
    model = LM(*config, group=group).to(device)
    optimizer = AdamW(model.parameters()) if scope == "train_step" else None
    tokens = torch.randint(0, config[4], (batch, config[5]), device=device)
    targets = torch.randint(0, config[4], (batch, config[5]), device=device)

    def step() -> None:
        with torch.set_grad_enabled(scope != "fwd"), torch.autocast("cuda", torch.bfloat16, mode == "amp-bf16"):
            logits = model(tokens)
            if scope == "fwd":
                torch.cuda.synchronize()
                return
            loss = LOSS(logits, targets)
        for phase in (loss.backward, *((optimizer.step,) if optimizer is not None else ())):
            if waits == "phase":
                torch.cuda.synchronize()
            phase()
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()

    return step


LOSS = cross_entropy
