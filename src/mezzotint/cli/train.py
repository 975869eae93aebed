"""`mezzotint train`: a recipe or a TOML file becomes a run directory with metrics and checkpoints."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import refuse_all_but
from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console
from mezzotint.errors import ConfigError, UserError, shortened
from mezzotint.files import read_regular

if TYPE_CHECKING:
    from mezzotint.training.config import RunConfig
    from mezzotint.training.loop import RunSummary
    from mezzotint.training.rundir import RunDirectory

SIGNAL_EXIT = 128  # a shell reports a command that signal n ended as 128 + n


def train(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe name (see --list) or the path of a TOML file.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=100. Repeatable."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="float32, bf16-mixed, fp16-mixed, ..., or auto.", show_default=False)
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="A file or folder of text. Repeatable.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory to make.", show_default=False)] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this run directory, bit for bit.", show_default=False)
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard curves too.")] = False,
    is_list: Annotated[bool, typer.Option("--list", help="List the recipes and stop.")] = False,
    is_json: JsonOption = False,
) -> None:
    """Train a language model in the precision that fits the hardware, or in the one you name."""
    if is_list:
        refuse_all_but(context, ("is_list", "is_json"), "with --list, which trains nothing; leave it out")
        _list_recipes(is_json)
        return
    _refuse_several_processes()
    config, run, is_resumed = _prepare(recipe, settings or [], policy, data or [], out, resume)
    with run:
        summary, chosen = _run(config, run, is_resumed=is_resumed, has_tensorboard=tensorboard)
    _report(config, run, summary, chosen, is_json=is_json)
    if summary.stopped_by is not None:
        raise typer.Exit(SIGNAL_EXIT + summary.stopped_by)


def _refuse_several_processes() -> None:
    """Raise ConfigError under torchrun, where each process would train a whole run of its own."""
    world = os.environ.get("WORLD_SIZE", "1").strip()
    if world not in ("", "1"):
        raise ConfigError(
            f"mezzotint train must run in one process, got WORLD_SIZE={shortened(world)}; start it without torchrun"
        )


def _prepare(
    recipe: str | None, settings: list[str], policy: str | None, data: list[str], out: Path | None, resume: Path | None
) -> "tuple[RunConfig, RunDirectory, bool]":
    """Return the configuration and the run directory, made or opened."""
    from mezzotint.training.config import to_toml, with_settings
    from mezzotint.training.rundir import RunDirectory

    if resume is not None:
        given = [
            name
            for name, value in (
                ("RECIPE", recipe),
                ("--set", settings),
                ("--policy", policy),
                ("--data", data),
                ("--out", out),
            )
            if value
        ]
        if given:
            raise ConfigError(
                f"--resume goes on with the run's own configuration, so {' and '.join(given)} cannot be given with it; "
                "start a new run to change it"
            )
        run = RunDirectory.open(resume)
        config = _parsed(run.config_path)
        try:
            _check_early(config)
        except UserError as error:  # the file may have been changed
            raise ConfigError(f"{run.config_path}: {error}") from None
        return config, run, True
    if recipe is None:
        raise ConfigError("name a recipe or a TOML file, for example: mezzotint train tiny-1m (see --list)")
    config = _load(recipe)
    changes = [*settings]
    if policy is not None:
        changes.append(f"policy={json.dumps(policy)}")
    if data:
        changes.append(f"data.source={json.dumps(data)}")
    config = with_settings(config, changes)
    _check_early(config)
    folder = out or _free_folder(config)
    if config.policy == "auto":
        config = _decided(config)
    return config, RunDirectory.create(folder, to_toml(config)), False


def _load(recipe: str) -> "RunConfig":
    from mezzotint.recipes.catalog import find_recipe

    path = Path(recipe)
    return find_recipe(recipe) if path.suffix != ".toml" else _parsed(path)


def _parsed(path: Path) -> "RunConfig":
    from mezzotint.training.config import from_toml

    try:
        return from_toml(read_regular(path).decode(), str(path))
    except OSError as error:
        raise ConfigError(f"{shortened(path)} cannot be read: {error.strerror or error}; pass a TOML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a UTF-8 text file; pass a TOML recipe") from None


def _decided(config: "RunConfig") -> "RunConfig":
    """Return the configuration with the policy that suits the device, so that a resume need not measure it again."""
    from mezzotint.policy.choose import choose

    decision = choose(device=None if config.device == "auto" else config.device)
    for reason in decision.reasons:
        progress_console().print(f"auto    {reason}", markup=False, soft_wrap=True)
    return replace(config, policy=str(decision.value))


def _check_early(config: "RunConfig") -> None:
    """Read the data before the run directory is made, so that bad data leave nothing behind."""
    from mezzotint.data.tokens import open_corpus
    from mezzotint.training.sizes import check_size

    check_size(config)
    open_corpus(config.data, block_size=config.model.block_size)


def _free_folder(config: "RunConfig") -> Path:
    """Return runs/<recipe>-<policy>, with a number where that exists."""
    from mezzotint.training.rundir import folder_name, free_path

    return free_path(Path("runs") / folder_name(f"{config.recipe}-{config.policy}"))


def _run(
    config: "RunConfig", run: "RunDirectory", *, is_resumed: bool, has_tensorboard: bool
) -> "tuple[RunSummary, dict[str, Any]]":
    from mezzotint.data.tokens import open_corpus
    from mezzotint.training.loop import run_training
    from mezzotint.training.progress import TerminalReporter
    from mezzotint.training.tracker import NoTracker, TensorBoardTracker
    from mezzotint.training.trainer import Trainer

    console = progress_console()
    trainer = Trainer(config, open_corpus(config.data, block_size=config.model.block_size))
    chosen = {"policy": str(trainer.engine.policy), "reasons": list(trainer.engine.decision.reasons)}
    tracker = TensorBoardTracker(run.path / "tensorboard") if has_tensorboard else NoTracker()
    with TerminalReporter(console, config.train.steps) as reporter:
        reporter.note(f"policy  {chosen['policy']}")
        for reason in chosen["reasons"]:
            reporter.note(f"        because {reason}")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        reporter.note(f"model   {parameters:,} parameters on {trainer.device}")
        reporter.note(
            f"data    {trainer.corpus.num_train:,} tokens to train on, {trainer.corpus.num_validation:,} held out"
        )
        reporter.note(f"run     {run.path}")
        try:
            summary = run_training(trainer, run, reporter, resume=is_resumed, tracker=tracker)
        finally:
            tracker.close()
    return summary, chosen


def _report(
    config: "RunConfig", run: "RunDirectory", summary: "RunSummary", chosen: dict[str, Any], *, is_json: bool
) -> None:
    if is_json:
        print_json(
            "train",
            {
                "recipe": config.recipe,
                **chosen,
                "run": str(run.path),
                "steps": summary.updates,
                "skipped_steps": summary.skipped,
                "loss": summary.loss,
                "validation_loss": summary.validation_loss,
                "sample": summary.sample,
                "stopped_by": signal.Signals(summary.stopped_by).name if summary.stopped_by else None,
            },
        )
        return
    if summary.stopped_by is not None:
        progress_console().print(
            f"stopped by {signal.Signals(summary.stopped_by).name} after step {summary.updates}, which is saved; "
            f"go on with:\n  mezzotint train --resume {run.path}",
            markup=False,
            soft_wrap=True,
        )
        return
    console = result_console()
    if summary.sample is not None:
        console.print("sample", style="bold")
        console.print(summary.sample, markup=False, soft_wrap=True)
        console.print()
    validation = "" if summary.validation_loss is None else f", validation loss {summary.validation_loss:.4f}"
    skipped = f", {summary.skipped} skipped" if summary.skipped else ""
    console.print(
        f"{summary.updates} steps{skipped}, last loss {summary.loss:.4f}{validation}; everything is in {run.path}",
        markup=False,
        soft_wrap=True,
    )


def _list_recipes(is_json: bool) -> None:
    from rich.table import Table

    from mezzotint.recipes.catalog import RECIPES

    rows = [(name, make()) for name, make in RECIPES.items()]
    notes = {name: (RECIPES[name].__doc__ or "").strip().splitlines()[0] for name, _ in rows}
    if is_json:
        print_json("train", {"recipes": [{"name": name, "summary": notes[name]} for name, _ in rows]})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "policy", "steps", "what it is"):
        table.add_column(column)
    for name, config in rows:
        table.add_row(name, config.policy, str(config.train.steps), notes[name])
    result_console().print(table)
