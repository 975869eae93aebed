"""Watched programs against unwatched ones: the same bits, and no exception but those of the program itself."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from hostile import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import mezzotint as mz


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.unsqueeze(1))[0].squeeze(1))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(16, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.table((x.detach().abs() * 4).long().clamp(max=15)).mean(1).unsqueeze(1)
        return self.head(self.mix(hidden, hidden, hidden)[0].squeeze(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.1), nn.Linear(16, 4)),
    "batchnorm": lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)),
    "conv": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(24, 4)
    ),
    "recurrent": Recurrent,
    "attending": Attending,
    "bfloat16": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).bfloat16(),
}


def plain(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), y)


def step_plain(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = plain(model, x, y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step_autocast(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss = plain(model, x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step_scaled(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    scaler = optimizer.__dict__.setdefault("fuzz_scaler", torch.amp.GradScaler("cpu", init_scale=2.0**120))
    with torch.autocast("cpu", torch.float16):
        loss = plain(model, x, y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return loss


def step_checkpointed(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = checkpoint(plain, model, x.requires_grad_(), y, use_reentrant=False)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step_reentrant(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = checkpoint(plain, model, x.requires_grad_(), y, use_reentrant=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def loss_of(model: nn.Module) -> Callable[[dict[str, Tensor], Tensor, Tensor], Tensor]:
    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, parameters, (x,)).float(), y)

    return loss


def step_per_sample(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    found = vmap(grad(loss_of(model)), in_dims=(None, 0, 0), randomness="same")(parameters, x.unsqueeze(1), y[:, None])
    for name, parameter in model.named_parameters():
        parameter.grad = found[name].mean(0)
    optimizer.step()
    optimizer.zero_grad()
    return plain(model, x, y)


def step_in_vmap(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Step inside a mapped function: whoever watches begins and ends in the middle of a transform."""

    def mapped(row: Tensor) -> Tensor:
        step_plain(model, optimizer, x, y)
        return row * 2

    return vmap(mapped)(x).sum()


def step_forward_mode(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    parameters = {name: one.detach() for name, one in model.named_parameters()}
    tangents = {name: torch.ones_like(one) for name, one in parameters.items()}
    value, slope = jvp(lambda given: loss_of(model)(given, x, y), (parameters,), (tangents,))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * slope
    optimizer.step()
    optimizer.zero_grad()
    return value


def step_second_order(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    loss = plain(model, x.requires_grad_(), y)
    slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True, allow_unused=True)
    penalty = sum(slope.square().sum() for slope in slopes if slope is not None)
    (loss + 0.01 * penalty).backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step_in_threads(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Two replicas as DataParallel runs them, one after the other so that their sum has one order."""
    found: list[Tensor] = []

    def replica(part: slice) -> None:
        found.append(plain(model, x[part], y[part]))

    for part in (slice(0, 4), slice(4, 8)):
        thread = threading.Thread(target=replica, args=(part,))
        thread.start()
        thread.join()
    if len(found) != 2:
        raise RuntimeError("a replica failed")
    loss = found[0] + found[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def step_that_fails(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """Half a step, then an error of the program's own."""
    loss = step_plain(model, optimizer, x, y)
    if loss > 0:
        raise KeyError("the program's own error")
    return loss


def step_not_finite(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    return step_plain(model, optimizer, x * 1e38 * 1e38, y)


def step_evaluated(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    with torch.inference_mode():
        plain(model, x, y)
    return step_plain(model, optimizer, x, y)


STEPS = {name.removeprefix("step_"): value for name, value in list(globals().items()) if name.startswith("step_")}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "adamw-fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=1e-2),
}


@dataclass(frozen=True)
class Program:
    """A model, an optimizer and the kind of each of its steps; errors of a step are caught, as a careful loop does."""

    model: str
    optimizer: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Watcher:
    """Somebody who watches from before step `first` until after step `last`."""

    kind: str
    first: int
    last: int


def programs() -> st.SearchStrategy[Program]:
    steps = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4).map(tuple)
    return st.builds(Program, st.sampled_from(sorted(MODELS)), st.sampled_from(sorted(OPTIMIZERS)), steps)


def watchers() -> st.SearchStrategy[list[Watcher]]:
    kinds = ("watch every 1", "watch every 2", "audit", "audit without ranges")
    watcher = st.builds(Watcher, st.sampled_from(kinds), st.integers(0, 2), st.integers(0, 4))

    def possible(found: list[Watcher]) -> bool:  # an audit inside an audit is refused, and says so
        return sum(one.kind.startswith("audit") for one in found) <= 1

    return st.lists(watcher, min_size=1, max_size=3).filter(possible)


def entered(kind: str) -> contextlib.AbstractContextManager[object]:
    if kind.startswith("watch"):
        return mz.watch(every=int(kind[-1]))
    return mz.audit(has_ranges=kind == "audit")


def trained(program: Program, watchers: list[Watcher]) -> list[object]:
    """Return the losses, the errors' types and the weights of a program."""
    torch.manual_seed(0)
    model = MODELS[program.model]()
    optimizer = OPTIMIZERS[program.optimizer](model)
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    found: list[object] = []
    open_now: dict[Watcher, contextlib.ExitStack] = {}
    with contextlib.ExitStack() as everybody:
        for number, kind in enumerate(program.steps):
            for watcher in (one for one in watchers if one.first == number and one not in open_now):
                open_now[watcher] = everybody.enter_context(contextlib.ExitStack())
                open_now[watcher].enter_context(entered(watcher.kind))
            x = torch.randn(8, 8, generator=generator)
            try:
                found.append(STEPS[kind](model, optimizer, x.to(dtype), x[:, :4].argmax(1)).detach())
            except Exception as error:
                found.append(type(error))
                optimizer.zero_grad()
            for watcher in (one for one in watchers if one.first <= number == max(one.first, one.last)):
                open_now[watcher].close()
    return [*found, *(parameter.detach() for parameter in model.parameters()), torch.get_rng_state()]


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0))
    return one is other


@examples(12)
@given(programs(), watchers())
def test_a_watched_program_computes_the_same(program: Program, watchers: list[Watcher]) -> None:
    logger = logging.getLogger("mezzotint")
    with warnings.catch_warnings(), mock.patch.object(logger, "disabled", new=True):
        warnings.simplefilter("ignore")
        alone = trained(program, [])
        watched = trained(program, watchers)
    assert all(same(one, other) for one, other in zip(alone, watched, strict=True)), [alone, watched]
