"""How far a policy's gradient and log-probabilities are from float64's, at the same weights, on the same tokens."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mezzotint.models.gpt import GPT
from mezzotint.training.trainer import Trainer

NUM_BLOCKS = 2  # of held-out text


class Probe:
    """A float64 copy of the model at given weights, with its gradient and log-probabilities.

    On a device without float64 the copy is on the CPU.
    """

    def __init__(self, trainer: Trainer, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        inputs, targets = next(iter(trainer.batches.validation(1)))
        self.inputs, self.targets = inputs[:NUM_BLOCKS], targets[:NUM_BLOCKS]
        device = torch.device("cpu") if trainer.device.type == "mps" else trainer.device
        with torch.random.fork_rng(devices=[]):
            model = GPT(replace(trainer.config.model, vocab_size=trainer.corpus.vocab_size)).double().to(device).eval()
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(value)
        logits, _ = model(self.inputs.to(device))
        log_probs = _of_targets(logits, self.targets)
        self._gradients = torch.autograd.grad(-log_probs.mean(), list(model.parameters()))
        self._log_probs = log_probs.detach().cpu()

    @torch.no_grad()
    def put_weights(self, trainer: Trainer) -> None:
        """Write these weights into a trainer's model, rounded to the format that it stores; it trains no more then."""
        for parameter, value in zip(trainer.model.parameters(), self._weights, strict=True):
            parameter.copy_(value)

    def errors_of(self, trainer: Trainer) -> dict[str, float]:
        """Return the trainer's errors at its present weights, finite ones only, without a step."""
        engine, module = trainer.engine, trainer.engine.models["model"]
        inputs, targets = self.inputs.to(trainer.device), self.targets.to(trainer.device)
        was_training = trainer.model.training
        trainer.model.eval()
        try:
            with engine.forward():
                _, loss = module(inputs, targets, keep_logits=False)
            engine.backward(loss)
            share = engine.accumulate / engine.loss_scale
            difference = norm = 0.0
            for parameter, reference in zip(trainer.model.parameters(), self._gradients, strict=True):
                wide = reference.cpu()
                grad = torch.zeros_like(wide) if parameter.grad is None else parameter.grad.cpu().double() * share
                difference += float((grad - wide).square().sum())
                norm += float(wide.square().sum())
            engine.discard()
            with torch.no_grad(), engine.forward():
                logits, _ = module(inputs)
            log_probs = _of_targets(logits.cpu().double(), self.targets)
        finally:
            trainer.model.train(was_training)
        errors = {
            "gradient_error": math.sqrt(difference / norm) if norm else math.nan,
            "log_prob_error": float((log_probs - self._log_probs).abs().mean()),
        }
        return {name: value for name, value in errors.items() if math.isfinite(value)}


def _of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of each target, (B, T), from logits (B, T, V)."""
    return F.log_softmax(logits, dim=-1).gather(-1, targets.to(logits.device)[..., None]).squeeze(-1)
