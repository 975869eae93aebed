"""`mezzotint audit`: run somebody's training script for a few steps and say what every operation really ran in."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.cli.options import refuse
from mezzotint.cli.output import JsonOption, print_json, progress_console, result_console, script_output
from mezzotint.errors import AuditError
from mezzotint.process import exit_now

if TYPE_CHECKING:
    from mezzotint.auditing.script import Outcome
    from mezzotint.rules.judge import Judgement
    from mezzotint.trace.record import Trace

_INTERRUPTED = 130  # 128 + SIGINT


def audit(
    context: typer.Context,
    script: Annotated[
        str, typer.Argument(help="SCRIPT.py, SCRIPT.py:FUNCTION that returns a step, or with -m a module.")
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many training steps to watch.")] = 3,
    policy: Annotated[
        str | None,
        typer.Option(help="What the script is meant to do: bf16-mixed, fp16-mixed, ...", show_default=False),
    ] = None,
    is_module: Annotated[bool, typer.Option("--module", "-m", help="Run a module, as python -m does.")] = False,
    out: Annotated[Path, typer.Option(help="Where to write the HTML report.")] = Path("mezzotint-audit.html"),
    has_report: Annotated[bool, typer.Option("--report/--no-report", help="Write the HTML report.")] = True,
    has_ranges: Annotated[
        bool, typer.Option("--ranges/--no-ranges", help="Measure the range of every tensor (dtypes only if not).")
    ] = True,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help="Run on a simulated GPU of this name: what exists on CUDA only.", show_default=False
        ),
    ] = None,
    is_bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the modules that must stay in float32, and the policy that does it.")
    ] = False,
    metric: Annotated[str, typer.Option(help="With --bisect: gradient, or loss after --steps steps.")] = "gradient",
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="With --bisect: the relative error against float32 that is accepted.")
    ] = 0.05,
    is_json: JsonOption = False,
) -> None:
    """Run an unmodified training script for a few steps and show what every operation really ran in.

    Options of the script come after its name. Exit code 0: nothing wrong, 1: findings, 2: no training step was seen.
    """
    from mezzotint.auditing.script import parse_target, run_target
    from mezzotint.policy.policy import Policy
    from mezzotint.rules.judge import judge

    if is_bisect:
        useless = ("policy", "out", "has_report", "has_ranges", "gpu")
        refuse(context, useless, "with --bisect, which measures and writes no report; leave it out")
        if metric == "gradient":
            refuse(context, ("steps",), "with --bisect --metric gradient, which is of one step; add --metric loss")
    else:
        refuse(context, ("metric", "tolerance"), "without --bisect; add it")
    if gpu is not None:
        refuse(context, ("has_ranges",), "with --gpu, whose tensors have no numbers; leave it out")
    if not has_report:
        refuse(context, ("out",), "with --no-report; leave one of them out")
    target = parse_target(script, context.args, is_module=is_module)
    if is_bisect:
        from mezzotint.cli.bisect import find_islands

        raise typer.Exit(find_islands(target, metric=metric, tolerance=tolerance, steps=steps, is_json=is_json))
    declared = Policy.parse(policy) if policy is not None else None
    path = _of_rank(out) if has_report else None
    if path is not None and not os.access(path.resolve().parent, os.W_OK):
        raise AuditError(f"{path.resolve().parent} cannot be written to; pass another --out, or --no-report")

    def finish(trace: "Trace") -> None:
        """Report on a script that will not stop, and end the process."""
        judgement = judge(trace, declared)
        _write(trace, judgement, path)
        code = _show(trace, judgement, "stopped by force", path, is_json=is_json)
        sys.stdout.flush()
        exit_now(code)

    with script_output(is_result=not is_json):
        if gpu is not None:
            from mezzotint.auditing.planning import audit_on_ghost

            outcome = audit_on_ghost(target, gpu, steps=steps)
        else:
            outcome = run_target(target, steps=steps, has_ranges=has_ranges, on_stuck=finish)
    if outcome.is_child:
        raise typer.Exit(0)  # a process that the script forked: its parent reports
    judgement = judge(outcome.trace, declared)
    _write(outcome.trace, judgement, path)
    code = _show(outcome.trace, judgement, _ending(outcome), path, is_json=is_json)
    raise typer.Exit(_exit_code(outcome, judgement, code))


def _write(trace: "Trace", judgement: "Judgement", path: Path | None) -> None:
    from mezzotint.auditing.session import report_page
    from mezzotint.report.page import write_page

    if path is not None:
        write_page(path, report_page(trace, judgement))


def _show(trace: "Trace", judgement: "Judgement", ending: str, path: Path | None, *, is_json: bool) -> int:
    """Print the result and return the exit code of its findings."""
    from mezzotint.report.audit_text import print_audit

    rank = int(os.environ.get("RANK", "0"))
    if rank:  # of a torchrun launch, rank 0 speaks; the others have their say where something is wrong
        if not judgement.is_clean or ending:
            words = [judgement.verdict, *(f"{one.code} {one.message}" for one in judgement.findings), ending]
            progress_console().print(f"rank {rank}: {'; '.join(filter(None, words))}", markup=False, soft_wrap=True)
    elif is_json:
        print_json("audit", _payload(trace, judgement, ending, path))
    else:
        console = result_console()
        print_audit(
            console,
            trace,
            judgement.findings,
            verdict=judgement.verdict,
            policy=str(judgement.policy),
            is_policy_declared=judgement.is_declared,
            report_path=str(path) if path is not None else None,
        )
        if ending:
            progress_console().print(f"mezzotint: {ending}", markup=False, soft_wrap=True)
    return 0 if judgement.is_clean else 1


def _payload(trace: "Trace", judgement: "Judgement", ending: str, path: Path | None) -> dict[str, Any]:
    return {
        "command": trace.command,
        "verdict": judgement.verdict,
        "policy": str(judgement.policy),
        "is_policy_declared": judgement.is_declared,
        "findings": [finding.to_json() for finding in judgement.findings],
        "steps": [
            {
                "operations": step.end - step.first,
                "seconds": step.seconds,
                "optimizers": list(step.optimizers),
                "is_skipped": step.is_skipped,
                "loss": step.loss,
            }
            for step in trace.steps
        ],
        "num_operations": len(trace.operations),
        "ending": ending or None,
        "notes": list(trace.notes),
        "machine": trace.facts,
        "report": str(path) if path is not None else None,
    }


def _ending(outcome: "Outcome") -> str:
    """Return in words how the script ended, if it did not simply run its steps."""
    from mezzotint.auditing.script import Ending

    seen = len(outcome.trace.steps)
    after = f"after {seen} training step{'s' if seen != 1 else ''}" if seen else "before a training step had ended"
    if outcome.ending is Ending.ERROR:
        hint = ""
        if "EOFError" in (outcome.text or ""):
            hint = "; it reads standard input, which is empty: pass it with < FILE"
        return f"the script raised {outcome.text} {after}{hint}; what it did until then is reported"
    if outcome.ending is Ending.EXIT:
        return f"the script called {outcome.call} {after}"
    if outcome.ending is Ending.INTERRUPT:
        return f"interrupted {after}"
    if not seen:
        return _nothing_seen(outcome.trace)
    return ""


def _nothing_seen(trace: "Trace") -> str:
    """Say what was seen of a script that ended without a training step."""
    backwards = sum(event.name == "backward" for event in trace.events)
    if not trace.operations:
        return (
            "the script ended without a single torch operation: is its training started under another name, or in "
            "another process?"
        )
    return (
        f"the script ended without a training step: of operations {len(trace.operations)} and of backward "
        f"passes {backwards} were seen, and no torch optimizer stepped; name a function that makes a step: "
        "SCRIPT.py:make_step"
    )


def _exit_code(outcome: "Outcome", judgement: "Judgement", code: int) -> int:
    from mezzotint.auditing.script import Ending

    if outcome.ending is Ending.INTERRUPT:
        return _INTERRUPTED
    if code:
        return code  # the findings stand, and may explain an error
    has_failed = outcome.ending is Ending.ERROR or (outcome.ending is Ending.EXIT and outcome.text != "0")
    return 2 if has_failed or not outcome.trace.steps else 0


def _of_rank(path: Path) -> Path:
    """Return the report's path for this process of a torchrun launch."""
    rank = os.environ.get("RANK")
    if rank is None or os.environ.get("WORLD_SIZE", "1") == "1":
        return path
    return path.with_stem(f"{path.stem}-rank{rank}")
