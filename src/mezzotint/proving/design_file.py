"""config.toml of a proof: the whole design as TOML, and back to an equal value."""

import json
import tomllib
from collections.abc import Mapping
from typing import Any

from mezzotint.errors import ConfigError, ProofError, shortened
from mezzotint.parity.design import Experiment

HEADER = "# A design of `mezzotint prove`. Run it again with: mezzotint prove THIS_FILE\n"


def design_to_toml(experiment: Experiment) -> str:
    """Return the whole design as TOML; `design_from_toml` reads it back to an equal value."""
    data = experiment.to_json()
    tables = {name: data.pop(name) for name in ("arms", "metrics")}
    lines = [HEADER, *(f"{key} = {_toml(value)}" for key, value in data.items() if value is not None)]
    for name, rows in tables.items():
        for row in rows:
            lines += ["", f"[[{name}]]", *(f"{key} = {_toml(value)}" for key, value in row.items())]
    return "\n".join(lines) + "\n"


def design_from_toml(text: str, origin: str) -> Experiment:
    """Return the design that `text` spells. Raises ProofError where it spells none."""
    values = _parsed(text, origin)
    values.setdefault("steps", None)
    try:
        return Experiment.from_json(values)
    except ConfigError as error:
        raise ProofError(f"{origin}: {error}") from None
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise ProofError(f"{origin} is no design of mezzotint prove: {shortened(error)}") from None


def is_design(text: str) -> bool:
    """Return whether a TOML text is a design, and not a recipe."""
    try:
        return "arms" in tomllib.loads(text)
    except (ValueError, RecursionError):
        return False


def _parsed(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise ProofError(f"{origin} is not TOML: {shortened(error)}") from None


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    is_plain = isinstance(value, str) and all(letter.isprintable() or letter == "\n" for letter in value)
    if is_plain and "\n" in value and "'''" not in value:
        return f"'''\n{value}'''"
    if isinstance(value, str):
        # TOML escapes what JSON escapes, and DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        raise TypeError(f"{value} is no value of a design")
    return repr(value)
