"""Training runs for `prove_findings.py` and `prove_sacrifices.py`, as a user would write them for `mezzotint prove`.

    mezzotint prove benchmarks/prove_programs.py:small_gradients --arm float32 --arm fp16-mixed --steps 200
    mezzotint prove benchmarks/prove_programs.py:planted --arm float32 --arm off=float32,plant=rotary-bf16 --steps 200

Both train a language model of 0.11M parameters on bytes of Python's standard library, 512 tokens a step, with AdamW and
a cosine schedule. What is wrong with a run, if anything, is planted here and nowhere in the product.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mezzotint as mz
from mezzotint.data.batches import Batches
from mezzotint.data.config import DataConfig
from mezzotint.data.tokens import Corpus, open_corpus
from mezzotint.models.gpt import GPT, RMSNorm
from mezzotint.models.gpt_config import GPTConfig

DATA = DataConfig(max_bytes=4_000_000)
SHAPE = {"num_layers": 2, "num_heads": 2, "dim": 64, "ffn_dim": 160, "block_size": 64}
BATCH, TOKENS = 8, 8 * 64
LEARNING_RATE = 1e-3

Figures = dict[str, float]


@cache
def corpus() -> Corpus:
    return open_corpus(DATA, block_size=SHAPE["block_size"])


def batches_of(seed: int, batch_size: int = BATCH) -> tuple[Batches, GPTConfig]:
    shape = GPTConfig(**SHAPE, vocab_size=corpus().vocab_size)
    return Batches(corpus(), block_size=shape.block_size, batch_size=batch_size, seed=seed), shape


def optimizer_of(
    model: nn.Module, steps: int, *, learning_rate: float = LEARNING_RATE, eps: float = 1e-8
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW, 20 steps of warm-up, then a cosine to a tenth of the learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, eps=eps)

    def share(step: int) -> float:
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * min(step / steps, 1)))
        return min((step + 1) / 20, decay)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


@torch.no_grad()
def validation_loss(model: nn.Module, engine: mz.Engine, batches: Batches, num_batches: int = 16) -> float:
    losses = []
    for inputs, targets in batches.validation(num_batches):
        with engine.forward():
            losses.append(float(model(inputs, targets, keep_logits=False)[1]))
    return math.fsum(losses) / len(losses)


# --- float16 and small gradients (Micikevicius et al. 2018) -----------------------------------------------------------


def small_gradients(seed: int, policy: Any, steps: int = 200, mean_over: int = 2**19) -> Iterator[dict[str, float]]:
    """A mean over `mean_over` tokens, of which this process computes 512, and so 512 / `mean_over` of the loss.

    That is what a rank, or a micro-batch, of a large run does before gradients are summed: its gradients are as small
    as the whole batch is large. AdamW does not see the factor (its eps is scaled along), so that float32 trains as if
    there were none.
    """
    torch.manual_seed(seed)
    batches, shape = batches_of(seed)
    model, share = GPT(shape), TOKENS / mean_over
    optimizer, scheduler = optimizer_of(model, steps, eps=1e-8 * share)
    engine = mz.Engine(model, optimizer, policy=policy, scheduler=scheduler, seed=seed)
    for step in range(steps):
        inputs, targets = batches[step]
        with engine.forward():
            _, loss = model(inputs, targets, keep_logits=False)
            part = loss * share
        engine.backward(part)
        engine.update()
        yield {"loss": loss.item(), "tokens": TOKENS}
    return {
        "validation_loss": validation_loss(model, engine, batches),
        "underflow": share_underflowed(model, engine, batches, share),
        "skipped_steps": engine.skipped_steps,
    }


def share_underflowed(model: nn.Module, engine: mz.Engine, batches: Batches, share: float) -> float:
    """Return which share of the weights' gradients is 0 at the model's weights, and is not in float32."""
    inputs, targets = batches[0]
    ours = gradients(model, engine, inputs, targets, share)
    control = mz.Engine(model, torch.optim.SGD(model.parameters(), lr=1.0), policy="float32")
    theirs = gradients(model, control, inputs, targets, share)
    lost = sum(int(((a == 0) & (b != 0)).sum()) for a, b in zip(ours, theirs, strict=True))
    return lost / sum(int((b != 0).sum()) for b in theirs)


def gradients(model: nn.Module, engine: mz.Engine, inputs: Tensor, targets: Tensor, share: float = 1.0) -> list[Tensor]:
    """Return the gradients that the engine would step with, in float64, and drop them."""
    with engine.forward():
        _, loss = model(inputs, targets, keep_logits=False)
        loss = loss * share
    engine.backward(loss)
    found = [p.grad.double() * (engine.accumulate / engine.loss_scale) for p in model.parameters()]
    engine.discard()
    return found


# --- planted sacrifices -----------------------------------------------------------------------------------------------


class LogSoftmaxInBfloat16(GPT):
    """The loss as CUDA autocast leaves it: log-softmax in bfloat16. Its mean is taken in float32."""

    def forward(
        self, input_ids: Tensor, target_ids: Tensor | None = None, *, keep_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        logits, _ = super().forward(input_ids)
        if target_ids is None:
            return F.log_softmax(logits.bfloat16(), dim=-1), None
        log_probs = F.log_softmax(logits.bfloat16(), dim=-1).float().flatten(0, 1)
        return logits, F.nll_loss(log_probs, target_ids.flatten())


class NormInFloat16(RMSNorm):
    """torch's own kernel on float16 numbers; inside it sums in float32."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.rms_norm(x_BTD.half(), (x_BTD.shape[-1],), self.weight.half(), self.eps).to(x_BTD.dtype)


