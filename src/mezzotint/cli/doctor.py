"""`mezzotint doctor`: what this machine computes natively, by emulation or not at all, and what to train in."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console
from mezzotint.findings import Finding, Severity
from mezzotint.version import package_version

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from mezzotint.hardware.setup import TorchSetup
    from mezzotint.hardware.support import DeviceFacts, FormatSupport
    from mezzotint.hardware.timings import MatmulTimings
    from mezzotint.lowprec.choice import KernelChoice
    from mezzotint.policy.decision import Decision
    from mezzotint.policy.policy import Policy

_TIMED_FORMATS = ("float64", "float32", "bfloat16", "float16")
_TIMED_ON_ACCELERATORS = ("tfloat32", "float8_e4m3fn")

DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="Look at this device only: cpu, cuda:0, mps, ...")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """One device after the examination; timings and bandwidth are None where it could not be measured.

    `kernels` says for a CPU whose kernels compute the 16-bit formats under `fast_cpu`, torch's or mezzotint's.
    """

    facts: "DeviceFacts"
    timings: "MatmulTimings | None"
    copy_bytes_per_second: float | None
    formats: "tuple[FormatSupport, ...]"
    kernels: "tuple[KernelChoice, ...]" = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What the command shows; the decision is about the first device."""

    devices: tuple[Examined, ...]
    setup: "TorchSetup"
    decision: "Decision[Policy]"
    findings: tuple[Finding, ...]


ParametersOption = Annotated[
    str | None,
    typer.Option("--parameters", metavar="COUNT", help="A model's size (124M, 1.3B): does its training state fit?"),
]


def doctor(device: DeviceOption = None, parameters: ParametersOption = None, json: JsonOption = False) -> None:
    """Show what this machine does in each number format, measured, and the policy that suits it.

    Exits with 1 where something deserves attention.
    """
    progress = progress_console()
    if progress.is_terminal and not json:
        with progress.status("measuring ..."):
            diagnosis = diagnose(device, parameters)
    else:
        diagnosis = diagnose(device, parameters)
    if json:
        print_json("doctor", to_json(diagnosis))
    else:
        console = result_console()
        for part in render(diagnosis):
            console.print(part)
    if any(f.severity in (Severity.ERROR, Severity.WARNING) for f in diagnosis.findings):
        raise typer.Exit(1)


def diagnose(device: str | None = None, parameters: str | None = None) -> Diagnosis:
    """Return the examination of one device, or of all, the one to train on first.

    With a number of `parameters`, whether they fit that one under the policy chosen.
    """
    from mezzotint.hardware.checkup import check_setup
    from mezzotint.hardware.probe import probe, probe_devices, probe_setup
    from mezzotint.policy.choose import choose
    from mezzotint.policy.memory import check_memory, parse_count

    count = None if parameters is None else parse_count(parameters)
    found = probe_devices() if device is None else (probe(device),)
    examined = tuple(_examine(facts) for facts in found)
    setup = probe_setup()
    first = examined[0]
    decision = choose(first.facts, first.timings)
    findings = check_setup([(e.facts, e.timings) for e in examined], setup)
    if count is not None:
        findings += check_memory(decision.value, count, first.facts)
    return Diagnosis(devices=examined, setup=setup, decision=decision, findings=findings)


def _examine(facts: "DeviceFacts") -> Examined:
    from mezzotint.hardware.measure import copy_bytes_per_second, measure_matmul
    from mezzotint.hardware.support import support_table

    try:
        more = () if facts.kind == "cpu" else _TIMED_ON_ACCELERATORS
        timings = measure_matmul(facts.device, _TIMED_FORMATS + more)
        bandwidth = copy_bytes_per_second(facts.device)
    except Exception as error:  # a driver may fail in ways of its own, and the report is about that too
        progress_console().print(f"{facts.device} could not be measured: {error}", style="yellow", markup=False)
        timings, bandwidth, facts = None, None, replace(facts, is_here=False)
    return Examined(
        facts=facts,
        timings=timings,
        copy_bytes_per_second=bandwidth,
        formats=support_table(facts, timings),
        kernels=_kernels(facts, timings),
    )


def _kernels(facts: "DeviceFacts", timings: "MatmulTimings | None") -> "tuple[KernelChoice, ...]":
    from mezzotint.lowprec.switch import preview

    return preview(timings) if facts.kind == "cpu" and timings is not None else ()


