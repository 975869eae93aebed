"""Arms of somebody's own training: SCRIPT.py:make_run, called as make_run(seed, policy, **settings).

A generator yields once a step: a loss (a number or a tensor of one element), or a mapping with "loss" and further
numbers. What it returns at its end, a mapping, are its final figures. A plain function returns the list of its losses,
or (losses, figures); it cannot take turns. Every run executes the script anew, so that no run finds what another one
left in the module.
"""

import hashlib
import inspect
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch

from mezzotint.errors import ProofError
from mezzotint.parity.design import Arm, Experiment
from mezzotint.policy.policy import Policy
from mezzotint.proving.belongings import Belongings
from mezzotint.proving.trainee import Closing
from mezzotint.training.config import typed_value

_OURS = ("final_loss", "curve")


class Script:
    """A script with a function that makes runs, read and compiled once. Raises ProofError where there is none."""

    def __init__(self, target: str, arguments: Sequence[str] = ()) -> None:
        name, _, self.function = target.rpartition(":")
        self.path, self.arguments = Path(name), tuple(arguments)
        try:
            content = self.path.read_bytes()
            self._code: CodeType = compile(content, str(self.path), "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
            raise ProofError(f"{self.path} is not a Python script: {error.args[0]}{line}") from None
        except OSError as error:
            raise ProofError(
                f"{self.path} cannot be read from {Path.cwd()}: {error.strerror or error}; name SCRIPT.py:make_run"
            ) from None
        if self.function not in self._code.co_names:
            raise ProofError(f"{self.path} has no function {self.function}; name one: {self.path}:make_run")
        self.digest = hashlib.sha256(content).hexdigest()[:16]

    def load(self) -> ModuleType:
        """Return the script as a module, executed anew."""
        module = ModuleType(self.path.stem)
        module.__file__ = str(self.path)
        with self.as_current(module):
            exec(self._code, module.__dict__)
        return module

    @contextmanager
    def as_current(self, module: ModuleType) -> Iterator[None]:
        """Let the script find itself: its arguments, its folder, its module."""
        argv, path, before = sys.argv, list(sys.path), sys.modules.get(module.__name__)
        sys.argv = [str(self.path), *self.arguments]
        sys.path.insert(0, str(self.path.resolve().parent))
        sys.modules[module.__name__] = module
        try:
            yield
        finally:
            sys.argv, sys.path[:] = argv, path
            if before is None:
                sys.modules.pop(module.__name__, None)
            else:
                sys.modules[module.__name__] = before


class ScriptRun:
    """One run of a script; nothing of it runs before the first step."""

    def __init__(self, script: Script, experiment: Experiment, arm: Arm, seed: int) -> None:
        self._script, self._experiment, self._arm, self._seed = script, experiment, arm, seed
        self._module: ModuleType | None = None
        self._steps: Iterator[Any] | None = None
        self._num_steps = 0
        self._figures: dict[str, list[tuple[int, float]]] = {}
        self._tokens: int | None = None
        self._returned: Mapping[str, Any] = {}
        self._belongings = Belongings()
        self._knows_limit = False
        self.takes_turns = True

    def step(self) -> Mapping[str, Any] | None:
        """Advance the generator to its next yield."""
        limit = self._experiment.steps
        is_enough = limit is not None and self._num_steps >= limit
        if is_enough and not self._knows_limit:
            return None
        if self._steps is None:
            self._begin()
        assert self._module is not None
        assert self._steps is not None
        with self._script.as_current(self._module), self._belongings.watching(self._steps, self._num_steps):
            try:
                value = next(self._steps)
            except StopIteration as end:
                self._returned = self._mapping(end.value)
                return None
        if is_enough:  # it was told how many steps are wanted, and goes on
            return None
        self._num_steps += 1
        return self._line(value)

    def _begin(self) -> None:
        self._module = self._script.load()
        make_run = getattr(self._module, self._script.function, None)
        if not callable(make_run):
            raise ProofError(f"{self._script.path} has no function {self._script.function}; name one that makes a run")
        settings = dict(setting.split("=", 1) for setting in self._arm.settings)
        keywords: dict[str, Any] = {key.strip(): typed_value(value) for key, value in settings.items()}
        if self._experiment.steps is not None and takes(make_run, "steps"):
            self._knows_limit = True  # so it ends by itself, and may return its final figures
            keywords.setdefault("steps", self._experiment.steps)
        policy = Policy.parse(self._arm.policy)
        try:
            inspect.signature(make_run).bind(self._seed, policy, **keywords)
        except TypeError as error:
            raise ProofError(
                f"{self._script.function} cannot be called as {self._script.function}(seed, policy"
                f"{''.join(f', {key}={value!r}' for key, value in keywords.items())}): {error}"
            ) from None
        with self._script.as_current(self._module):
            made = make_run(self._seed, policy, **keywords)
        if hasattr(made, "__next__"):
            self._steps = made
            return
        self.takes_turns = False
        losses, figures = made if isinstance(made, tuple) and len(made) == 2 else (made, {})
        self._steps = iter(self._listed(losses))
        self._returned = self._mapping(figures)

    def _listed(self, losses: Any) -> list[Any]:
        if isinstance(losses, torch.Tensor) and losses.dim() == 1:
            return list(losses.detach().cpu())
        if isinstance(losses, Sequence) and not isinstance(losses, (str, bytes)):
            return list(losses)
        raise ProofError(
            f"{self._script.function} returned {type(losses).__name__}; make it a generator that yields a loss a step, "
            "or return the list of losses, or (losses, figures)"
        )

    def _mapping(self, value: Any) -> Mapping[str, Any]:
        if value is None:
            return self._returned
        if not isinstance(value, Mapping):
            raise ProofError(
                f"{self._script.function} returned {type(value).__name__} at its end; return a mapping of names to "
                "numbers, or nothing"
            )
        taken = [name for name in _OURS if name in value]
        if taken:
            raise ProofError(f"{self._script.function} returned {taken[0]}, which every run has; give it another name")
        return value

    def _line(self, value: Any) -> dict[str, Any]:
        """Return one step's figures as numbers."""
        figures = value if isinstance(value, Mapping) else {"loss": value}
        if "loss" not in figures:
            raise ProofError(f"{self._script.function} yielded a mapping without 'loss', but with {sorted(figures)}")
        line = {str(name): self._number(str(name), item) for name, item in figures.items()}
        for name, number in line.items():
            if name == "tokens":
                self._tokens = int(number)
            elif name != "loss":
                self._figures.setdefault(name, []).append((self._num_steps, number))
        return {"step": self._num_steps, **line}

    def _number(self, name: str, value: Any) -> float:
        try:
            if isinstance(value, torch.Tensor):
                return float(value.detach())
            if isinstance(value, (str, bytes)):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            raise ProofError(
                f"{self._script.function} yielded {name}={_shown(value)}; yield a number or a tensor of one element"
            ) from None

    def finish(self) -> Closing:
        """Return final figures; those of the steps count by their mean over the last tenth, or else their last."""
        values: dict[str, float] = {}
        first_of_tail = self._num_steps - max(self._num_steps // 10, 1)
        for name, recorded in self._figures.items():
            tail = [number for step, number in recorded if step > first_of_tail] or [recorded[-1][1]]
            values[name] = statistics.fmean(tail)
        skipped = self._returned.get("skipped_steps", 0)
        for name, value in self._returned.items():
            if name != "skipped_steps":
                values[str(name)] = self._number(str(name), value)
        found = self._belongings
        return Closing(
            values={name: value for name, value in values.items() if math.isfinite(value)},
            memory_bytes=found.memory_bytes(),
            num_parameters=found.num_parameters(),
            weights_digest=found.weights_digest(),
            skipped_steps=int(skipped) or found.skipped_steps(),
            tokens_per_step=self._tokens,
            profile=found.profile,
        )

    def close(self) -> None:
        """End the generator, so that its with-blocks are left, and let go of what it held."""
        steps, self._steps = self._steps, None
        self._belongings.forget()
        end = getattr(steps, "close", None)
        if self._module is not None and end is not None:
            with self._script.as_current(self._module):
                end()
        self._module = None


def takes(function: Callable[..., Any], name: str) -> bool:
    """Return whether a function has a parameter of this name."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:40]
