"""Trainer: a configuration made alive, one update at a time.

Every random number of a run comes from its own generator state, which the trainer puts in place for the length of a
call. So two trainers can take turns in one process, step by step, and each computes what it would have computed
alone.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from mezzotint.data.batches import Batches
from mezzotint.data.tokens import Corpus
from mezzotint.engine.engine import Engine
from mezzotint.engine.result import StepResult
from mezzotint.errors import CheckpointError
from mezzotint.hardware.probe import probe
from mezzotint.models.gpt import GPT
from mezzotint.modules.rms_norm import RMSNorm
from mezzotint.modules.swiglu import SwiGLU
from mezzotint.training.config import RunConfig
from mezzotint.training.memory import StepMemory, measure_step
from mezzotint.training.schedule import learning_rate_share
from mezzotint.training.sizes import check_size


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """One update: its number counted from 1, the mean loss of its micro-batches, and what the engine did."""

    update: int
    loss: float
    learning_rate: float
    num_tokens: int
    result: StepResult


class Trainer:
    """Model, data, optimizer and engine of one run; `update()` is one line of its history.

    Raises what its parts raise: PolicyError, ConfigError, DataError.
    """

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        check_size(config)
        self.config = config
        self.corpus = corpus
        self.num_updates = 0
        device = self.device = torch.device(probe(None if config.device == "auto" else config.device).device)
        with torch.random.fork_rng(devices=_cuda_devices(device)):
            torch.manual_seed(config.seed)
            # weights are drawn on the CPU, so that every device starts from the same ones
            layers: dict[str, Any] = {"norm": RMSNorm, "feed_forward": SwiGLU} if config.train.has_fused_modules else {}
            self.model = GPT(replace(config.model, vocab_size=corpus.vocab_size), **layers).to(device)
            self._rng = _rng_state(device)
        self.batches = Batches(
            corpus, block_size=config.model.block_size, batch_size=config.train.batch_size, seed=config.seed
        )
        self.optimizer = make_optimizer(config, self.model)
        scheduler = LambdaLR(self.optimizer, learning_rate_share(config.schedule, config.train.steps))
        self.engine = Engine(
            torch.compile(self.model) if config.train.compile else self.model,  # type: ignore[arg-type]
            self.optimizer,
            policy=config.policy,
            max_grad_norm=config.optimizer.max_grad_norm or None,
            accumulate=config.train.accumulate,
            scheduler=scheduler,
            seed=config.seed,
        )
        self._module = self.engine.models["model"]

    @property
    def is_finished(self) -> bool:
        """Whether all updates of the configuration are done."""
        return self.num_updates >= self.config.train.steps

    def update(self) -> UpdateRecord:
        """Train on the next micro-batches and return what happened."""
        learning_rate = self.optimizer.param_groups[0]["lr"]
        losses = []
        num_tokens = 0
        with self._own_rng():
            for micro in range(self.config.train.accumulate):
                inputs, targets = self._batch(micro)
                loss = self._forward(inputs, targets)
                self.engine.backward(loss)
                result = self.engine.update()
                losses.append(loss.detach())
                num_tokens += inputs.numel()
        self.num_updates += 1
        return UpdateRecord(
            update=self.num_updates,
            loss=float(torch.stack(losses).mean()),
            learning_rate=learning_rate,
            num_tokens=num_tokens,
            result=result,
        )

    def measure_memory(self) -> StepMemory:
        """Return the memory of one forward and backward on the next batch, leaving no trace in the run."""
        inputs, targets = self._batch(0)
        with self._own_rng(is_kept=False):
            memory = measure_step(lambda: self._forward(inputs, targets), self.engine.backward, self.device)
        self.engine.discard()
        return memory

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss over the fixed validation batches, in nats per token."""
        was_training = self.model.training
        self.model.eval()
        try:
            losses = [
                self._forward(inputs.to(self.device), targets.to(self.device))
                for inputs, targets in self.batches.validation(self.config.train.evaluate_batches)
            ]
        finally:
            self.model.train(was_training)
        return float(torch.stack(losses).double().mean())

    def sample(self) -> str:
        """Return text that the model writes after the configured prompt, the same for the same weights."""
        train = self.config.train
        generator = torch.Generator(device=self.device).manual_seed(self.config.seed)
        prompt = self.corpus.tokenizer.encode(train.sample_prompt)
        ids = torch.tensor([prompt], dtype=torch.long, device=self.device)
        with torch.no_grad(), self.engine.forward():
            written = self.model.generate(
                ids, num_tokens=train.sample_tokens, temperature=0.8, top_k=50, generator=generator
            )
        return self.corpus.tokenizer.decode(written[0].tolist())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continues this run bit for bit."""
        return {
            "updates": self.num_updates,
            "engine": self.engine.state_dict(),
            "rng": dict(self._rng),
            "corpus": self.corpus.digest,
            "tokens": self.corpus.tokens_digest,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; raise CheckpointError where it belongs to other data, model or policy."""
        if state["corpus"] != self.corpus.digest:
            raise CheckpointError(
                f"the training data changed since the checkpoint (digest {self.corpus.digest[:12]} now, "
                f"{state['corpus'][:12]} then); restore the data, or start a new run with --out"
            )
        if state.get("tokens", self.corpus.tokens_digest) != self.corpus.tokens_digest:
            raise CheckpointError(
                "the tokens are others than at the checkpoint, from the same text: another version of the tokenizers "
                "package makes them; install the one of then, or start a new run with --out"
            )
        updates = state["updates"]
        if type(updates) is not int or updates < 0 or not isinstance(state["rng"].get("cpu"), Tensor):
            raise CheckpointError("the checkpoint holds no number of updates, or no random state; use an older one")
        self.engine.load_state_dict(state["engine"])
        self._rng = dict(state["rng"])
        self.num_updates = updates

    def _batch(self, micro: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.batches[self.num_updates * self.config.train.accumulate + micro]
        return inputs.to(self.device), targets.to(self.device)

    def _forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with self.engine.forward():
            _, loss = self._module(inputs, targets, keep_logits=False)
        assert isinstance(loss, Tensor)
        return loss

    @contextmanager
    def _own_rng(self, *, is_kept: bool = True) -> Iterator[None]:
        """Run on this trainer's random state; keep how far it went, unless told to forget it."""
        outside = _rng_state(self.device)
        _set_rng_state(self._rng)
        try:
            yield
        finally:
            if is_kept:
                self._rng = _rng_state(self.device)
            _set_rng_state(outside)


def make_optimizer(config: RunConfig, model: GPT) -> Optimizer:
    """Return the configured optimizer; weight decay acts on matrices only, as is usual for language models."""
    settings = config.optimizer
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if settings.name == "sgd":
        return SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return AdamW(
        groups, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def _cuda_devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
