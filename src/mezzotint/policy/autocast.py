"""What autocast does to operations: the rules found in an installed torch, beside those that its documentation lists.

A snapshot is data: it is saved, and compared with that of another torch, so that silent changes of an upgrade are seen
(`rms_norm` became float32 in 2.12). `ghost/autocast.py` makes snapshots. No torch here.
"""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path

from mezzotint.errors import PolicyError, shortened
from mezzotint.files import read_regular

SCHEMA = "mezzotint.autocast/1"
DEVICES = ("cuda", "cpu")


class Rule(StrEnum):
    """What autocast does to an operation's floating-point inputs."""

    LOWER = "lower"  # cast to the autocast dtype
    FLOAT32 = "float32"  # cast to float32
    OUTPUT = "float32 output"  # inputs stay, the operation is asked for a float32 result
    PROMOTE = "promote"  # mixed inputs are cast to the widest of them
    ERROR = "error"  # refused
    NONE = "as given"  # the operation has a kernel that changes nothing
    UNKNOWN = "unknown"  # it has a kernel that could not be asked

    @property
    def words(self) -> str:
        """The rule in words, for a reader."""
        return _WORDS[self]


_WORDS = {
    Rule.LOWER: "runs in the autocast dtype",
    Rule.FLOAT32: "runs in float32",
    Rule.OUTPUT: "reads what it gets, writes float32",
    Rule.PROMOTE: "runs in the widest dtype of its inputs",
    Rule.ERROR: "raises an error",
    Rule.NONE: "runs in what it gets",
    Rule.UNKNOWN: "has a rule that could not be asked",
}
# names that the documentation gives to operations of another name
_OPERATION = {
    "__matmul__": "matmul", "__pow__": "pow", "__rpow__": "pow", "__rdiv__": "reciprocal", "__rtruediv__": "reciprocal",
    "GRUCell": "gru_cell", "LSTMCell": "lstm_cell", "RNNCell": "rnn_tanh_cell", "multi_dot": "linalg_multi_dot",
    "grid_sample": "grid_sampler",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What one torch does: rules by device and overload (`softmax.int`), and `parts` of functions without a kernel.

    `parts` maps a device and a function (`cross_entropy`) to the operations it became for inputs of the autocast dtype,
    each with the dtype of what it read and wrote.
    """

    torch: str
    dtype: str
    rules: Mapping[str, Mapping[str, Rule]]
    parts: Mapping[str, Mapping[str, str]]

    def names(self, device: str) -> dict[str, dict[str, Rule]]:
        """Return the rules by name and overload; most names have one rule."""
        found: dict[str, dict[str, Rule]] = {}
        for overload, rule in sorted(self.rules[device].items()):
            found.setdefault(overload.partition(".")[0], {})[overload] = rule
        return found

    def rule_of(self, device: str, name: str) -> Rule | None:
        """Return the rule of a name (of its first overload, where they differ); None without a kernel."""
        overloads = self.names(device).get(name)
        return next(iter(overloads.values())) if overloads else None

    def to_json(self) -> dict[str, object]:
        """Return what `--save` writes."""
        return {
            "schema": SCHEMA,
            "torch": self.torch,
            "dtype": self.dtype,
            "rules": {
                device: {name: str(rule) for name, rule in sorted(rules.items())}
                for device, rules in self.rules.items()
            },
            "parts": {device: dict(sorted(parts.items())) for device, parts in self.parts.items()},
        }


def load_snapshot(path: Path) -> Snapshot:
    """Read a snapshot that `mezzotint policy --save` wrote; raises PolicyError where it is none."""
    try:
        body = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise PolicyError(
            f"{shortened(path)} is no snapshot of autocast's rules ({shortened(error)}); write one with --save"
        ) from None
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        raise PolicyError(f"{path} is no snapshot of autocast's rules (schema {SCHEMA}); write one with --save")
    try:
        if not isinstance(body["torch"], str) or body["dtype"] not in ("bfloat16", "float16"):
            raise ValueError("torch must be a version, dtype bfloat16 or float16")
        return Snapshot(
            torch=shortened(body["torch"], 40),
            dtype=body["dtype"],
            rules={device: {name: Rule(rule) for name, rule in body["rules"][device].items()} for device in DEVICES},
            parts={device: dict(body["parts"][device]) for device in DEVICES},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise PolicyError(
            f"{shortened(path)} is a damaged snapshot of autocast's rules ({shortened(error)}); write it again"
        ) from None


@dataclass(frozen=True, slots=True)
class Change:
    """What one operation does in an older and a newer torch; None where it has no kernel."""

    device: str
    name: str
    old: str | None
    new: str | None


def changes(old: Snapshot, new: Snapshot) -> list[Change]:
    """Return what differs between two snapshots, by device and name."""
    found = []
    for device in DEVICES:
        for before, after in (
            ({name: str(rule) for name, rule in old.rules[device].items()},
             {name: str(rule) for name, rule in new.rules[device].items()}),
            (dict(old.parts[device]), dict(new.parts[device])),
        ):  # fmt: skip
            for name in sorted({*before, *after}):
                if before.get(name) != after.get(name):
                    found.append(Change(device, name, before.get(name), after.get(name)))
    return found


@cache
def documented() -> dict[str, dict[str, Rule]]:
    """Return the lists of torch's autocast operation reference by device and the name written there.

    Source: https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference, torch 2.13.
    """
    text = resources.files("mezzotint.policy").joinpath("autocast_documented.csv").read_text(encoding="utf-8")
    found: dict[str, dict[str, Rule]] = {device: {} for device in DEVICES}
    for row in csv.DictReader(text.splitlines()):
        found[row["device"]][row["name"]] = Rule(row["rule"])
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """An operation that is not documented as it is: `written` None where the lists do not name it."""

    device: str
    name: str
    written: Rule | None
    found: str


def differences(snapshot: Snapshot, device: str) -> list[Difference]:
    """Return where the documentation and the installed torch disagree on a device, what is written first."""
    written = documented()[device]
    known = snapshot.names(device)
    operations = {name: _OPERATION.get(name, name) for name in written}
    found = []
    for name, rule in written.items():
        operation = operations[name]
        if operation not in known:
            parts = snapshot.parts[device].get(name)
            found.append(Difference(device, name, rule, f"no kernel; {parts}" if parts else "no kernel of its own"))
            continue
        for overload, actual in known[operation].items():
            if actual is not rule:
                found.append(Difference(device, overload, rule, actual.words))
    listed = {*operations.values(), *written}
    for name, overloads in known.items():
        if name not in listed:
            rules = {rule.words for rule in overloads.values()}
            found.append(Difference(device, name, None, " or ".join(sorted(rules))))
    return found
