"""Figures that were measured once, from the dated records of the repository's benchmarks.

`recorded.json` is a part of the package, so that an installed command can quote it; `scripts/claims_page.py` distils it
from `benchmarks/`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A claim's recorded figures; `source` says when and on what, and `path` where the whole record is."""

    figures: Mapping[str, Any]
    source: str
    path: str


def read_records(text: str) -> dict[str, Recorded]:
    """Return the records by claim."""
    return {name: Recorded(**entry) for name, entry in json.loads(text).items()}


@cache
def records() -> dict[str, Recorded]:
    """Return the records that the package has."""
    return read_records(resources.files("mezzotint.claims").joinpath("recorded.json").read_text(encoding="utf-8"))
