"""From the words of a command line, or of a program, to a design."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mezzotint.errors import ConfigError, ProofError, shortened
from mezzotint.files import read_regular
from mezzotint.parity.design import Arm, Experiment, Source
from mezzotint.proving.design_file import design_from_toml, is_design
from mezzotint.proving.design_text import DEFAULT_ARMS, choose_metrics, parse_arm, parse_metric
from mezzotint.recipes.catalog import find_recipe
from mezzotint.training.config import RunConfig, from_toml, to_toml, with_settings


def is_script(target: str) -> bool:
    """Return whether a target names a function of a script."""
    name, colon, function = target.rpartition(":")
    return bool(colon) and name.endswith(".py") and function.isidentifier()


def experiment_for(
    target: str,
    *,
    arguments: Sequence[str] = (),
    arms: Sequence[str] = (),
    seeds: int,
    max_seeds: int = 0,
    steps: int | None = None,
    metrics: Sequence[str] = (),
    margin: float | None = None,
    alpha: float = 0.05,
    settings: Sequence[str] = (),
) -> Experiment:
    """Return the design that these words spell. Raises ProofError, ConfigError or PolicyError."""
    path = Path(target)
    if path.suffix == ".toml" and is_design(_read(path)):
        if arms or steps or metrics or margin or settings:
            raise ProofError(f"{path} is a whole design, which options do not change; edit it, or name its recipe")
        return design_from_toml(_read(path), str(path))
    if path.suffix == ".py":
        raise ProofError(f"{path} is a script; name the function in it that makes a run: {path}:make_run")
    source = Source.SCRIPT if is_script(target) else Source.RECIPE
    chosen = tuple(decided(parse_arm(text)) for text in arms or DEFAULT_ARMS)
    recipe = ""
    if source is Source.RECIPE:
        config = with_settings(_recipe(target), settings)
        if steps is not None:
            config = with_settings(config, [f"train.steps={steps}"])
        recipe, steps = to_toml(config), config.train.steps
    elif settings:
        raise ProofError("--set is for recipes; pass settings of a script with an arm: --arm NAME=POLICY,key=value")
    wanted = [parse_metric(text, margin or 0.005) for text in metrics]
    return Experiment(
        source=source,
        target=target,
        arms=chosen,
        seeds=tuple(range(seeds)),
        steps=steps,
        metrics=choose_metrics(source, wanted, margin),
        max_seeds=max_seeds,
        alpha=alpha,
        arguments=tuple(arguments),
        recipe_toml=recipe,
    )


def _recipe(target: str) -> RunConfig:
    path = Path(target)
    return from_toml(_read(path), str(path)) if path.suffix == ".toml" else find_recipe(target)


def _read(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except OSError as error:
        raise ConfigError(f"{shortened(path)} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a UTF-8 text file; pass a TOML recipe") from None


def decided(arm: Arm) -> Arm:
    """Return an arm with the policy that "auto" means here, so that a resume need not measure it again."""
    if arm.policy != "auto":
        return arm
    from mezzotint.policy.choose import choose

    return replace(arm, policy=str(choose().value))
