"""What an experiment trains, made ready: a recipe with its text, or a script."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mezzotint.errors import ProofError
from mezzotint.files import write_whole
from mezzotint.parity.design import Experiment, Source
from mezzotint.proving.recipe_run import RecipeSeed
from mezzotint.proving.script_run import Script, ScriptRun
from mezzotint.proving.trainee import Trainee
from mezzotint.training.config import to_toml


class Program:
    """The program of an experiment; `digest` changes where its code or data do."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._script: Script | None = None
        if experiment.source is Source.SCRIPT:
            self._script = Script(experiment.target, experiment.arguments)
            self.digest = self._script.digest
        elif experiment.source is Source.RECIPE:
            first = RecipeSeed(experiment, experiment.seeds[0])
            self._corpus = first.corpus
            self.digest = self._corpus.digest
        else:
            raise ProofError("this proof was begun by mz.prove in a program; run that program again to go on with it")

    @property
    def has_own_errors(self) -> bool:
        """Whether errors of ours come from the user's code."""
        return self._script is not None

    def makers(self, seed: int, folders: dict[str, Path]) -> dict[str, Callable[[], Trainee]]:
        """Return what makes the run of each arm; configurations are written first."""
        arms = self._experiment.arms
        script = self._script
        if script is not None:
            return {arm.name: partial(ScriptRun, script, self._experiment, arm, seed) for arm in arms}
        recipe = RecipeSeed(self._experiment, seed, self._corpus)
        made: dict[str, Callable[[], Trainee]] = {}
        for arm in arms:
            write_whole(folders[arm.name] / "config.toml", to_toml(recipe.config(arm.name)))
            made[arm.name] = partial(recipe.make, arm.name)
        return made
