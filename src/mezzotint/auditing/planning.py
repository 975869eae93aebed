"""Running somebody's training script on a ghost GPU, once for each card and precision, and planning each run."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mezzotint.auditing.script import Ending, Outcome, Target, run_target
from mezzotint.errors import PlanError
from mezzotint.hardware.devices import DeviceSpec
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.plan import EMULATED, Plan, emulates_bfloat16, make_plan
from mezzotint.plan.precision import AS_WRITTEN, Precision, in_precision
from mezzotint.plan.recording import GhostRun, Recording
from mezzotint.process import exit_now
from mezzotint.torch_internals.fake import is_cuda_build
from mezzotint.trace.recorder import Recorder


@dataclass(frozen=True, slots=True, kw_only=True)
class GhostOutcome:
    """One run of a script on a ghost GPU, and how it ended."""

    run: GhostRun
    outcome: Outcome


def run_on_ghost(
    target: Target, card: DeviceSpec, precision: Precision, *, steps: int, is_in_rounds: bool = False
) -> GhostOutcome:
    """Run a script for a few steps on a ghost GPU.

    Raises GhostError or PlanError where the script cannot go on there.
    """
    recording = Recording(card)

    @contextmanager
    def within(recorder: Recorder) -> Iterator[None]:
        with in_precision(precision), recording.within(recorder):  # the switches are read before they are put back
            yield

    outcome = run_target(
        target, steps=steps, has_ranges=False, within=within, is_in_rounds=is_in_rounds,
        on_stuck=lambda _trace: _give_up(target),
    )  # fmt: skip
    early = _ended_early(outcome, steps) if is_in_rounds else None
    if early is not None:
        outcome.trace.notes.append(early)
    return GhostOutcome(run=recording.run(outcome.trace), outcome=outcome)


def audit_on_ghost(target: Target, gpu: str, *, steps: int) -> Outcome:
    """Run a script on a ghost GPU for the rules of an audit: dtypes and calls as on CUDA, but no ranges.

    Raises PlanError for an unknown card, GhostError where the script cannot go on.
    """
    found = run_on_ghost(target, find_gpu(gpu), AS_WRITTEN, steps=steps)
    trace = found.run.trace
    trace.facts["device"] = f"ghost {found.run.spec.name}"
    trace.notes.extend(found.run.notes[len(trace.notes) :])
    trace.notes.append(f"on a simulated {found.run.spec.name}: tensors have no numbers, so nothing is said of ranges")
    if emulates_bfloat16(found.run):
        trace.notes.append(f"{found.run.spec.name}: {EMULATED}")
    if found.run.assumed:
        count = sum(found.run.assumed.values())
        trace.notes.append(f"{count} answers about numbers were assumed; mezzotint plan lists the lines that asked")
    return replace(found.outcome, trace=trace)


def plan_target(
    target: Target,
    cards: Sequence[DeviceSpec],
    precisions: Callable[[DeviceSpec], Sequence[Precision]],
    *,
    steps: int = 2,
    on_progress: Callable[[str], None] = lambda _text: None,
) -> list[Plan]:
    """Plan a script on every card in every precision.

    Raises PlanError where no training step was seen, with what the script raised; GhostError where it cannot go on.
    """
    plans: list[Plan] = []
    for card in cards:
        runs: dict[Precision, GhostRun] = {}
        for precision in precisions(card):
            on_progress(f"{card.name}, {precision.name}")
            same = next((run for known, run in runs.items() if _is_same_run(known, precision)), None)
            if same is None:
                with _quiet(is_first=not plans and not runs):
                    found = run_on_ghost(target, card, precision, steps=steps, is_in_rounds=True)
                if found.outcome.ending is Ending.INTERRUPT:
                    raise KeyboardInterrupt
                if not found.run.trace.steps:
                    raise PlanError(_nothing_to_plan(target, found.outcome))
                same = runs[precision] = found.run
            plan = make_plan(same, precision)
            if not plan.time.calls and not plan.time.seconds:
                raise PlanError(
                    f"{target} ran nothing on CUDA in its training step, so there is nothing to plan; move "
                    'the model and its data to torch.device("cuda"), which is simulated here'
                )
            plans.append(plan)
    return plans


@contextmanager
def _quiet(*, is_first: bool) -> Iterator[None]:
    """Keep the script from standard output, where the result goes; what it says is wanted once."""
    if is_first:
        with redirect_stdout(sys.stderr):
            yield
        return
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def config_target(path: Path, *, batch: int, length: int | None, is_checkpointed: bool) -> Target:
    """Return the script that trains a Hugging Face model from its config: bfloat16, clipping, fused AdamW.

    Raises PlanError where the config is none that the installed transformers can train.
    """
    from mezzotint.auditing.programs import config_program

    config = config_program.read_config(path)
    longest = config_program.default_length(config)
    return Target(
        path=Path(config_program.__file__),
        arguments=(
            str(path), str(batch), str(length or longest), "checkpointed" if is_checkpointed else "plain",
        ),
        title=f"{config.model_type} from {path}, batch {batch}, length {length or longest}"
        + (", checkpointed" if is_checkpointed else ""),
    )  # fmt: skip


def _is_same_run(known: Precision, wanted: Precision) -> bool:
    """Whether two precisions run the same operations: float8 is priced on a bfloat16 run."""
    return not known.is_as_written and known.dtype == wanted.dtype and known.has_tf32 == wanted.has_tf32


_RANKS = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"})


def _hint(error: BaseException | None) -> str:
    """Say what to do about an error that a script met on a ghost GPU, by its type and the code that raised it."""
    if error is None:
        return ""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    found = ""
    if isinstance(error, ModuleNotFoundError):
        found = "install it, or plan the path without it: a ghost GPU runs no CUDA kernels of libraries"
    elif _is_about_compilers(error) or (files and files[-1].endswith("/torch/utils/cpp_extension.py")):
        found = "a ghost GPU runs no custom CUDA kernels; plan the path without them"
    elif isinstance(error, KeyError) and error.args and error.args[0] in _RANKS:
        found = "it expects torchrun; set RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 in front of the command"
    elif not is_cuda_build() and str(error) in _driver_errors():
        found = "C++ asks for the driver there (FSDP, torch.device(0)), and a ghost GPU has none"
    return f"; {found}" if found else ""


def _is_about_compilers(error: BaseException) -> bool:
    """Whether a script looked for CUDA's compiler and did not find it."""
    if isinstance(error, subprocess.CalledProcessError):
        words = [error.cmd] if isinstance(error.cmd, str) else [str(word) for word in error.cmd or ()]
        return any(Path(word.split()[0]).name == "nvcc" for word in words[:1] if word.split())
    if isinstance(error, FileNotFoundError):
        return Path(str(error.filename or "")).name == "nvcc"
    return isinstance(error, KeyError) and error.args[:1] in (("CUDA_HOME",), ("CUDA_PATH",))


