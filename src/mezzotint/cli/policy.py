"""`mezzotint policy`: what autocast does to each operation in the installed torch, and what changed between two."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mezzotint.cli.options import refuse
from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console
from mezzotint.errors import PolicyError
from mezzotint.files import write_whole

if TYPE_CHECKING:
    from mezzotint.policy.autocast import Snapshot


def policy(
    context: typer.Context,
    operation: Annotated[
        str | None, typer.Argument(help="An operation, as torch names it: softmax, rms_norm, ...", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    dtype: Annotated[str, typer.Option(help="The autocast dtype: bf16 or fp16.")] = "bf16",
    save: Annotated[Path | None, typer.Option(help="Write a snapshot of all rules.", show_default=False)] = None,
    diff: Annotated[
        Path | None, typer.Option(help="Compare with the snapshot of another torch.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="With --diff: a second snapshot, instead of the installed torch.", show_default=False),
    ] = None,
    is_json: JsonOption = False,
) -> None:
    """Show what autocast does to each operation, asked of the installed torch; for CUDA no GPU is needed.

    Exit code 0; with --diff 1 where something changed.
    """
    from mezzotint.policy.autocast import DEVICES, load_snapshot

    if device not in DEVICES:
        raise PolicyError(f"--device is {device!r}; autocast's rules are known for cuda and cpu")
    if dtype not in _DTYPES:
        raise PolicyError(f"--dtype is {dtype!r}; give bf16 or fp16")
    _refuse_useless(context)
    if against is not None and diff is None:
        raise PolicyError("--against names the newer of two snapshots; name the older with --diff")
    if save is not None and not os.access(save.resolve().parent, os.W_OK):
        raise PolicyError(f"{save.resolve().parent} cannot be written to; pass another --save")
    old = load_snapshot(diff) if diff is not None else None
    snapshot = load_snapshot(against) if against is not None else _ask(dtype)
    if save is not None:
        try:
            write_whole(save, json.dumps(snapshot.to_json(), indent=1) + "\n")
        except OSError as error:
            raise PolicyError(f"{save} cannot be written: {error.strerror or error}; pass another --save") from None
        progress_console().print(f"mezzotint: wrote {save}", markup=False, soft_wrap=True)
    if old is not None:
        raise typer.Exit(_print_changes(old, snapshot, is_json=is_json))
    if operation is not None:
        _print_operation(snapshot, operation, is_json=is_json)
    elif is_json:
        print_json("policy", snapshot.to_json() | {"schema": "mezzotint.policy/1"})
    elif save is None:
        print_rules(result_console(), snapshot, device)


_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def _refuse_useless(context: typer.Context) -> None:
    """Raise ConfigError for options without an effect."""
    if context.params["diff"] is not None:
        refuse(context, ("operation", "device"), "with --diff, which compares all rules; leave it out")
    if context.params["against"] is not None:
        refuse(context, ("dtype",), "with --against, which asks no torch; leave it out")
    if any(context.params[name] for name in ("is_json", "operation", "save")):
        refuse(context, ("device",), "here: both devices are shown; leave it out")


def _ask(dtype: str) -> "Snapshot":
    import torch

    from mezzotint.ghost.autocast import autocast_snapshot

    with progress_console().status("asking torch"):
        return autocast_snapshot(getattr(torch, _DTYPES[dtype]))


def print_rules(console: Console, snapshot: "Snapshot", device: str) -> None:
    """Print the lists of a device, then where the documentation says something else."""
    from mezzotint.policy.autocast import Rule, differences

    names: dict[Rule, list[str]] = {}
    for name, overloads in snapshot.names(device).items():
        for rule in dict.fromkeys(overloads.values()):
            names.setdefault(rule, []).append(name)
    console.print(
        Text(f"torch {snapshot.torch}, torch.autocast({device!r}, dtype=torch.{snapshot.dtype})", style="bold")
    )
    for rule in Rule:
        if rule in names:
            console.print(Text(f"\n{rule.words} ({len(names[rule])})", style="bold"))
            console.print(Text(", ".join(names[rule])))
    console.print(Text("\nall others run in what they get. Of these, and of functions made of parts:", style="bold"))
    kernels = snapshot.names(device)
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, parts in sorted(snapshot.parts[device].items()):
        if name not in kernels:
            table.add_row(name, Text(parts))
    console.print(table)
    found = differences(snapshot, device)
    written = [one for one in found if one.written is not None]
    unwritten = [one for one in found if one.written is None and not one.name.startswith("_")]
    if written:
        console.print(Text("\nnot as torch's documentation has it", style="bold"))
        table = Table(box=None, pad_edge=False)
        for heading in ("operation", "written", "what it does"):
            table.add_column(heading, header_style="bold", overflow="fold")
        for one in written:
            table.add_row(one.name, str(one.written), Text(one.found))
        console.print(table)
    if unwritten:
        console.print(Text("\nnot in the documentation", style="bold"))
        by_rule: dict[str, list[str]] = {}
        for one in unwritten:
            by_rule.setdefault(one.found, []).append(one.name)
        for words, members in by_rule.items():
            console.print(Text(f"{words}: {', '.join(members)}"))


def _print_operation(snapshot: "Snapshot", name: str, *, is_json: bool) -> None:
    from difflib import get_close_matches

    from mezzotint.policy.autocast import DEVICES, documented

    known = {one for device in DEVICES for one in (*snapshot.names(device), *snapshot.parts[device])}
    written = {device: documented()[device].get(name) for device in DEVICES}
    if name not in known and not any(written.values()):
        close = get_close_matches(name, sorted(known), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "mezzotint policy lists those that it changes"
        raise PolicyError(f"autocast has no rule for {name!r}, which runs in what it gets, if it exists; {hint}")
    facts = {
        device: {
            "written": None if (rule := written[device]) is None else str(rule),
            "rules": {key: str(one) for key, one in snapshot.names(device).get(name, {}).items()},
            "parts": snapshot.parts[device].get(name),
        }
        for device in DEVICES
    }
    if is_json:
        print_json("policy", {"torch": snapshot.torch, "dtype": snapshot.dtype, "operation": name, "devices": facts})
        return
    console = result_console()
    console.print(Text(f"{name}, torch {snapshot.torch}, autocast to {snapshot.dtype}", style="bold"))
    table = Table(box=None, pad_edge=False)
    for heading in ("device", "written", "rule", "what ran"):
        table.add_column(heading, header_style="bold", overflow="fold")
    for device in DEVICES:
        overloads = snapshot.names(device).get(name, {})
        words = "; ".join(dict.fromkeys(rule.words for rule in overloads.values())) or "no kernel: runs in what it gets"
        table.add_row(device, str(written[device] or "-"), words, snapshot.parts[device].get(name, "-"))
    console.print(table)


def _print_changes(old: "Snapshot", new: "Snapshot", *, is_json: bool) -> int:
    from mezzotint.policy.autocast import changes

    if old.dtype != new.dtype:
        raise PolicyError(f"the snapshots are of autocast to {old.dtype} and to {new.dtype}; compare the same dtype")
    found = changes(old, new)
    if is_json:
        rows = [{"device": one.device, "name": one.name, "old": one.old, "new": one.new} for one in found]
        print_json("policy", {"old": old.torch, "new": new.torch, "changes": rows})
        return 1 if found else 0
    console = result_console()
    if not found:
        console.print(f"autocast does the same in torch {old.torch} and {new.torch}")
        return 0
    table = Table(box=None, pad_edge=False)
    for heading in ("device", "operation", f"torch {old.torch}", f"torch {new.torch}"):
        table.add_column(heading, header_style="bold", overflow="fold")
    for one in found:
        table.add_row(one.device, one.name, Text(one.old or "no kernel"), Text(one.new or "no kernel"))
    console.print(table)
    return 1
