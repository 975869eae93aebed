"""docs/autocast.md: what the installed torch's autocast does, asked of its own kernels."""

from itertools import pairwise
from pathlib import Path

from mezzotint.ghost.autocast import autocast_snapshot
from mezzotint.policy.autocast import DEVICES, Rule, Snapshot, changes, differences, load_snapshot

RECORDS = Path(__file__).resolve().parents[1] / "benchmarks" / "records"

INTRODUCTION = """\
# What autocast does

Asked of torch {torch} by `python scripts/generate_docs.py`; `mezzotint policy` asks the torch that you have, for CUDA
without a GPU. Every operation with an autocast kernel is called with inputs of the autocast dtype, of float32 and of
both, and what the kernel passes on is looked at. The CUDA lists are tested against the header that torch is built with.
float16 and bfloat16 take the same lists, with one difference: a float16 softmax reads float16 and writes float32, a
bfloat16 one is copied to float32 first.

    mezzotint policy                      the lists of CUDA, and where the documentation has it otherwise
    mezzotint policy rms_norm             one operation, on CUDA and on the CPU
    mezzotint policy --save before.json   keep this torch's rules
    mezzotint policy --diff before.json   after an upgrade: what changed (exit code 1)
"""


def page() -> str:
    """Return the page."""
    snapshot = autocast_snapshot()
    lines = [INTRODUCTION.format(torch=snapshot.torch.partition("+")[0])]
    for device in DEVICES:
        lines += _device(snapshot, device)
    lines += _versions()
    return "\n".join([*lines, ""])


def _versions() -> list[str]:
    """What the recorded snapshots of several torch versions differ in."""
    paths = sorted(RECORDS.glob("autocast-*.json"), key=lambda path: [int(n) for n in path.stem[9:].split(".")])
    snapshots = [load_snapshot(path) for path in paths]
    lines = ["## Between versions", ""]
    lines += [
        f"From snapshots of the builds {', '.join(one.torch for one in snapshots)} (`benchmarks/records/autocast-*`),"
    ]
    lines += ["without overloads for named dimensions:", "", "| from | to | device | operation | before | after |"]
    lines += ["|---|---|---|---|---|---|"]
    for old, new in pairwise(snapshots):
        for one in changes(old, new):
            if "dimname" in one.name.lower() or "names" in one.name:
                continue
            cells = old.torch, new.torch, one.device, f"`{one.name}`", one.old or "no kernel", one.new or "no kernel"
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _device(snapshot: Snapshot, device: str) -> list[str]:
    by_rule: dict[Rule, list[str]] = {}
    for name, overloads in snapshot.names(device).items():
        for rule in dict.fromkeys(overloads.values()):
            by_rule.setdefault(rule, []).append(f"`{name}`")
    lines = [f'## `torch.autocast("{device}", dtype=torch.{snapshot.dtype})`', ""]
    lines += [f"- {rule.words}: {', '.join(by_rule[rule])}" for rule in Rule if rule in by_rule]
    lines += ["", "All others run in what they get. What became of some functions, given bfloat16:", ""]
    lines += ["| function | operations |", "|---|---|"]
    lines += [f"| `{name}` | {parts} |" for name, parts in sorted(snapshot.parts[device].items())]
    written = [one for one in differences(snapshot, device) if one.written is not None]
    if written:
        lines += [
            "",
            "Not as torch's documentation has it:",
            "",
            "| operation | written | what it does |",
            "|---|---|---|",
        ]
        lines += [f"| `{one.name}` | {one.written} | {one.found} |" for one in written]
    unwritten = [f"`{one.name}`" for one in differences(snapshot, device) if one.written is None]
    return [*lines, "", f"With a rule, and not in the documentation: {', '.join(unwritten)}.", ""]