def _driver_errors() -> set[str]:
    """Return what this build of torch, which has no CUDA, says where C++ asks for the driver."""
    found = set()
    for ask in (lambda: torch.device(0), lambda: torch.zeros(1, device="cuda")):
        try:
            ask()
        except (RuntimeError, AssertionError) as error:
            found.add(str(error))
    return found


def _nothing_to_plan(target: Target, outcome: Outcome) -> str:
    if outcome.ending is Ending.EXIT:
        where = f" at {outcome.place}" if outcome.place else ""
        return f"{target} called {outcome.call}{where} before a training step on the ghost GPU"
    if outcome.text is not None:
        return f"{target} ended before a training step on the ghost GPU: {outcome.text}{_hint(outcome.error)}"
    backwards = sum(event.name == "backward" for event in outcome.trace.events)
    return (
        f"{target} ended without a training step: {len(outcome.trace.operations)} operations and {backwards} backward "
        "passes were seen, but no torch optimizer stepped; name a function that makes a step: SCRIPT.py:make_step"
    )


def _ended_early(outcome: Outcome, steps: int) -> str | None:
    """Say so where a script ended by itself before all steps that were wanted."""
    found = len(outcome.trace.steps)
    if outcome.ending is Ending.STEPS or found >= steps:
        return None
    how = {
        Ending.ERROR: f"an error: {outcome.text}",
        Ending.EXIT: f"{outcome.call} at {outcome.place}",
    }.get(outcome.ending, "its end")
    return f"{found} of {steps} steps ran before {how}; the last whole step is planned"


def _give_up(target: Target) -> None:
    """End a script that catches everything, and the process with it: nothing else stops it."""
    sys.stderr.write(
        f"mezzotint: error: {target} caught the signal to stop and went on; let it catch Exception, not everything\n"
    )
    sys.stderr.flush()
    exit_now(2)
