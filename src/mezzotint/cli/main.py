"""The `mezzotint` command: registers one file per command, and turns errors into one sentence and exit code 2."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from mezzotint.cli.audit import audit
from mezzotint.cli.bench import bench
from mezzotint.cli.claims import claims
from mezzotint.cli.demo import demo
from mezzotint.cli.doctor import doctor
from mezzotint.cli.formats import formats
from mezzotint.cli.plan import plan
from mezzotint.cli.policy import policy
from mezzotint.cli.prove import ProveCommand, prove
from mezzotint.cli.rules import rules
from mezzotint.cli.train import train
from mezzotint.errors import MezzotintError, described, shortened
from mezzotint.process import has_run_script, num_scripts
from mezzotint.version import package_version


class Commands(TyperGroup):
    """The commands; typer's own errors, which repeat what was typed, are shortened as ours are."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the options before the command."""
        with _short_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Read the options of the command, and run it."""
        with _short_errors():
            return super().invoke(ctx)


@contextmanager
def _short_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message") and isinstance(message := getattr(error, "message", None), str):
            error.message = shortened(message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="mezzotint",
    cls=Commands,
    help="Mixed precision training for PyTorch that you can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (doctor, formats, bench, train, demo, policy, rules, claims):
    app.command()(command)
# what follows the script's name is the script's
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(audit)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(plan)
app.command(
    cls=ProveCommand,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
)(prove)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        sys.stdout.write(f"mezzotint {package_version()}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Mixed precision training for PyTorch that you can trust."""


def main() -> None:
    """Run the command line; the entry point of the `mezzotint` script."""
    before = num_scripts()
    try:
        app()
    except SystemExit as error:
        _end(error.code if isinstance(error.code, int) else 2, before)
    except MezzotintError as error:
        sys.stderr.write(f"mezzotint: error: {error}\n")
        _end(2, before)
    except BrokenPipeError:
        # the reader (head, less) has gone: stop quietly, and keep the interpreter from flushing into the closed pipe
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"mezzotint: error: {shortened(error.filename)} cannot be used: {error.strerror}\n")
        _end(2, before)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            sys.stderr.write(
                "mezzotint: error: PyTorch is not installed for this Python; install it: pip install torch\n"
            )
            _end(2, before)
        if not has_run_script(before):
            raise
        sys.stderr.write(
            f"mezzotint: error: the command could not go on after the script: {described(error)[:300]}; nothing is "
            "said of it\n"
        )
        _end(2, before)


def _end(code: int, before: int) -> NoReturn:
    if not has_run_script(before):
        sys.exit(code)
    from mezzotint.torch_internals.python import end_after_script

    end_after_script(code)


if __name__ == "__main__":
    main()