def to_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis as the JSON object of `mezzotint.doctor/1`."""
    from mezzotint.hardware.devices import find_device

    devices = []
    for examined in diagnosis.devices:
        spec, timings = find_device(examined.facts.name), examined.timings
        devices.append(
            {
                "device": examined.facts.device,
                **asdict(examined.facts),
                "spec": None if spec is None else asdict(spec),
                "formats": [
                    {**asdict(support), "measured_ratios": timings.ratios(support.format) if timings else {}}
                    for support in examined.formats
                ],
                "matmul": None if timings is None else asdict(timings),
                "copy_bytes_per_second": examined.copy_bytes_per_second,
                "kernels": [{**asdict(choice), "ratios": dict(choice.ratios)} for choice in examined.kernels],
            }
        )
    return {
        "version": package_version(),
        "devices": devices,
        "setup": asdict(diagnosis.setup),
        "policy": {"value": str(diagnosis.decision.value), "reasons": list(diagnosis.decision.reasons)},
        "findings": [finding.to_json() for finding in diagnosis.findings],
    }


def render(diagnosis: Diagnosis) -> "list[RenderableType]":
    """Return what the terminal shows, part by part."""
    from rich.text import Text

    parts: list[RenderableType] = []
    for examined in diagnosis.devices:
        parts += [_heading(examined), _format_table(examined), Text(), *_kernel_lines(examined.kernels), Text()]
    parts += [_setup_lines(diagnosis), Text(), *_policy_lines(diagnosis), Text(), *_finding_lines(diagnosis.findings)]
    return parts


def _heading(examined: Examined) -> "RenderableType":
    from rich.text import Text

    facts = examined.facts
    words = []
    if facts.compute_capability:
        words.append(f"compute capability {facts.compute_capability[0]}.{facts.compute_capability[1]}")
    if facts.architecture:
        words.append(facts.architecture)
    if facts.physical_cores:
        words.append(_count(facts.physical_cores, "core"))
    if facts.threads:
        words.append(_count(facts.threads, "thread"))
    if facts.memory_bytes:
        free = f" ({facts.free_bytes / 2**30:.1f} free)" if facts.free_bytes else ""
        words.append(f"{facts.memory_bytes / 2**30:.1f} GiB{free}")
    if examined.copy_bytes_per_second:
        words.append(f"copies {_significant(examined.copy_bytes_per_second / 1e9)} GB/s")
    heading = Text.assemble((facts.device, "bold cyan"), "  ", (facts.name, "bold"))
    heading.append(f"\n{', '.join(words)}" if words else "")
    return heading


_SUPPORT_STYLES = {"native": "green", "emulated": "yellow", "absent": "red", "unknown": "magenta"}


def _format_table(examined: Examined) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from mezzotint.hardware.timings import spell_ratio

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("format", no_wrap=True)
    table.add_column("support", no_wrap=True)
    table.add_column("time/fp32", justify="right", no_wrap=True)
    table.add_column("GFLOP/s", justify="right", no_wrap=True)
    table.add_column("why", ratio=1, overflow="fold")
    for support in examined.formats:
        ratio = support.measured_ratio
        speed = examined.timings.flops_per_second(support.format) if examined.timings else None
        table.add_row(
            support.format,
            Text(support.support, style=_SUPPORT_STYLES[support.support]),
            "-" if ratio is None else spell_ratio(ratio),
            "-" if speed is None else _significant(speed / 1e9),
            support.reason,
        )
    timings = examined.timings
    if timings is not None and not timings.times:
        table.caption = f"not measured: {dict(timings.refused).get('float32', 'no memory left')}"
        table.caption_justify = "left"
    elif timings is not None:
        table.caption = f"matmul {timings.m}x{timings.n}x{timings.k}, the slowest of layouts NT, NN, TN"
        table.caption_justify = "left"
    return table


def _kernel_lines(kernels: "Sequence[KernelChoice]") -> "list[RenderableType]":
    from mezzotint.lowprec.choice import Path

    by = {Path.STOCK: "torch's kernels", Path.UPCAST: "mezzotint's kernels", Path.PACKED: "mezzotint's kernels"}
    return [_item("-", f"{choice.format} training by {by[choice.path]}: {choice.reason}") for choice in kernels]


def _setup_lines(diagnosis: Diagnosis) -> "RenderableType":
    from rich.table import Table

    from mezzotint.hardware.setup import spell_matmul_precision

    setup = diagnosis.setup
    build = f"CUDA {setup.cuda_version}" if setup.cuda_version else f"ROCm {setup.hip_version}"
    if not setup.cuda_version and not setup.hip_version:
        build = "CPU build, no CUDA"
    driver = f", driver {setup.nvidia_driver}" if setup.nvidia_driver else ""
    threads = f"{setup.threads} per operation, {setup.interop_threads} between operations"
    if setup.usable_cores is not None:
        threads += f", {_count(setup.usable_cores, 'usable processor')}"
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_row("torch", f"{setup.torch_version} ({build}{driver}), Python {setup.python_version}")
    grid.add_row("threads", threads)
    if setup.environment:
        grid.add_row("settings", ", ".join(f"{name}={value}" for name, value in setup.environment))
    precision = setup.matmul_precision
    grid.add_row("matmul", f'float32 precision "{precision}": {spell_matmul_precision(precision)}')
    return grid


def _policy_lines(diagnosis: Diagnosis) -> "list[RenderableType]":
    from rich.padding import Padding
    from rich.text import Text

    decision, first = diagnosis.decision, diagnosis.devices[0].facts
    title = Text.assemble(("policy", "bold"), f" for {first.device}: ", (_preset_name(decision.value), "bold green"))
    lines: list[RenderableType] = [title, Padding(Text(str(decision.value), style="dim"), (0, 0, 0, 2))]
    return lines + [_item("-", reason) for reason in decision.reasons]


def _preset_name(policy: "Policy") -> str:
    from mezzotint.policy.grammar import parse_policy
    from mezzotint.policy.presets import PRESETS

    return next((name for name in PRESETS if parse_policy(name) == policy), str(policy))


_SEVERITY_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.INFO: "blue"}


def _finding_lines(findings: Sequence[Finding]) -> "list[RenderableType]":
    from rich.text import Text

    if not findings:
        return [Text("no findings", style="green")]
    lines: list[RenderableType] = []
    for finding in findings:
        style = _SEVERITY_STYLES[finding.severity]
        advice = f"\n{finding.advice}" if finding.advice else ""
        body = Text.assemble((finding.severity, style), f"  {finding.message}", (advice, "dim"))
        lines.append(_item(finding.code, body, style=style))
    return lines


def _item(label: str, body: "str | RenderableType", *, style: str = "") -> "RenderableType":
    """Return a label with a body that wraps beside it."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_row(Text(label, style=style), Text(body) if isinstance(body, str) else body)
    return grid


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def _significant(value: float) -> str:
    """Return three significant digits without an exponent, as a reader expects of a speed."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