class WrittenOutNormInFloat16(RMSNorm):
    """The formula as many models spell it, in float16: backward cubes 1 / rms, which is above 40 at the start."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD.half()
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return (normal * self.weight.half()).to(x_BTD.dtype)


def rotary_in_bfloat16(model: GPT) -> GPT:
    """Positions times frequencies in bfloat16, whose 8 bits do not tell the angles of neighbours apart."""

    def rounded(attention: nn.Module, args: tuple[Tensor, tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
        x_BTD, (cos, _) = args
        num_tokens, half = cos.shape
        base = torch.tensor(model.config.rope_base, dtype=torch.float32)
        frequencies = base ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(num_tokens).bfloat16()[:, None] * frequencies.bfloat16()
        return x_BTD, (angles.cos().to(cos.dtype), angles.sin().to(cos.dtype))

    for block in model.blocks:
        block.attention.register_forward_pre_hook(rounded)
    return model


MODELS: dict[str, Callable[[GPTConfig], GPT]] = {
    "log-softmax-bf16": LogSoftmaxInBfloat16,
    "rms-norm-fp16": lambda shape: GPT(shape, norm=NormInFloat16),
    "rms-norm-fp16-written-out": lambda shape: GPT(shape, norm=WrittenOutNormInFloat16),
    "rotary-bf16": lambda shape: rotary_in_bfloat16(GPT(shape)),
}
OTHER_PLANTS = ("none", "other-seeds", "lost-masters", "learning-rate", "no-training")


def planted(seed: int, policy: Any, steps: int = 200, plant: str = "none") -> Iterator[dict[str, float]]:
    """A run with something wrong, by name; "other-seeds" is a healthy run with the weights and data of another seed."""
    if plant not in MODELS and plant not in OTHER_PLANTS:
        raise ValueError(f"plant {plant!r} is not known; use one of {[*MODELS, *OTHER_PLANTS]}")
    seed += 1000 * (plant == "other-seeds")
    torch.manual_seed(seed)
    batches, shape = batches_of(seed)
    model = MODELS.get(plant, GPT)(shape)
    factor = {"learning-rate": 1.02, "no-training": 0.0}.get(plant, 1.0)
    optimizer, scheduler = optimizer_of(model, steps, learning_rate=factor * LEARNING_RATE)
    engine = mz.Engine(model, optimizer, policy=policy, scheduler=scheduler, max_grad_norm=1.0, seed=seed)
    initial = [p.detach().clone() for p in model.parameters()]
    start = probe(model, engine, shape, batches)
    for step in range(steps):
        inputs, targets = batches[step]
        with engine.forward():
            _, loss = model(inputs, targets, keep_logits=False)
        engine.backward(loss)
        engine.update()
        if plant == "lost-masters":
            engine.reread_weights()  # float32 weights are made of the rounded ones again, as after a careless reload
        yield {"loss": loss.item(), "tokens": TOKENS}
    moved = math.fsum(
        float((p.detach() - q).double().square().sum()) for p, q in zip(model.parameters(), initial, strict=True)
    )
    end = probe(model, engine, shape, batches)
    return {
        "validation_loss": validation_loss(model, engine, batches),
        "distance": math.sqrt(moved),
        **{name: (start[name] + end[name]) / 2 for name in end},
    }


def probe(model: GPT, engine: mz.Engine, shape: GPTConfig, batches: Batches) -> Figures:
    """Return how far gradients and log-probabilities are from those of a healthy model in float64, at these weights."""
    inputs, targets = next(iter(batches.validation(1)))
    with torch.random.fork_rng():
        reference = GPT(shape).double()
    with torch.no_grad():
        for parameter, value in zip(reference.parameters(), model.parameters(), strict=True):
            parameter.copy_(value)
    exact = _log_probs(reference(inputs)[0], targets)
    theirs = torch.autograd.grad(-exact.mean(), list(reference.parameters()))
    exact = exact.detach()
    ours = gradients(model, engine, inputs, targets)
    apart = math.fsum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad(), engine.forward():
        found = model(inputs)[0]
    return {
        "gradient_error": math.sqrt(apart / math.fsum(float(b.square().sum()) for b in theirs)),
        "log_prob_error": float((_log_probs(found.double(), targets) - exact).abs().mean()),
    }


def _log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1).gather(-1, targets[..., None])
