"""Arms of a recipe: our own trainer, with the figures that only a known model allows.

The arms of a seed share initial weights and batches. What is measured on the side (memory, gradients against float64)
is measured on a trainer of its own, so a run computes what `mezzotint train` computes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mezzotint.data.tokens import Corpus, open_corpus
from mezzotint.errors import ProofError
from mezzotint.parity.design import Arm, Experiment
from mezzotint.proving.probes import Probe
from mezzotint.proving.trainee import Closing
from mezzotint.proving.weights import copies, distance, weights_digest
from mezzotint.training.config import RunConfig, from_toml, with_settings
from mezzotint.training.loop import metrics_line
from mezzotint.training.memory import StateMemory, StepMemory, state_memory
from mezzotint.training.trainer import Trainer

_FIXED = ("seed", "policy", "train.steps")  # what the design says, so that an arm cannot say otherwise


def arm_config(experiment: Experiment, arm: Arm, seed: int) -> RunConfig:
    """Return the configuration of one run. Raises ProofError where an arm changes what the design fixes."""
    for setting in arm.settings:
        key = setting.partition("=")[0].strip()
        if key in _FIXED:
            raise ProofError(f"arm {arm.name} sets {key}, which is the design's; use --seeds, --steps or the policy")
    config = with_settings(from_toml(experiment.recipe_toml, experiment.target), arm.settings)
    return with_settings(config, [f"seed={seed}", f'policy="{arm.policy}"'])


class RecipeSeed:
    """The arms of one seed. The first one finished is the control, whose weights the others are probed at."""

    def __init__(self, experiment: Experiment, seed: int, corpus: Corpus | None = None) -> None:
        self._configs = {arm.name: arm_config(experiment, arm, seed) for arm in experiment.arms}
        first = next(iter(self._configs.values()))
        self.corpus = corpus or open_corpus(first.data, block_size=first.model.block_size)
        self._control = experiment.control.name
        self._control_weights: list[Tensor] | None = None
        self._probes: dict[str, Probe] = {}

    def config(self, arm: str) -> RunConfig:
        """Return the complete configuration of an arm's run."""
        return self._configs[arm]

    def make(self, arm: str) -> "RecipeRun":
        """Return an arm's run, not begun."""
        return RecipeRun(self, arm)

    def trainer(self, arm: str) -> Trainer:
        """Return a trainer at its first step."""
        return Trainer(self._configs[arm], self.corpus)

    def probe_at(self, moment: str, weights: Sequence[Tensor], trainer: Trainer) -> Probe:
        """Return the reference at the control's weights at the start or end, computed once for all arms."""
        if moment not in self._probes:
            self._probes[moment] = Probe(trainer, weights)
        return self._probes[moment]

    def control_weights(self, arm: str, trainer: Trainer) -> list[Tensor] | None:
        """Return the control's final weights; the control, which is first to finish, leaves them here."""
        if arm == self._control:
            self._control_weights = copies(trainer.model)
        return self._control_weights


class RecipeRun:
    """One run of a recipe."""

    def __init__(self, seed: RecipeSeed, arm: str) -> None:
        self._seed, self._arm = seed, arm
        side = seed.trainer(arm)
        self._initial = copies(side.model)
        self._state_memory: StateMemory | None = None
        self._step_memory: StepMemory = side.measure_memory()
        self._start_errors = seed.probe_at("start", self._initial, side).errors_of(side)
        del side
        self._trainer = seed.trainer(arm)

    def step(self) -> Mapping[str, Any] | None:
        """Train one update."""
        if self._trainer.is_finished:
            return None
        return metrics_line(self._trainer.update(), 0.0)

    def finish(self) -> Closing:
        """Evaluate, measure, and compare the gradient at the control's weights with float64's."""
        trainer = self._trainer
        memory = state_memory(trainer.engine)
        values = {"validation_loss": trainer.validation_loss(), "distance": distance(trainer.model, self._initial)}
        digest = weights_digest(trainer.model.state_dict())
        weights = self._seed.control_weights(self._arm, trainer)
        if weights is not None:
            end = self._seed.probe_at("end", weights, trainer)
            end.put_weights(trainer)
            errors = [self._start_errors, end.errors_of(trainer)]
            for name in ("gradient_error", "log_prob_error"):
                found = [error[name] for error in errors if name in error]
                if found:
                    values[name] = sum(found) / len(found)
        train, block = trainer.config.train, trainer.config.model.block_size
        return Closing(
            values=values,
            memory_bytes=memory_by_class(memory, self._step_memory),
            num_parameters=memory.num_parameters,
            weights_digest=digest,
            skipped_steps=trainer.engine.skipped_steps,
            tokens_per_step=train.batch_size * train.accumulate * block,
            profile=self._step_memory.profile,
        )

    def state(self) -> Mapping[str, Any]:
        """Return what a checkpoint of this run holds."""
        return self._trainer.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._trainer.load_state_dict(state)

    def close(self) -> None:
        """Let go of model and optimizer."""
        self.__dict__.pop("_trainer", None)


def memory_by_class(state: StateMemory, step: StepMemory) -> dict[str, int]:
    """Return a run's memory by class; `temporaries` is what the peak has beyond what waits at the step's two ends.

    Activations wait at the end of forward, gradients at the end of backward, so the classes do not add up to the peak.
    """
    stays = state.weights_bytes + state.masters_bytes + state.optimizer_bytes
    waits = max(step.activations_bytes, step.gradients_bytes)
    return {
        "weights": state.weights_bytes,
        "masters": state.masters_bytes,
        "states": state.optimizer_bytes,
        "gradients": step.gradients_bytes,
        "activations": step.activations_bytes - step.cast_cache_bytes,
        "cast_cache": step.cast_cache_bytes,
        "temporaries": max(step.peak_bytes - waits, 0),
        "peak": stays + step.peak_bytes,
    }
