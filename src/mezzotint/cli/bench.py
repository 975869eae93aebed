"""`mezzotint bench`: how fast the operations of a training step are in each number format, honestly timed."""

import json as json_module
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import refuse, refuse_all_but
from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console
from mezzotint.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mezzotint.bench.cases import Case
    from mezzotint.bench.compare import Comparison
    from mezzotint.bench.result import BenchResult

DeviceOption = Annotated[str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda:0, mps, ...")]
OpsOption = Annotated[
    str,
    typer.Option(
        "--ops", metavar="LIST", help="matmul, attention, norm, elementwise, update, or single operations, by comma."
    ),
]
FormatsOption = Annotated[
    str | None, typer.Option("--formats", metavar="LIST", help="Formats beside float32, by comma; all by default.")
]
SizesOption = Annotated[
    str | None, typer.Option("--sizes", metavar="LIST", help="Square products of these sizes instead: 512,1024.")
]
ShapesOption = Annotated[
    list[str] | None, typer.Option("--shape", metavar="MxNxK", help="A product of this shape instead; repeatable.")
]
SecondsOption = Annotated[
    float, typer.Option("--seconds", min=1.0, max=3600.0, help="About how long; emulated formats come on top.")
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the report, one HTML file.")]
SaveOption = Annotated[Path | None, typer.Option("--save", metavar="FILE", help="Write the JSON, for --compare.")]
CompareOption = Annotated[
    tuple[Path, Path] | None,
    typer.Option("--compare", metavar="A.json B.json", help="Compare two saved runs; nothing is timed."),
]


def bench(
    context: typer.Context,
    device: DeviceOption = None,
    ops: OpsOption = "matmul,attention,norm,elementwise,update",
    formats: FormatsOption = None,
    sizes: SizesOption = None,
    shape: ShapesOption = None,
    seconds: SecondsOption = 40.0,
    out: OutOption = None,
    save: SaveOption = None,
    compare: CompareOption = None,
    json: JsonOption = False,
) -> None:
    """Time matrix products, attention, norms, elementwise operations and the optimizer's update in each format.

    All formats of a case take turns, and float32 runs twice a round to know the noise. With --compare, exits with 1
    where the second run is slower.
    """
    if compare is not None:
        refuse_all_but(context, ("compare", "json"), "with --compare, which times nothing; leave it out")
        _compare(*compare, as_json=json)
        return
    from mezzotint.bench.cases import GROUPS, chosen_ops

    if not chosen_ops(_list(ops)) & set(GROUPS["matmul"]):
        refuse(context, ("sizes", "shape"), "without matmul among --ops; add it")
    _check_writable(out, save)
    from mezzotint.bench.cases import FORMATS, parse_shape, suite
    from mezzotint.bench.result import to_json
    from mezzotint.formats.catalog import find_format

    names = [find_format(name).name for name in _list(formats)] if formats else list(FORMATS)
    if unknown := [name for name in names if name not in FORMATS]:
        raise ConfigError(f"{unknown[0]} is not timed; pass {', '.join(FORMATS)}")
    squares = [_size(text) for text in _list(sizes)] if sizes else []
    shapes = [parse_shape(text) for text in shape or []]
    where = device or _first_device()
    cases = suite(where.partition(":")[0], ops=_list(ops), sizes=squares, shapes=shapes)
    result = _run(where, cases, names, seconds, is_quiet=json)
    payload = to_json(result)
    if save is not None:
        _write(save, json_module.dumps({"schema": "mezzotint.bench/1", **payload}, indent=1) + "\n")
    if out is not None:
        from mezzotint.report.bench import bench_page
        from mezzotint.report.page import write_page

        write_page(out, bench_page(result, shlex.join(["mezzotint", *sys.argv[1:]])))
    if json:
        print_json("bench", payload)
        return
    console = result_console()
    for part in render(result):
        console.print(part)
    for path in (out, save):
        if path is not None:
            progress_console().print(f"written: {path}", markup=False)


def _run(device: str, cases: "tuple[Case, ...]", names: list[str], seconds: float, *, is_quiet: bool) -> "BenchResult":
    from mezzotint.bench.run import run

    progress = progress_console()
    if is_quiet or not progress.is_terminal:
        return run(device, cases, names, seconds=seconds)
    with progress.status("measuring ...") as status:
        return run(
            device,
            cases,
            names,
            seconds=seconds,
            progress=lambda index, count, case: status.update(f"{index + 1}/{count} {case}"),
        )


def _first_device() -> str:
    from mezzotint.hardware.probe import probe_devices

    return probe_devices()[0].device


def render(result: "BenchResult") -> "list[RenderableType]":
    """Return what the terminal shows, part by part."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mezzotint.bench.result import TOO_NOISY
    from mezzotint.report.bench import refusals, spell_rate, summarise, table_rows

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("operation, format", no_wrap=True)
    for name in ("median", "speed", "of peak", "time/fp32"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    styles = {"good": "green", "bad": "red", "unsure": "yellow"}
    for found in result.cases:
        table.add_row(Text(str(found.case), style="bold"))
        for row in table_rows(result, found):
            verdict = Text(row["verdict"], style=styles.get(row["style"], ""))
            words = (row["median"], row["speed"], row["share"], row["ratio"].partition(" ")[0])
            table.add_row(f"  {row['label']}", *words, verdict)
    roofs = ", ".join(
        f"{roof.format or 'memory'} {spell_rate(roof.value, 'FLOP/s' if roof.format else 'B/s')} ({roof.source})"
        for roof in result.roofs
    )
    heading = Text.assemble((result.device, "bold cyan"), "  ", (result.name, "bold"))
    parts: list[RenderableType] = [heading, table, Text(f"peaks: {roofs}", style="dim")]
    parts += [Text(f"not run: {what}: {reason}", style="dim") for what, reason in refusals(result)]
    parts += [Text(), *(Text(line) for line in summarise(result))]
    if result.noisy:
        parts.append(
            Text(
                f"{len(result.noisy)} of {len(result.cases)} cases were too noisy to tell: float32 differed from "
                f"itself by more than {TOO_NOISY:.0%}. Close other programs and run again.",
                style="yellow",
            )
        )
    return parts


def _compare(before: Path, after: Path, *, as_json: bool) -> None:
    from dataclasses import asdict

    from mezzotint.bench.compare import compare
    from mezzotint.bench.result import Verdict

    found = compare(_read(before), _read(after))
    if not found.changes:
        raise DataError(f"{before} and {after} have no case in common; compare runs with the same --ops and shapes")
    if as_json:
        changes = [{**asdict(change), "case": str(change.case)} for change in found.changes]
        print_json("bench-compare", {**asdict(found), "changes": changes})
    else:
        console = result_console()
        for part in _render_comparison(found):
            console.print(part)
    if any(change.verdict is Verdict.SLOWER for change in found.changes):
        raise typer.Exit(1)


def _render_comparison(found: "Comparison") -> "list[RenderableType]":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mezzotint.report.bench import STYLES, spell_seconds

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("operation", "format"):
        table.add_column(name, no_wrap=True)
    for name in ("before", "after", "after/before"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    styles = {"good": "green", "bad": "red", "unsure": "yellow"}
    for change in found.changes:
        before, after = spell_seconds(change.before_seconds), spell_seconds(change.after_seconds)
        verdict = Text(str(change.verdict), style=styles.get(STYLES[change.verdict], ""))
        table.add_row(str(change.case), change.label, before, after, f"{change.ratio:.2f}", verdict)
    parts: list[RenderableType] = [table]
    parts += [
        Text(f"{key} differs: {one} before, {other} after", style="yellow")
        for key, one, other in found.differing_facts
        if key not in ("date", "load_average")
    ]
    parts += [Text(f"only before: {name}", style="dim") for name in found.only_before]
    parts += [Text(f"only after: {name}", style="dim") for name in found.only_after]
    return parts


def _read(path: Path) -> "BenchResult":
    from mezzotint.bench.result import from_json

    try:
        payload: Any = json_module.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; pass a file of --save") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise DataError(f"{path} is not JSON ({reason}); pass a file of --save or of --json") from error
    return from_json(payload, str(path))


def _check_writable(*paths: Path | None) -> None:
    """Refuse before measuring what could not be written after it."""
    for path in paths:
        if path is None:
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path.parent):
                is_file = not path.is_dir()
        except OSError:
            is_file = False
        if not is_file:
            raise DataError(f"{path} cannot be written; pass the path of a file in a folder that can")


def _write(path: Path, text: str) -> None:
    from mezzotint.report.page import write_page

    write_page(path, text)


def _list(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _size(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1 << 17:
        raise ConfigError(f"{text!r} is no size of a matrix; pass numbers from 1 to {1 << 17}, as in --sizes 512,1024")
    return int(text)
