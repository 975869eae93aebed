"""`mezzotint demo`: the main job in one command, float32 and mixed precision side by side, with what each costs."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console

if TYPE_CHECKING:
    from mezzotint.training.pair import Arm
    from mezzotint.training.progress import TerminalReporter

MEBIBYTE = 2**20
CAVEAT = (
    "One pair of runs proves little: another seed would move both losses too. Speed and memory are measured, side by "
    "side in one process; how they come out depends on what this processor does natively (mezzotint doctor)."
)


def demo(
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one setting of the recipe. Repeatable."),
    ] = None,
    policy: Annotated[str, typer.Option(help="The policy beside float32.")] = "bf16-mixed",
    out: Annotated[Path, typer.Option(help="Folder for the run directories; numbered where it exists.")] = Path(
        "runs/demo"
    ),
    is_json: JsonOption = False,
) -> None:
    """Train a language model twice, in float32 and in mixed precision, and compare."""
    from mezzotint.data.tokens import open_corpus
    from mezzotint.recipes.catalog import find_recipe
    from mezzotint.training.config import to_toml, with_settings
    from mezzotint.training.pair import train_side_by_side
    from mezzotint.training.progress import TerminalReporter
    from mezzotint.training.rundir import RunDirectory, folder_name, free_path
    from mezzotint.training.trainer import Trainer

    base = with_settings(find_recipe("demo"), settings or [])
    names = ["float32", policy]
    configs = [with_settings(base, [f'policy="{name}"']) for name in names]
    corpus = open_corpus(base.data, block_size=base.model.block_size)
    trainers = [Trainer(config, corpus) for config in configs]
    folder = free_path(out)
    console = progress_console()
    parameters = sum(p.numel() for p in trainers[0].model.parameters())
    console.print(
        f"training a language model of {parameters:,} parameters on {corpus.num_train:,} tokens of Python source, "
        f"{base.train.steps} steps, in {names[0]} and in {names[1]}, turn by turn",
        soft_wrap=True,
    )
    runs = [
        RunDirectory.create(free_path(folder / folder_name(name)), to_toml(config))
        for name, config in zip(names, configs, strict=True)
    ]
    with TerminalReporter(console, base.train.steps) as reporter:
        arms = train_side_by_side(trainers, names, runs, _progress(reporter, base.train.steps))
    if is_json:
        print_json(
            "demo", {**_circumstances(), "arms": [asdict(arm) for arm in arms], "runs": [str(run.path) for run in runs]}
        )
        return
    output = result_console()
    output.print(comparison(arms))
    output.print()
    output.print(CAVEAT, soft_wrap=True)
    output.print(f"Configurations and metrics are in {folder}.", markup=False, soft_wrap=True)


def _circumstances() -> dict[str, Any]:
    """Return date and machine, which the figures belong to."""
    import datetime

    import torch

    from mezzotint.hardware.probe import probe

    facts = probe(None)
    machine = {"cpu": facts.name, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    return {"date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(), "machine": machine}


def _progress(reporter: "TerminalReporter", num_updates: int) -> Callable[[int, dict[str, float], float], None]:
    """Return a function that shows each round as one moving line, or as a plain line now and then."""
    from mezzotint.training.progress import Stopwatch, duration

    stopwatch = Stopwatch()

    def show(step: int, losses: dict[str, float], seconds: float) -> None:
        stopwatch.add(seconds)
        words = "  ".join(f"{name} loss {loss:.3f}" for name, loss in losses.items())
        left = duration((num_updates - step) * stopwatch.mean_seconds)
        reporter.line(step, f"{words}  {stopwatch.mean_seconds:.2f} s/round  ETA {left}")

    return show


def comparison(arms: "Sequence[Arm]") -> Table:
    """Return the table of two arms and the ratio of the second to the first."""
    first, second = arms
    table = Table(title="side by side", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for column in (first.name, second.name, "ratio"):
        table.add_column(column, justify="right")
    rows: list[tuple[str, Callable[[Arm], float], str]] = [
        ("validation loss, nats/token", lambda arm: arm.validation_loss, "{:.4f}"),
        ("training loss, last tenth", lambda arm: arm.train_loss, "{:.4f}"),
        ("step time, s (median)", lambda arm: arm.seconds_per_update, "{:.3f}"),
        ("tokens per second", lambda arm: arm.tokens_per_second, "{:,.0f}"),
        ("activations at end of forward, MiB", lambda arm: arm.step_memory.activations_bytes / MEBIBYTE, "{:,.1f}"),
        ("peak of a step above idle, MiB", lambda arm: arm.step_memory.peak_bytes / MEBIBYTE, "{:,.1f}"),
        ("state, bytes per parameter", lambda arm: arm.state_memory.bytes_per_parameter, "{:.2f}"),
    ]
    for label, read, spelling in rows:
        left, right = read(first), read(second)
        ratio = f"{right / left:.3f}"
        if label.startswith("step time"):
            ratio = f"{second.time_ratio:.3f} ±{second.time_ratio_spread:.3f}"
        table.add_row(label, spelling.format(left), spelling.format(right), ratio)
    return table
