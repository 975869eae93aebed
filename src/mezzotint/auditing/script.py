"""Running somebody's training script under the recorder: as `__main__`, with its own arguments, for a few steps.

The script is run as Python runs it: its folder first on the path, `sys.argv` its own, `__main__` its module, so that
pickling and multiprocessing find what they expect. It ends by itself, by `Enough` after the steps that were asked for,
by `sys.exit`, or by an error; what was recorded until then is kept in each case.
"""

import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from enum import StrEnum
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from mezzotint.auditing.rounds import Rounds
from mezzotint.errors import AuditError, GhostError, described, place_of
from mezzotint.patches import Patches
from mezzotint.process import exit_call, guarded
from mezzotint.trace.record import Trace
from mezzotint.trace.recorder import Enough, Recorder, observer

_MAX_IGNORED = 3  # how often a script may swallow `Enough` before it is ended


class Ending(StrEnum):
    """How the script came to its end."""

    STEPS = "steps"  # stopped after the steps that were asked for
    END = "end"
    EXIT = "exit"  # sys.exit
    ERROR = "error"
    INTERRUPT = "interrupt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What to run: a script, a function in it that makes a step, or a module as `python -m` runs it.

    `title` is what it is called, where the path says little.
    """

    path: Path | None
    function: str | None = None
    module: str | None = None
    arguments: tuple[str, ...] = ()
    title: str | None = None

    def __str__(self) -> str:
        if self.title is not None:
            return self.title
        name = (
            f"-m {self.module}" if self.module else f"{self.path}:{self.function}" if self.function else str(self.path)
        )
        return " ".join([name, *self.arguments])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was recorded, and how the script ended.

    `text` is the error or exit code in words, `call` what the script called to exit, `place` its line, `error` the
    exception that the script raised.
    """

    trace: Trace
    ending: Ending
    text: str | None
    call: str | None = None
    place: str | None = None
    is_child: bool = False
    error: BaseException | None = None


def parse_target(script: str, arguments: Sequence[str], *, is_module: bool) -> Target:
    """Return what the command line names. Raises AuditError for a script that cannot be read."""
    if is_module:
        return Target(path=None, module=script, arguments=tuple(arguments))
    name, colon, function = script.rpartition(":")
    if not colon or not function.isidentifier() or not name.endswith(".py"):
        name, function = script, ""
    path = Path(name)
    if path.is_dir():
        raise AuditError(f"{path} is a folder; name the training script in it, or use -m for a package")
    if not path.is_file():
        raise AuditError(f"{path} does not exist; name a Python script, SCRIPT.py:FUNCTION, or -m MODULE")
    return Target(path=path, function=function or None, arguments=tuple(arguments))


def run_target(
    target: Target,
    *,
    steps: int,
    has_ranges: bool,
    on_stuck: Callable[[Trace], None] | None = None,
    within: Callable[[Recorder], AbstractContextManager[None]] | None = None,
    is_in_rounds: bool = False,
) -> Outcome:
    """Run the target under a recorder until `steps` training steps were seen.

    `within` surrounds the recorder: a ghost GPU, say. With `is_in_rounds`, optimizers that step in turns, as those of a
    GAN, make one step together. `on_stuck` gets the trace of a script that goes on after being
    stopped three times; it should not return. Raises AuditError where the target cannot be started: a file that is not
    Python, a function that is not there.
    """
    limit = None if target.function else steps
    process = os.getpid()
    recorder = _Stopper(steps=limit, has_ranges=has_ranges, on_stuck=on_stuck, is_in_rounds=is_in_rounds)
    run = _starter(target, steps, after_step=recorder.end_step)
    assert isinstance(run, FunctionType)
    recorder.begin_places_at(run.__code__)
    ending, text, place, call = Ending.END, None, None, None
    raised: BaseException | None = None
    with _as_main(target), _counting_processes(recorder):
        try:
            with within(recorder) if within is not None else nullcontext(), recorder, guarded():
                run()
        except (_MissingError, GhostError):
            raise
        except Enough:
            ending = Ending.STEPS
        except SystemExit as error:
            text = "0" if error.code is None or error.code == 0 else str(error.code)[:200]
            call = exit_call(error)
            ending, place = Ending.EXIT, place_of(error)
        except KeyboardInterrupt:
            ending = Ending.INTERRUPT
        except BaseException as error:  # a script may raise GeneratorExit, or a class derived from BaseException
            ending, text, place, raised = Ending.ERROR, described(error), place_of(error), error
    trace = recorder.trace()
    trace.command = str(target)
    trace.steps[:] = recorder.rounds.merged(trace.steps) if is_in_rounds else trace.steps
    is_child = os.getpid() != process
    return Outcome(trace=trace, ending=ending, text=text, call=call, place=place, is_child=is_child, error=raised)


