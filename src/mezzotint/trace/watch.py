"""`mz.watch`: the audit's figures during a long training, at the price of one recorded step in `every`.

    with mz.watch(every=50, out="metrics.jsonl") as watch:
        train()

A recorded step costs what the audit costs (docs/audit.md has the figures), so one in fifty costs well below one
percent; sampling the elements of every step instead costs 4 to 6 percent and misses a lone infinity. Between recorded
steps there is a hook on optimizers and a wrapper each around the gradient scaler's step and backward. Where several
optimizers take turns, each of their updates counts as a step, and recording goes on until all had their turn.

Nothing of the training changes: not a bit of it, and an alarm stops nothing. Whatever goes wrong while watching ends
the watching, not the training, and is logged once as a warning. While an audit records, the watch skips its turns.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from mezzotint.errors import AuditError, echoed, is_count
from mezzotint.kernels.memory import has_numbers
from mezzotint.patches import Guard, Patches
from mezzotint.torch_internals.autocast import scale_of
from mezzotint.torch_internals.autograd import wrap_backward
from mezzotint.torch_internals.registry import Feature, notes
from mezzotint.trace.alarms import Alarm, Limits, Raised, ScaleHistory, StoppedWeights, row_alarms
from mezzotint.trace.mode import sweep
from mezzotint.trace.module_names import ModuleNames
from mezzotint.trace.record import Trace
from mezzotint.trace.recorder import BusyError, Recorder
from mezzotint.trace.watch_row import histograms, row_of

logger = logging.getLogger("mezzotint")
_MAX_ROUND = 8  # optimizers that take turns, at most
_SKIPS_IN_A_ROW = 3  # a gradient scaler that searches its scale skips fewer


class StepWatch:
    """Records single steps on demand and judges them. `Watch` drives it by hooks; a loop may drive it itself.

    `alarms` holds what was raised; `rows` and `alarms` go to `write` as JSON objects, one by one.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        write: Callable[[dict[str, Any]], None] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.alarms: list[Alarm] = []
        self.guard = guard or Guard("watching", self._drop)
        self._write = write or (lambda line: None)
        self._raised = Raised(self.limits)
        self._history = ScaleHistory(self.limits)
        self._stopped = StoppedWeights(self.limits)
        self._names = ModuleNames()
        self._recorder: Recorder | None = None
        self._said_busy = False
        self.last_trace: Trace | None = None

    @contextmanager
    def recording(self, step: int) -> Iterator[None]:
        """Record what runs inside as step number `step`."""
        self.begin()
        try:
            yield
        finally:
            self.end(step)

    @property
    def is_recording(self) -> bool:
        """Whether a step is being recorded."""
        return self._recorder is not None

    @property
    def recorder(self) -> Recorder | None:
        """The recorder at work."""
        return self._recorder

    def begin(self, optimizer: torch.optim.Optimizer | None = None, *, hears_optimizers: bool = True) -> None:
        """Begin to record, unless somebody else records; `optimizer` saves looking for all there are."""
        if self.guard.fault is not None or self._recorder is not None:
            return
        with self.guard:
            recorder = Recorder(
                names=self._names,
                optimizers=None if optimizer is None else [optimizer],
                hears_optimizers=hears_optimizers,
                guard=self.guard,
                gives_way=self.give_way,
            )
            try:
                self._recorder = recorder.__enter__()
            except BusyError:
                self._say_busy()

    def end(self, step: int) -> dict[str, Any] | None:
        """Stop recording; write the row of the step and raise its alarms."""
        if self._recorder is None:
            return None
        recorder, self._recorder = self._recorder, None
        recorder.__exit__(None, None, None)
        with self.guard:
            if self.guard.fault is not None:
                return None
            self.last_trace = recorder.trace()
            row = row_of(self.last_trace, step)
            self._write({"kind": "watch", **row})
            for alarm in (*row_alarms(row, self.limits), *self._stopped.add(row)):
                self.raise_alarm(alarm)
            return row
        return None

    def abandon(self) -> None:
        """Stop recording without a row."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.__exit__(None, None, None)

    def give_way(self) -> None:
        """Stop recording, as an audit begins."""
        self.abandon()
        self._say_busy()

    def _say_busy(self) -> None:
        if not self._said_busy:
            self._said_busy = True
            logger.warning("an audit or another watch is recording: this watch skips its turns until that has ended")

    def _drop(self) -> None:
        if self._recorder is not None:
            self._recorder.stop()

    def add_scale(self, step: int, scale: float | None, *, is_skipped: bool) -> None:
        """Take note of a step's loss scale, and whether the step was skipped."""
        with self.guard:
            for alarm in self._history.add(step, scale, is_skipped=is_skipped):
                self.raise_alarm(alarm)

    def raise_alarm(self, alarm: Alarm) -> None:
        """Raise an alarm, if it says something new."""
        if self._raised.is_new(alarm):
            self.alarms.append(alarm)
            self._write(alarm.to_json())


