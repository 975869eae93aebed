"""How fast cards of a kind talk to each other: within a machine, and between machines.

The table is `links.csv`: bytes per second in one direction for each card, in 10**9, the usual number of cards in a
machine, and where the figures are from.
"""

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources

from mezzotint.errors import PlanError
from mezzotint.hardware.devices import DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Bytes per second, each way and for each card, `within` a machine of `node` cards and `between` machines."""

    within: float
    between: float
    node: int
    source: str


def links_of(card: DeviceSpec) -> Links:
    """Return the links of a card of the table, or of the one that it was made from.

    Raises PlanError where no source states them.
    """
    found = next((_table()[name] for name in (card.name, *card.device_names) if name in _table()), None)
    if found is None:
        raise PlanError(f"no source states the links between several {card.name}; known are {', '.join(_table())}")
    return found


@cache
def _table() -> dict[str, Links]:
    text = resources.files("mezzotint.hardware").joinpath("links.csv").read_text(encoding="utf-8")
    return {
        name: Links(
            within=float(row["within_gb_per_second"]) * 1e9,
            between=float(row["between_gb_per_second"]) * 1e9,
            node=int(row["node"]),
            source=row["source"],
        )
        for row in csv.DictReader(text.splitlines())
        for name in row["cards"].split(";")
    }