class _Stopper(Recorder):
    """A recorder that insists."""

    is_command = True

    def __init__(
        self, *, steps: int | None, has_ranges: bool, on_stuck: Callable[[Trace], None] | None, is_in_rounds: bool
    ) -> None:
        super().__init__(steps=steps, has_ranges=has_ranges)
        self._on_stuck = on_stuck
        self._num_ignored = 0
        self._num_rounds = steps if is_in_rounds else None
        self.rounds = Rounds()

    @observer
    def after_optimizer(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Note whose step it was."""
        super().after_optimizer(optimizer, args, kwargs)
        self.rounds.see(id(optimizer), self.num_steps)

    def _before_backward(self) -> None:
        if self._num_rounds is not None:
            self._max_steps = 0 if self.rounds.are_over(self._num_rounds) else None
        try:
            super()._before_backward()
        except Enough:
            self._num_ignored += 1
            if self._num_ignored > _MAX_IGNORED and self._on_stuck is not None:
                self.notes.append("the script caught the signal to stop and went on; it was ended")
                self._on_stuck(self.trace())
            raise


def as_program(target: Target, steps: int) -> Callable[[], None]:
    """Return a function that runs the target from its beginning, as `run_target` does, each time it is called.

    What the script prints goes to standard error. Raises AuditError where the target cannot be started.
    """
    run = _starter(target, steps)

    def program() -> None:
        with _as_main(target), redirect_stdout(sys.stderr):
            try:
                with guarded():
                    run()
            except SystemExit:
                return
            except (Exception, KeyboardInterrupt, Enough):
                raise
            except BaseException as error:
                raise AuditError(f"{target} raised {described(error)}, so nothing was measured") from None

    return program


def _starter(target: Target, steps: int, after_step: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """Return what runs the target; everything that can be wrong before it runs is found here.

    `after_step` is called after each step of a function's.
    """
    if target.module is not None:
        return _module_starter(target.module)
    assert target.path is not None
    try:
        code = compile(target.path.read_bytes(), str(target.path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise AuditError(f"{target.path} is not a Python script: {error.args[0]}{line}") from None
    except OSError as error:
        raise AuditError(f"{target.path} cannot be read: {error.strerror or error}") from None

    if target.function is not None and target.function not in code.co_names:
        raise AuditError(f"{target.path} has no function {target.function}; name one that returns a step")

    def run_script() -> None:
        exec(code, sys.modules["__main__"].__dict__)

    def run_function() -> None:
        sys.modules["__main__"].__dict__["__name__"] = target.path.stem if target.path else "script"
        exec(code, sys.modules["__main__"].__dict__)
        make_step = sys.modules["__main__"].__dict__.get(target.function or "")
        if not callable(make_step):
            raise _MissingError(f"{target.path} has no function {target.function}; name one that returns a step")
        step = make_step()
        if not callable(step):
            raise _MissingError(
                f"{target.path}:{target.function} returned {type(step).__name__}, not a function; it must return a "
                "step that takes no arguments"
            )
        for _ in range(steps):
            step()
            after_step()

    return run_function if target.function else run_script


class _MissingError(AuditError):
    """The target has no such function."""


def _module_starter(name: str) -> Callable[[], None]:
    from importlib.util import find_spec

    sys.path.insert(0, str(Path.cwd()))
    try:
        spec = find_spec(name)
    except (ImportError, ValueError) as error:
        raise AuditError(f"module {name} cannot be found: {error}") from None
    if spec is None:
        raise AuditError(f"module {name} cannot be found; run the command where `python -m {name}` works")

    def run_module() -> None:
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    return run_module


@contextmanager
def _as_main(target: Target) -> Iterator[None]:
    """Let the script find itself: its arguments, its folder, its module."""
    argv, path, main = sys.argv, list(sys.path), sys.modules["__main__"]
    sys.argv = [str(target.path or target.module), *target.arguments]
    if target.path is not None:
        sys.path[0:1] = [str(target.path.resolve().parent)]
        module = ModuleType("__main__")
        module.__file__ = str(target.path)
        module.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path
        sys.modules["__main__"] = main


@contextmanager
def _counting_processes(recorder: Recorder) -> Iterator[None]:
    """Note processes that the script starts: what they run is not seen."""
    patches = Patches()
    started: list[str] = []
    nested = 0  # multiprocessing forks by itself

    def popen(original: Callable[..., Any], process: Any, args: Any, *rest: Any, **kwargs: Any) -> None:
        command = args if isinstance(args, str) else " ".join(str(part) for part in args)
        started.append(command.split("\n")[0][:80])
        original(process, args, *rest, **kwargs)

    def start(original: Callable[..., Any], process: Any) -> None:
        target = getattr(process, "_target", None)
        if getattr(target, "__module__", "") != "torch.utils.data._utils.worker":  # loading data is no training
            started.append(f"{type(process).__name__} {getattr(target, '__qualname__', process.name)}")
        nonlocal nested
        nested += 1
        try:
            original(process)
        finally:
            nested -= 1

    def fork(original: Callable[..., Any]) -> Any:
        process = original()
        if process and not nested:
            started.append("a fork of the script")
        return process

    if hasattr(os, "fork"):
        patches.wrap(os, "fork", fork)
    patches.wrap(subprocess.Popen, "__init__", popen)
    patches.wrap(BaseProcess, "start", start)
    try:
        yield
    finally:
        patches.undo()
        if started:
            shown = "; ".join(started[:3]) + (f" and {len(started) - 3} more" if len(started) > 3 else "")
            were = "1 process was" if len(started) == 1 else f"{len(started)} processes were"
            recorder.notes.append(f"{were} started, and what ran there was not seen: {shown}")
