"""Options without an effect are refused: which ones were given, and in which mode each of them means nothing."""

from collections.abc import Iterable

import typer

from mezzotint.errors import ConfigError


def given(context: typer.Context) -> dict[str, str]:
    """Return the parameters on the command line, each by its name in Python and as it is spelled there."""
    named = {}
    for parameter in context.command.params:
        # by name: typer may bring its own copy of click, whose enum is another
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name != "DEFAULT":
            name = parameter.name or ""
            off = parameter.secondary_opts if context.params.get(name) is False else []
            named[name] = [*off, *parameter.opts][0] if parameter.param_type_name == "option" else name.upper()
    return named


def refuse(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise ConfigError for parameters that were given and have no effect; `why` says in which mode, and what to do."""
    found = given(context)
    useless = [found[name] for name in names if name in found]
    if useless:
        raise ConfigError(f"{' and '.join(useless)} would have no effect {why}")


def refuse_all_but(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Like `refuse`, for every parameter but these."""
    kept = set(names)
    refuse(context, [name for name in given(context) if name not in kept], why)