class Watch:
    """Watches any training loop in this process; use as a context, or `start()` and `stop()`.

    `every`: how many steps lie between recorded ones. `out`: a file of JSON lines to append to. `tensorboard`: a folder
    for curves and histograms (needs the extra). `on_alarm` is called with each alarm; all are logged as warnings, too.
    An exception of `on_alarm` is logged and ends its calls, not the training; to end that, let it raise SystemExit or
    KeyboardInterrupt. A file that cannot be written ends the writing. `fault` says what ended the watch early, if
    anything did. Raises AuditError for `every` below 1, for no path, and for an `on_alarm` that cannot be called.
    """

    def __init__(
        self,
        *,
        every: int = 50,
        out: str | Path | None = None,
        tensorboard: str | Path | None = None,
        limits: Limits | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
    ) -> None:
        if not is_count(every):
            raise AuditError(f"every={echoed(every)} is not a number of steps; pass 1 or more")
        for name, path in (("out", out), ("tensorboard", tensorboard)):
            if path is not None and not isinstance(path, str | Path):
                raise AuditError(f"{name}={echoed(path)} is no path; pass a str or a pathlib.Path")
        if on_alarm is not None and not callable(on_alarm):
            raise AuditError(f"on_alarm={echoed(on_alarm)} cannot be called; pass a function that takes an alarm")
        self._every = every
        self._out = Path(out) if out is not None else None
        self._board = _Board(Path(tensorboard)) if tensorboard is not None else None
        self._on_alarm = on_alarm
        self._guard = Guard("mz.watch", self._faulted)
        self._writing = Guard(f"writing to {str(out)[:120]}")
        self._drawing = Guard(f"writing to {str(tensorboard)[:120]}")
        self._calling = Guard("calling on_alarm")
        self._steps = StepWatch(limits=limits, write=self._take, guard=self._guard)
        self._patches = Patches(self._guard)
        self._depth = 0
        self._removers: list[Callable[[], None]] = []
        self._num_steps = 0
        self._num_stepped = 0
        self._skips_in_a_row = 0
        self._is_wanted = False
        self._began_at: int | None = None  # the optimizer whose step came before the recording
        self._began_step = 0
        self.rows: list[dict[str, Any]] = []

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms raised so far."""
        return self._steps.alarms

    @property
    def num_steps(self) -> int:
        """The number of steps that have ended, skipped ones included."""
        return self._num_steps

    def __enter__(self) -> "Watch":
        """Begin to watch."""
        self._depth += 1
        with self._guard:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching, with the outermost context."""
        self._depth -= 1
        if self._depth == 0:
            with self._guard:
                self.stop()

    @property
    def fault(self) -> str | None:
        """What ended the watch early, as a sentence; None where nothing did."""
        return self._guard.fault

    def _faulted(self) -> None:
        recorder = self._steps.recorder
        if recorder is not None:
            recorder.stop()

    def start(self) -> None:
        """Begin to watch; the first step that begins now is recorded."""
        if self._removers:
            return
        with self._guard:
            self._removers = [
                register_optimizer_step_pre_hook(self._guard.hook(self._steps_now)).remove,
                register_optimizer_step_post_hook(self._guard.hook(self._stepped)).remove,
            ]
            self._patches.wrap(GradScaler, "step", self._scaler_step)
            wrap_backward(self._patches, self._backward)
            for note in notes(Feature.RECORDING):
                logger.warning("%s", note)
            self._steps.begin(hears_optimizers=False)

    def stop(self) -> None:
        """Stop watching; a step that is under way is not judged."""
        if not self._removers:
            return
        with self._guard:
            self._steps.abandon()
            sweep()
        while self._removers:
            self._removers.pop()()
        self._patches.undo()
        if self._board is not None:
            with self._drawing:
                self._board.close()

    def _steps_now(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        recorder = self._steps.recorder
        return None if recorder is None else recorder.before_optimizer(optimizer, args, kwargs)

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        recorder = self._steps.recorder
        if recorder is not None:
            recorder.after_optimizer(optimizer, args, kwargs)
        self._num_stepped += 1
        self._skips_in_a_row = 0
        self._step_ended(optimizer)

    _steps_now.observes_only = _stepped.observes_only = True  # type: ignore[attr-defined]

    def _scaler_step(self, original: Callable[..., Any], scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        before = self._num_stepped
        result = original(scaler, optimizer, *args, **kwargs)
        is_skipped = self._num_stepped == before
        held = scale_of(scaler)
        scale = float(held) if held is not None and held.is_cpu and has_numbers(held) else None
        if is_skipped:
            self._skips_in_a_row += 1
            self._is_wanted |= self._skips_in_a_row >= _SKIPS_IN_A_ROW
            self._step_ended(optimizer)
        if scaler.is_enabled():
            self._steps.add_scale(self._num_steps, scale, is_skipped=is_skipped)
        return result

    def _backward(self, original: Callable[..., Any], roots: Any, *args: Any, **kwargs: Any) -> Any:
        """Look at the loss where that costs nothing: a number that lies in the CPU's memory."""
        root = roots[0] if isinstance(roots, (tuple, list)) and roots else roots
        if isinstance(root, torch.Tensor) and root.is_cpu and root.numel() == 1 and has_numbers(root):
            value = root.detach().item() if not self._steps.is_recording else 0.0
            if not math.isfinite(value):
                self._is_wanted = True
                self._steps.raise_alarm(
                    Alarm(
                        kind="loss",
                        step=self._num_steps,
                        place="loss",
                        measured=1.0,
                        limit=0.0,
                        message=f"the loss of step {self._num_steps} is {value}",
                        advice="the next step is recorded, and names the operation if it happens there again",
                    )
                )
        return original(roots, *args, **kwargs)

    def _step_ended(self, optimizer: Any) -> None:
        is_round = self._began_at is None or self._began_at == id(optimizer)
        if self._steps.is_recording and (is_round or self._num_steps - self._began_step >= _MAX_ROUND):
            self._steps.end(self._num_steps)
        self._num_steps += 1
        if not self._steps.is_recording and (self._is_wanted or self._num_steps % self._every == 0):
            self._is_wanted = False
            self._began_at, self._began_step = id(optimizer), self._num_steps
            self._steps.begin(optimizer, hears_optimizers=False)

    def _take(self, line: Mapping[str, Any]) -> None:
        """Hand a row or an alarm on to everybody who wants it."""
        if line["kind"] == "watch":
            self.rows.append(dict(line))
            if self._board is not None and self._steps.last_trace is not None and self._drawing.fault is None:
                with self._drawing:
                    self._board.write(line, self._steps.last_trace)
        if self._out is not None and self._writing.fault is None:
            with self._writing:
                self._append(self._out, line)
        if line["kind"] == "alarm":
            logger.warning("step %s: %s; %s", line["step"], line["message"], line["advice"])
            if self._on_alarm is not None and self._calling.fault is None:
                with self._calling:
                    self._on_alarm(self._steps.alarms[-1])

    def _append(self, out: Path, line: Mapping[str, Any]) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain(line), ensure_ascii=False) + "\n")
        if line["kind"] == "alarm" and line["alarm"] == "not-finite":
            dump = out.with_name(f"{out.stem}-not-finite-step-{line['step']}.json")
            dump.write_text(json.dumps(plain(line), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


watch = Watch  # used as a verb: with mz.watch():


class _Board:
    """Curves and histograms for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise AuditError("tensorboard needs a package: pip install 'mezzotint[tensorboard]'") from None
        self._writer: Any = SummaryWriter(str(folder))

    def write(self, row: Mapping[str, Any], trace: Trace) -> None:
        """Write one row: headroom and lost updates as curves, exponents as histograms."""
        step = row["step"]
        for name, module in row["modules"].items():
            for phase, figures in module.items():
                if figures["headroom_bits"] is not None:
                    self._writer.add_scalar(f"headroom/{name}/{phase}", figures["headroom_bits"], step)
        for key in ("share_lost", "share_bfloat16_would_lose"):
            if row["updates"][key] is not None:
                self._writer.add_scalar(f"updates/{key}", row["updates"][key], step)
        for name, tally in histograms(trace).items():
            held = [(field - 127, count) for field, count in enumerate(tally.exponents[:255]) if count and field]
            if held:
                self._writer.add_histogram_raw(
                    f"exponents/{name.replace(' ', '/')}",
                    min=held[0][0],
                    max=held[-1][0] + 1,
                    num=sum(count for _, count in held),
                    sum=sum(power * count for power, count in held),
                    sum_squares=sum(power * power * count for power, count in held),
                    bucket_limits=[power + 1 for power, _ in held],
                    bucket_counts=[count for _, count in held],
                    global_step=step,
                )

    def close(self) -> None:
        """Finish writing."""
        self._writer.close()


def plain(value: Any) -> Any:
    """Return `value` with infinities and NaN spelled as strings, as JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
