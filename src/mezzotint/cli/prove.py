"""`mezzotint prove`: train in pairs, seed by seed, and say whether anything was lost, with an interval."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from mezzotint.cli.options import refuse_all_but
from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console, script_output
from mezzotint.files import write_whole

if TYPE_CHECKING:
    from mezzotint.parity.design import Experiment
    from mezzotint.proving.store import ProofFolder

DEFAULT_RECIPE = "demo"
DEFAULT_SEEDS = 5
INTERRUPTED = 130  # 128 + SIGINT


class ProveCommand(TyperCommand):
    """Options may stand on both sides of a recipe's name; what follows a script's name is the script's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put options that follow a recipe before it."""
        from mezzotint.proving.targets import is_script

        found, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
        target = found.get("target")
        if rest and isinstance(target, str) and not is_script(target):
            args = [*rest, *args[: len(args) - len(rest)]]
            found, rest, _ = self.make_parser(ctx).parse_args(args=list(args))
            if rest or found.get("target") != target:
                raise typer.BadParameter(f"{target} is a recipe, which takes no arguments; options begin with --")
        return super().parse_args(ctx, args)


def prove(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            help="A recipe, a TOML file, or SCRIPT.py:make_run with its arguments. Default: the demo recipe.",
            show_default=False,
        ),
    ] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            metavar="NAME[=POLICY[,KEY=VALUE...]]",
            help="A way to train; the first is the control. Repeatable. Default: float32 and bf16-mixed.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=2, help="How many seeds. Default: 5.", show_default=False)] = None,
    max_seeds: Annotated[
        int, typer.Option(min=0, help="Add seeds up to this many, until the verdict stands.", show_default=False)
    ] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each run.", show_default=False)] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME[:MARGIN][:higher|lower|neither]",
            help="A figure that decides, e.g. accuracy:1%:higher or auc:0.002abs:higher. Repeatable.",
            show_default=False,
        ),
    ] = None,
    margin: Annotated[
        float | None, typer.Option(min=0.0, help="The share by which losses may differ. Default: 0.005.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="The largest chance of a false 'equivalent'.")] = 0.05,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe, in all arms. Repeatable."),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Seeds to run at a time, where memory allows. Default: 1.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make.", show_default=False)] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with this folder, to the same verdict.", show_default=False)
    ] = None,
    summary: Annotated[
        Path | None, typer.Option(help="Write the Markdown summary here too.", show_default=False)
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Train in float32 and in another precision, seed by seed in pairs, and say whether anything was lost.

    Exit code 0: equivalent or better, 1: worse or invalid, 3: undecided, 2: misuse.
    """
    from mezzotint.proving.runner import start_proof
    from mezzotint.proving.store import ProofFolder
    from mezzotint.proving.targets import experiment_for

    if resume is not None:
        refuse_all_but(
            context,
            ("resume", "summary", "is_json"),
            "with --resume, which goes on with the folder's own design; start a new proof to change it",
        )
        folder = ProofFolder.open(resume)
    else:
        experiment = experiment_for(
            target or DEFAULT_RECIPE,
            arguments=context.args,
            arms=arms or [],
            seeds=seeds or DEFAULT_SEEDS,
            max_seeds=max_seeds,
            steps=steps,
            metrics=metrics or [],
            margin=margin,
            alpha=alpha,
            settings=settings or [],
        )
        folder = start_proof(out or free_folder(experiment), experiment, command_line(), jobs=jobs or 1)
    raise typer.Exit(carry_out(folder, summary=summary, is_json=is_json))


def free_folder(experiment: "Experiment") -> Path:
    """Return runs/prove-<target>, with a number where that exists."""
    from mezzotint.training.rundir import folder_name, free_path

    name = Path(experiment.target).name.removesuffix(".toml")
    return free_path(Path("runs") / folder_name(f"prove-{name}"))


def command_line() -> str:
    """Return what was typed."""
    return shlex.join(["mezzotint", *sys.argv[1:]])


def carry_out(folder: "ProofFolder", *, summary: Path | None, is_json: bool, schema: str = "prove") -> int:
    """Run what is missing, tell the result, and return the exit code."""
    from mezzotint.cli.proof_progress import ProofProgress
    from mezzotint.proving.conclusion import finite, write_proof
    from mezzotint.proving.runner import run_proof
    from mezzotint.report.proof_text import markdown, print_proof

    with _stopping(folder), script_output(is_result=False), ProofProgress(progress_console(), folder) as progress:
        proof = run_proof(folder, progress)
    refusals = write_proof(folder, proof)
    if summary is not None:
        refusals += _write_summary(summary, markdown(proof))
    if is_json:
        print_json(schema, {**finite(proof.to_json()), "exit_code": proof.exit_code, "folder": str(folder.path)})
    else:
        print_proof(result_console(), proof, report_path=str(folder.path / "report.html"))
    for refusal in refusals:
        progress_console().print(f"mezzotint: error: {refusal}", markup=False, soft_wrap=True)
    return 2 if refusals else proof.exit_code


def _write_summary(path: Path, text: str) -> list[str]:
    try:
        write_whole(path, text)
    except OSError as error:
        return [f"{path} cannot be written: {error.strerror or error}"]
    return []


@contextmanager
def _stopping(folder: "ProofFolder") -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the command with a word on how to go on."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        seeds = sum(folder.read_seed(seed) is not None for seed in folder.experiment.all_seeds())
        progress_console().print(
            f"stopped; {seeds} seed{'s are' if seeds != 1 else ' is'} finished and kept. Go on with:\n"
            f"  mezzotint prove --resume {shlex.quote(str(folder.path))}",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
