"""`mezzotint plan`: run somebody's CUDA training script on a simulated GPU and say what it would take on a real one."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import refuse
from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console, script_output
from mezzotint.errors import PlanError
from mezzotint.files import write_whole

if TYPE_CHECKING:
    from mezzotint.auditing.script import Target
    from mezzotint.plan.distributed import DistributedPlan
    from mezzotint.plan.plan import Plan


def plan(
    context: typer.Context,
    script: Annotated[
        str | None,
        typer.Argument(
            help="SCRIPT.py, SCRIPT.py:FUNCTION that returns a step, or with -m a module.", show_default=False
        ),
    ] = None,
    gpu: Annotated[str, typer.Option("--gpu", help="Cards by name, or TOML files, with commas between.")] = "H100",
    policy: Annotated[
        str | None,
        typer.Option(
            help="As written, float32, tf32, fp16, bf16, fp8; commas between. Default: all that the card has."
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many steps to run; the last is planned.")] = 2,
    is_module: Annotated[bool, typer.Option("--module", "-m", help="Run a module, as python -m does.")] = False,
    price: Annotated[float | None, typer.Option(min=0.0, help="Price of an hour of the card.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="The batch size of the script, to say which would fit.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--from-config", help="Instead of a script, the config.json of a Hugging Face model.", show_default=False
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=1, help="With --from-config: tokens of a sequence. Default: the model's, up to 2048."),
    ] = None,
    is_checkpointed: Annotated[
        bool, typer.Option("--checkpointing", help="With --from-config: activation checkpointing.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where to write the HTML report.")] = Path("mezzotint-plan.html"),
    has_report: Annotated[bool, typer.Option("--report/--no-report", help="Write the HTML report.")] = True,
    trace: Annotated[
        Path | None, typer.Option(help="Write the planned step as a trace for Perfetto or chrome://tracing.")
    ] = None,
    world: Annotated[
        int | None,
        typer.Option(help="So many cards, extrapolated; each has the script's batch.", show_default=False),
    ] = None,
    strategy: Annotated[str, typer.Option(help="With --world: ddp or fsdp.")] = "ddp",
    is_json: JsonOption = False,
) -> None:
    """Run an unmodified CUDA training script on a simulated GPU: step time, memory and formats, without the GPU.

    Options of the script come after its name. Exit code 0: it fits everywhere, 1: a plan does not fit its card, 2:
    nothing could be planned.
    """
    from mezzotint.auditing.planning import plan_target
    from mezzotint.hardware.gpus import find_gpu
    from mezzotint.plan.distributed import check_world, distribute
    from mezzotint.plan.precision import default_precisions, find_precision

    _refuse_useless(context)
    _check_sizes(steps=steps, batch=batch, length=length)
    target = _target(
        script, context.args, config, batch=batch, length=length, is_checkpointed=is_checkpointed, is_module=is_module
    )
    if config is not None:
        batch = batch or 1
    cards = [find_gpu(name.strip()) for name in gpu.split(",") if name.strip()]
    if not cards:
        raise PlanError("--gpu names no card; try --gpu H100")
    for card in cards:
        if card.compute_capability is None:
            raise PlanError(f"{card.name} is no CUDA card, and plans follow CUDA's rules; name an NVIDIA one")
    if world is not None:
        check_world(world, strategy, cards)
    wanted = [find_precision(name.strip()) for name in policy.split(",")] if policy is not None else None
    for path in (out if has_report else None, trace):
        if path is not None and not os.access(path.resolve().parent, os.W_OK):
            raise PlanError(f"{path.resolve().parent} cannot be written to; pass another path")
    console = progress_console()
    with script_output(is_result=not is_json), console.status("planning") as status:
        plans = plan_target(
            target, cards, lambda card: wanted or default_precisions(card), steps=max(1, steps),
            on_progress=lambda text: status.update(f"planning {text}"),
        )  # fmt: skip
    several = [distribute(one, world, strategy) for one in plans] if world is not None else []
    if has_report:
        from mezzotint.report.page import write_page
        from mezzotint.report.plan import plan_page

        write_page(out, plan_page(plans, str(target)))
    if trace is not None:
        from mezzotint.plan.timeline import chrome_trace

        try:
            write_whole(trace, json.dumps(chrome_trace(plans[0])))
        except OSError as error:
            raise PlanError(f"{trace} cannot be written: {error.strerror or error}; pass another --trace") from None
    if is_json:
        print_json("plan", _payload(plans, several, str(target), price, out if has_report else None))
    else:
        from mezzotint.report.plan_text import print_plans

        print_plans(
            result_console(), plans, several, price=price, batch=batch, report_path=str(out) if has_report else None
        )  # fmt: skip
    fitting = [one.fits for one in several] or [one.memory.fits for one in plans]
    raise typer.Exit(1 if False in fitting else 0)


_LARGEST = {"--steps": 10_000, "--batch": 1 << 24, "--length": 1 << 24}
"""The largest sizes that can be planned: steps are run one by one, and tokens of larger sizes overflow."""


def _check_sizes(*, steps: int, batch: int | None, length: int | None) -> None:
    for name, value in (("--steps", steps), ("--batch", batch), ("--length", length)):
        if value is not None and value > _LARGEST[name]:
            raise PlanError(f"{name} is {str(value)[:200]}; it must be at most {_LARGEST[name]:,}")


def _refuse_useless(context: typer.Context) -> None:
    """Raise ConfigError for options without an effect."""
    if context.params["config"] is not None:
        refuse(context, ("is_module",), "with --from-config; leave it out")
    elif context.params["is_json"]:
        refuse(context, ("batch",), "with --json, which has no table of batch sizes; leave one of them out")
    if context.params["world"] is None:
        refuse(context, ("strategy",), "without --world; add it")
    if not context.params["has_report"]:
        refuse(context, ("out",), "with --no-report; leave one of them out")


def _target(
    script: str | None, arguments: Sequence[str], config: Path | None, *, batch: int | None, length: int | None,
    is_checkpointed: bool, is_module: bool,
) -> "Target":  # fmt: skip
    from mezzotint.auditing.planning import config_target
    from mezzotint.auditing.script import parse_target

    if config is not None:
        if script is not None:
            raise PlanError(f"--from-config plans a model without a script; leave out {script}, or --from-config")
        return config_target(config, batch=batch or 1, length=length, is_checkpointed=is_checkpointed)
    if script is None:
        raise PlanError("nothing to plan; name a training script, or a model with --from-config config.json")
    if length is not None or is_checkpointed:
        raise PlanError("--length and --checkpointing go with --from-config; a script decides these itself")
    return parse_target(script, arguments, is_module=is_module)


def _payload(
    plans: "Sequence[Plan]",
    several: "Sequence[DistributedPlan]",
    command: str,
    price: float | None,
    report: Path | None,
) -> dict[str, Any]:
    from mezzotint.plan.plan import advice, reasons

    return {
        "command": command,
        "plans": [
            {
                "gpu": one.run.spec.name,
                "precision": one.precision.name,
                "step_seconds": one.time.seconds,
                "step_seconds_low": one.time.low,
                "step_seconds_high": one.time.high,
                "gpu_seconds": one.time.gpu,
                "host_seconds": one.time.host,
                "is_host_bound": one.time.is_host_bound,
                "items_per_second": one.items_per_second,
                "unit": one.unit or None,
                "mfu": one.utilisation,
                "price_per_million": None if price is None else one.price_per_million(price),
                "peak_allocated_bytes": one.memory.peak_allocated,
                "peak_reserved_bytes": one.memory.peak_reserved,
                "at_peak_bytes": dict(one.memory.at_peak),
                "fits": one.memory.fits,
                "uncovered_seconds": dict(one.time.uncovered),
                "advice": advice(one),
            }
            for one in plans
        ],
        "reasons": reasons(plans),
        "distributed": [
            {
                "gpu": one.plan.run.spec.name,
                "precision": one.plan.precision.name,
                "world": one.world,
                "strategy": str(one.strategy),
                "is_extrapolated": True,
                "step_seconds": one.seconds,
                "step_seconds_low": one.low,
                "step_seconds_high": one.high,
                "communication_seconds": one.communication,
                "exposed_seconds": one.exposed,
                "items_per_second": one.items_per_second,
                "peak_allocated_bytes": one.peak_allocated,
                "peak_reserved_bytes": one.peak_reserved,
                "fits": one.fits,
                "links": one.links.source,
            }
            for one in several
        ],
        "assumed": [
            {"path": path, "line": line, "what": what, "count": count}
            for (path, line, what), count in plans[0].run.assumed.items()
        ],
        "notes": list(plans[0].run.notes),
        "report": str(report) if report is not None else None,
    }
