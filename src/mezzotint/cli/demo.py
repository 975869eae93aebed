"""`mezzotint demo`: the main job in one command, float32 against mixed precision with a verdict."""

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.cli.output import JsonOption, progress_console
from mezzotint.cli.prove import carry_out, command_line

SEEDS = 3


def demo(
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe. Repeatable."),
    ] = None,
    policy: Annotated[str, typer.Option(help="The policy beside float32.")] = "bf16-mixed",
    seeds: Annotated[int, typer.Option(min=2, help="How many pairs of runs.")] = SEEDS,
    out: Annotated[Path, typer.Option(help="Folder of the proof; numbered where it exists.")] = Path("runs/demo"),
    is_json: JsonOption = False,
) -> None:
    """Train a language model in float32 and in mixed precision, in pairs, and prove what it costs and saves.

    Exit code 0 whenever the proof was made: what it says about this machine is no failure of the demo.
    """
    from mezzotint.data.tokens import open_corpus
    from mezzotint.errors import ProofError
    from mezzotint.policy.presets import PRESETS
    from mezzotint.proving.recipe_run import arm_config
    from mezzotint.proving.runner import start_proof
    from mezzotint.proving.targets import experiment_for
    from mezzotint.training.rundir import free_path

    is_preset = policy in PRESETS and policy != "float32"
    arm = policy if is_preset else f"{'again' if policy == 'float32' else 'other'}={policy}"
    experiment = experiment_for("demo", arms=["float32", arm], seeds=seeds, settings=settings or [])
    config = arm_config(experiment, experiment.control, 0)
    corpus = open_corpus(config.data, block_size=config.model.block_size)
    progress_console().print(
        f"training a language model on {corpus.num_train:,} tokens of Python source, {config.train.steps} steps, in "
        f"float32 and in {policy}, turn by turn, {seeds} times from different weights",
        soft_wrap=True,
    )
    folder = start_proof(free_path(out), experiment, command_line())
    code = carry_out(folder, summary=None, is_json=is_json, schema="demo")
    if code == 2:
        raise ProofError("the demo's report could not be written; pass another folder with --out")
