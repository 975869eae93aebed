"""The calls that mixed precision depends on, followed: autocast, loss scaling, backward, clipping, updates, saving.

Each is noted as an `Event` with the facts that a judgement needs (was the root scaled, do these gradients still carry
the scale, is an autocast region open), taken at the moment of the call. Nothing is judged here.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.amp.autocast_mode import autocast
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad
from torch.optim import Optimizer, lr_scheduler

from mezzotint.patches import Patches
from mezzotint.torch_internals.autocast import scale_of, wrap_clipping
from mezzotint.torch_internals.autograd import current_graph_task, wrap_backward
from mezzotint.trace.addresses import address_of
from mezzotint.trace.gradients import Gradients, weights_of
from mezzotint.trace.lanes import Lane, Region
from mezzotint.trace.mode import Tape, dtype_name
from mezzotint.trace.operands import operands_of
from mezzotint.trace.record import UNKNOWN, Event

_PASSED_THROUGH = frozenset(
    {"add", "sub", "mul", "div", "neg", "sum", "mean", "stack", "cat", "_to_copy", "view", "expand", "select", "clone",
     "add_", "mul_", "div_", "unsqueeze", "squeeze", "_unsafe_view", "alias", "detach"}
)  # fmt: skip
_DEPTH = 12
_SCALER_KEYS = frozenset({"scale", "growth_factor"})
_OPTIMIZER_KEYS = frozenset({"state", "param_groups"})
_SCAN_DEPTH = 5
_ZEROED = frozenset({"zero_", "_foreach_zero_", "zeros_like", "zeros", "new_zeros"})
_PARTS_OF_CLIPPING = ("_get_total_norm", "_clip_grads_with_norm_")
_Dtypes = dict[tuple[str, tuple[int, ...]], set[str]]


def _restored(_optimizer: Any, state: Any = None, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
    """Whether there is anything in what an optimizer restores: libraries move fresh ones so."""
    return {"is_empty": isinstance(state, Mapping) and not state.get("state")}


class Protocol:
    """Installs the patches and writes the events."""

    def __init__(
        self,
        tape: Tape,
        *,
        on_backward: Callable[[], None],
        on_step: Callable[[str, bool, float | None], None],
        optimizers: Sequence[Optimizer] | None = None,
    ) -> None:
        self._tape = tape
        self._on_backward = on_backward
        self._on_step = on_step
        self._optimizers = optimizers
        self._patches = Patches(tape.guard)
        self._explicit: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
        self._scaled_operations: dict[int, int] = {}  # operation -> the scaler that scaled what it made
        self._serials: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._num_serials = 0
        self._last_backward = 0  # the operation after the last backward pass
        self._scaler_depth = 0
        self._num_stepped = 0
        self._loss: float | None = None
        self.gradients = Gradients()
        self.events: list[Event] = []

    def install(self) -> None:
        """Begin to follow."""
        wrap = self._patches.wrap
        wrap(autocast, "__init__", self._autocast_init)
        wrap(autocast, "__enter__", self._autocast_enter)
        wrap(autocast, "__exit__", self._autocast_exit)
        wrap_backward(self._patches, self._backward)
        self._tape.sites.add_barrier(Protocol._backward.__code__)
        for name, around in (
            ("scale", self._scale),
            ("unscale_", self._unscale),
            ("step", self._scaler_step),
            ("update", self._plain("scaler.update", self._update_facts)),
            ("get_scale", self._plain("scaler.get_scale")),
            ("state_dict", self._plain("scaler.state_dict")),
            ("load_state_dict", self._plain("scaler.load_state_dict")),
        ):
            wrap(GradScaler, name, around)
        wrap(Optimizer, "__init__", self._optimizer_init)
        wrap(Optimizer, "zero_grad", self._zero_grad)
        wrap(Optimizer, "state_dict", self._plain("optimizer.state_dict"))
        wrap(Optimizer, "load_state_dict", self._plain("optimizer.load_state_dict", _restored))
        wrap_clipping(self._patches, self._grouped)
        for owner in (clip_grad, torch.nn.utils):
            for name in ("clip_grad_norm_", "clip_grad_value_"):
                wrap(owner, name, self._as_update)
        for name in _PARTS_OF_CLIPPING:  # looked up in the module, however the function around them was imported
            if hasattr(clip_grad, name):
                wrap(clip_grad, name, self._as_update)
        for scheduler in (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau):
            if "step" in vars(scheduler):
                wrap(
                    scheduler,
                    "step",
                    self._plain("scheduler.step", lambda one, *_a, **_k: {"class": type(one).__name__}),
                )
        wrap(torch, "save", self._save)
        if self._optimizers is not None:
            self.gradients.optimizers.update(self._optimizers)
            self.gradients.is_complete = True

    def remove(self) -> None:
        """Put everything back."""
        self._patches.undo()

    def note(
        self, name: str, lane: Lane, facts: Mapping[str, Any], *, first: int | None = None, depth: int = 2
    ) -> None:
        """Write one event, called where the frame `depth` above is."""
        tape = self._tape
        end = len(tape.log)
        self.events.append(
            Event(
                name=name,
                step=tape.step,
                operation=end if first is None else first,
                end=end,
                site=tape.sites.here(sys._getframe(depth)),
                module=lane.modules[-1] if lane.modules else "",
                thread=lane.thread,
                facts=facts,
            )
        )

    def note_error(self, error: Exception, lane: Lane) -> None:
        """Write an event for the exception that ended the program."""
        tape = self._tape
        self.events.append(
            Event(
                name="error",
                step=tape.step,
                operation=len(tape.log),
                end=len(tape.log),
                site=tape.sites.of_error(error.__traceback__),
                module="",
                thread=lane.thread,
                facts={"error": str(error), "error_class": type(error).__name__, **operands_of(error)},
            )
        )

    def _plain(self, name: str, facts: Callable[..., Mapping[str, Any]] | None = None) -> Callable[..., Any]:
        """Return a wrapper that notes a call and how it ended."""

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            lane, first = self._tape.lanes.mine(), len(self._tape.log)
            known = dict(facts(*args, **kwargs)) if facts is not None else {}
            with self._failing(name, lane, known):
                result = original(*args, **kwargs)
            self.note(name, lane, known, first=first, depth=3)
            return result

        return around

    def _failing(self, name: str, lane: Lane, facts: Mapping[str, Any]) -> AbstractContextManager[Any]:
        return _Failing(self, name, lane, facts)

    def _update_facts(self, scaler: Any, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        return {"is_enabled": scaler.is_enabled(), "scaler": self._serial(scaler)}

    def _serial(self, owner: Any) -> int:
        """Return a number for a scaler or an optimizer that no other gets, whatever becomes of its address."""
        if owner not in self._serials:
            self._num_serials += 1
            self._serials[owner] = self._num_serials
        return self._serials[owner]

    # autocast

    def _autocast_init(self, original: Callable[..., Any], region: Any, *args: Any, **kwargs: Any) -> None:
        original(region, *args, **kwargs)
        self._explicit[region] = len(args) > 1 or kwargs.get("dtype") is not None

    def _autocast_enter(self, original: Callable[..., Any], region: Any) -> Any:
        result = original(region)
        lane = self._tape.lanes.mine()
        dtype = dtype_name(region.fast_dtype) if torch.is_autocast_enabled(region.device) else None
        site = self._tape.sites.here(sys._getframe(2))
        is_default = not self._explicit.get(region, True)
        lane.regions.append(Region(region.device, dtype, torch.is_autocast_cache_enabled(), site, is_default))
        in_backward = current_graph_task() != -1
        self.note(
            "autocast.enter",
            lane,
            {
                "device": region.device,
                "dtype": dtype,
                "is_default_dtype": is_default,
                "in_backward": in_backward,
                "depth": len(lane.regions),
            },
            depth=3,
        )
        return result

    def _autocast_exit(self, original: Callable[..., Any], region: Any, *error: Any) -> Any:
        lane = self._tape.lanes.mine()
        if lane.regions:
            lane.regions.pop()
        result = original(region, *error)
        self.note("autocast.exit", lane, {"depth": len(lane.regions)}, depth=3)
        return result

    # backward

    def _backward(self, original: Callable[..., Any], roots: Any, *args: Any, **kwargs: Any) -> Any:
        tape = self._tape
        lane = tape.lanes.mine()
        is_nested = current_graph_task() != -1
        if not is_nested:
            self._on_backward()
            lane.update_depth = 0  # an update that raised left it standing
        is_grad = not kwargs.get("accumulate_grad", True)
        builds_graph = bool(args[2]) if len(args) > 2 else False
        facts = self._root_facts(roots, lane)
        first = len(tape.log)
        before = {} if is_grad else self._gradients_before(roots)
        base, lane.base = lane.base, len(lane.modules)
        depth, lane.update_depth = lane.update_depth, 0
        tape.graph_depth += builds_graph
        name = "grad" if is_grad else "backward"
        facts |= {"is_nested": is_nested, "builds_graph": builds_graph}
        try:
            with self._failing(name, lane, facts):
                result = original(roots, *args, **kwargs)
        finally:
            tape.graph_depth -= builds_graph
            self.gradients.end_backward(before)
            lane.base, lane.update_depth = base, depth
        if is_grad:
            facts["results"] = [_address(one) for one in result if isinstance(one, Tensor)]
            facts["made"] = sorted({tape.makers.get(address, UNKNOWN) for address in facts["results"]})
        else:
            facts |= self.gradients.after_backward(before, scaler=facts["scaler"])
            self._last_backward = len(tape.log)
            tape.scaled_gradients = self.gradients.scaled_addresses()
        self.note(name, lane, facts, first=first, depth=3)
        return result

    def _gradients_before(self, roots: Any) -> dict[int, tuple[int, int]]:
        """Return how each gradient looks before a backward pass; one that was filled with 0 by hand is known again."""
        makers, log = self._tape.makers, self._tape.log
        self.gradients.meet(roots, sys._getframe(3))
        zeroed = []
        for weight in self.gradients.weights():
            maker = makers.get(_address(weight.grad), UNKNOWN) if weight.grad is not None else UNKNOWN
            if maker >= 0 and log[maker][0].traits.name in _ZEROED:
                zeroed.append(weight)
        self.gradients.zeroed(zeroed)
        return self.gradients.before_backward()

    def _root_facts(self, roots: Any, lane: Lane) -> dict[str, Any]:
        """Return what is known about the tensors that a backward pass starts from."""
        tensors = [roots] if isinstance(roots, Tensor) else [one for one in roots if isinstance(one, Tensor)]
        makers = [self._tape.makers.get(_address(one), UNKNOWN) for one in tensors]
        region = lane.region
        scaler = max((self._scaler_of(maker) for maker in makers), default=0)
        if self._loss is None and len(tensors) == 1 and tensors[0].numel() == 1 and tensors[0].is_cpu:
            self._loss = self._value(tensors[0], lane)
        return {
            "dtypes": [dtype_name(one.dtype) for one in tensors],
            "shapes": [tuple(one.shape) for one in tensors],
            "makers": makers,
            "is_scaled": bool(scaler),
            "scaler": scaler,
            "factor": max((self._factor(maker) for maker in makers), default=1.0),
            "autocast": region.dtype if region is not None else None,
            "region_line": region.site[0] if region is not None and region.site else None,
        }

    def _value(self, tensor: Tensor, lane: Lane) -> float | None:
        with lane.paused(), torch.no_grad():
            try:
                return float(tensor)
            except (RuntimeError, ValueError):
                return None

    def _scaler_of(self, operation: int) -> int:
        """Return the number of the scaler that scaled a root, 0 where none did."""
        found = (self._scaled_operations.get(one, 0) for one in self._ancestors(operation))
        return next((one for one in found if one), 0)

    def _factor(self, operation: int) -> float:
        """Return the largest constant that a root was multiplied by on its way: a loss scale made by hand."""
        factor = 1.0
        for one in self._ancestors(operation):
            entry, _, _, numbers, *_ = self._tape.log[one]
            if entry.traits.name.startswith("mul") and numbers:
                factor = max(factor, abs(numbers[0]))
            elif entry.traits.name.startswith("div") and numbers and numbers[0]:
                factor = max(factor, abs(1.0 / numbers[0]))
        return factor

    def _ancestors(self, operation: int) -> Iterable[int]:
        """Yield an operation and those before it through which a loss passes unchanged but for sums and factors."""
        seen: set[int] = set()
        level = [operation]
        for _ in range(_DEPTH):
            following: list[int] = []
            for one in level:
                if one < 0 or one in seen:
                    continue
                seen.add(one)
                yield one
                entry, _, producers, *_ = self._tape.log[one]
                if entry.traits.name in _PASSED_THROUGH and all(shape.numel() == 1 for _, shape in entry.outputs):
                    following.extend(producers)
            level = following

    # loss scaling

    def _scale(self, original: Callable[..., Any], scaler: Any, outputs: Any) -> Any:
        lane, first = self._tape.lanes.mine(), len(self._tape.log)
        if isinstance(outputs, Tensor) and outputs.numel() == 1 and outputs.is_cpu:
            self._loss = self._value(outputs, lane)
        result = original(scaler, outputs)
        given = (
            [outputs] if isinstance(outputs, Tensor) else list(outputs) if isinstance(outputs, (list, tuple)) else []
        )
        made = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, (list, tuple)) else []
        if scaler.is_enabled():
            for one in made:
                operation = self._tape.makers.get(_address(one), UNKNOWN)
                if operation >= first:
                    self._scaled_operations[operation] = self._serial(scaler)
        held = scale_of(scaler)
        scale = self._value(held, lane) if held is not None and held.is_cpu else None
        self.note(
            "scaler.scale",
            lane,
            {
                "is_enabled": scaler.is_enabled(),
                "dtypes": [dtype_name(one.dtype) for one in given],
                "scale": scale,
                "scaler": self._serial(scaler),
            },
            first=first,
            depth=3,
        )
        return result

    def _unscale(self, original: Callable[..., Any], scaler: Any, optimizer: Any) -> Any:
        lane, first = self._tape.lanes.mine(), len(self._tape.log)
        facts = {
            "is_enabled": scaler.is_enabled(),
            "in_step": self._scaler_depth > 0,
            "num_unscaled": self.gradients.num_unscaled(weights_of(optimizer)),
            "num_mixed": self.gradients.num_mixed(weights_of(optimizer)),
            "num_of_others": self.gradients.num_of_others(weights_of(optimizer), self._serial(scaler)),
            "grad_dtypes": sorted({dtype_name(w.grad.dtype) for w in weights_of(optimizer) if w.grad is not None}),
            "scaler": self._serial(scaler),
            "optimizer_id": self._serial(optimizer),
        }
        with self._failing("scaler.unscale", lane, facts), lane.updating():
            result = original(scaler, optimizer)
        self.gradients.unscaled(weights_of(optimizer))
        self._tape.scaled_gradients = self.gradients.scaled_addresses()
        self.note("scaler.unscale", lane, facts, first=first, depth=3)
        return result

    def _scaler_step(self, original: Callable[..., Any], scaler: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        lane, first = self._tape.lanes.mine(), len(self._tape.log)
        stepped = self._num_stepped
        facts: dict[str, Any] = {
            "is_enabled": scaler.is_enabled(),
            "has_closure": any(callable(value) for value in (*args, *kwargs.values())),
            "optimizer": type(optimizer).__name__,
            "optimizer_id": self._serial(optimizer),
            "scaler": self._serial(scaler),
            "num_grads": sum(weight.grad is not None for weight in weights_of(optimizer)),
        }
        self._scaler_depth += 1
        try:
            with self._failing("scaler.step", lane, facts), lane.updating():
                result = original(scaler, optimizer, *args, **kwargs)
        finally:
            self._scaler_depth -= 1
        facts["is_skipped"] = self._num_stepped == stepped
        self.gradients.unscaled(weights_of(optimizer))
        self._tape.scaled_gradients = self.gradients.scaled_addresses()
        self.note("scaler.step", lane, facts, first=first, depth=3)
        if facts["is_skipped"]:
            self._end_step(type(optimizer).__name__, is_skipped=True)
        return result

    # optimizers

    def _optimizer_init(self, original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> None:
        original(optimizer, *args, **kwargs)
        self.gradients.optimizers.add(optimizer)

    def _zero_grad(self, original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> None:
        lane, first = self._tape.lanes.mine(), len(self._tape.log)
        original(optimizer, *args, **kwargs)
        self.gradients.zeroed(weights_of(optimizer))
        self._tape.scaled_gradients = self.gradients.scaled_addresses()
        self.note("optimizer.zero_grad", lane, {"optimizer_id": self._serial(optimizer)}, first=first, depth=3)

    def before_step(self, optimizer: Any, lane: Lane) -> dict[str, Any]:
        """Return the facts about an optimizer that is about to step."""
        weights = list(weights_of(optimizer))
        self.gradients.optimizers.add(optimizer)
        region = lane.region
        for one in lane.regions:
            one.updated = True
        return {
            "optimizer": type(optimizer).__name__,
            "optimizer_id": self._serial(optimizer),
            "in_scaler": self._scaler_depth > 0,
            "num_scaled": self.gradients.num_scaled(weights),
            "num_mixed": self.gradients.num_mixed(weights),
            "num_weights": len(weights),
            "num_grads": sum(weight.grad is not None for weight in weights),
            "is_trained": any(weight.requires_grad for weight in weights),
            "num_rewritten": self._num_rewritten(weights),
            "dtypes": sorted({dtype_name(weight.dtype) for weight in weights}),
            "grad_dtypes": sorted({dtype_name(w.grad.dtype) for w in weights if w.grad is not None}),
            "autocast": region.dtype if region is not None else None,
            "has_cache": bool(region is not None and region.has_cache),
        }

    def _num_rewritten(self, weights: Sequence[Tensor]) -> int:
        """Return how many gradients were written since the last backward pass: unscaled or clipped by hand, say."""
        makers, last = self._tape.makers, self._last_backward
        return sum(one.grad is not None and makers.get(_address(one.grad), UNKNOWN) >= last for one in weights)

    def after_step(self, facts: Mapping[str, Any], first: int, lane: Lane, depth: int) -> None:
        """Note that an optimizer has stepped."""
        self._num_stepped += 1
        self.note("optimizer.step", lane, facts, first=first, depth=depth)
        self._end_step(str(facts["optimizer"]), is_skipped=False)

    def end_step_by_hand(self) -> None:
        """End a step whose update the program made by itself."""
        self._end_step("by hand", is_skipped=False)

    def _end_step(self, optimizer: str, *, is_skipped: bool) -> None:
        loss, self._loss = self._loss, None
        self._on_step(optimizer, is_skipped, loss)

    # clipping and saving

    def _as_update(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._tape.lanes.mine().updating():
            return original(*args, **kwargs)

    def _grouped(self, original: Callable[..., Any], tensors: Any, *args: Any, **kwargs: Any) -> Any:
        """Note a clip: torch's clipping functions all group the gradients first, however they were imported."""
        caller = sys._getframe(2).f_code.co_name
        if caller in ("_clip_grads_with_norm_", "clip_grad_value_"):
            grads = [one for one in tensors[0] if isinstance(one, Tensor)]
            weights = self.gradients.owners_of(grads)
            lane = self._tape.lanes.mine()
            self.note(
                "clip",
                lane,
                {
                    "function": "clip_grad_value_" if caller == "clip_grad_value_" else "clip_grad_norm_",
                    "num_grads": len(grads),
                    "num_scaled": self.gradients.num_scaled(weights),
                    "dtypes": sorted({dtype_name(grad.dtype) for grad in grads}),
                },
                depth=3,
            )
        return original(tensors, *args, **kwargs)

    def _save(self, original: Callable[..., Any], saved: Any, *args: Any, **kwargs: Any) -> Any:
        lane = self._tape.lanes.mine()
        found: set[str] = set()
        dtypes: _Dtypes = {}
        _scan(saved, found, dtypes, _SCAN_DEPTH)
        with lane.paused():
            result = original(saved, *args, **kwargs)
        self.note("save", lane, {"holds": sorted(found), "tensors": dtypes}, depth=3)
        return result


class _Failing:
    """Notes an event with its error when the call raises."""

    def __init__(self, protocol: Protocol, name: str, lane: Lane, facts: Mapping[str, Any]) -> None:
        self._protocol, self._name, self._lane, self._facts = protocol, name, lane, facts

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Write the event if there is an error."""
        if isinstance(error, Exception):
            facts = {**self._facts, "error": str(error), "error_class": type(error).__name__}
            self._protocol.note(self._name, self._lane, facts, depth=4)


def _address(tensor: Tensor) -> int:
    try:
        return address_of(tensor)
    except (RuntimeError, NotImplementedError):
        return 0


def _scan(value: Any, found: set[str], dtypes: _Dtypes, depth: int) -> None:
    """Find out what a checkpoint holds, by the keys of the state dicts of optimizers and scalers.

    `dtypes` gets the dtypes of the tensors in dictionaries of tensors, by key and shape.
    """
    if isinstance(value, Mapping):
        keys = {key for key in value if isinstance(key, str)}
        if keys >= _OPTIMIZER_KEYS:
            found.add("optimizer")
            return
        if keys >= _SCALER_KEYS:
            found.add("scaler")
            return
        if value and all(isinstance(item, Tensor) for item in value.values()):
            found.add("tensors")
            for key, one in value.items():
                dtypes.setdefault((str(key), tuple(one.shape)), set()).add(dtype_name(one.dtype))
            return
        values: Iterable[Any] = value.values()
    elif isinstance(value, (list, tuple)):
        values = value[:100]
    elif isinstance(value, Optimizer):
        found.add("optimizer")
        return
    elif isinstance(value, GradScaler):
        found.add("scaler")
        return
    elif hasattr(value, "__dict__") and not isinstance(value, (Tensor, type, torch.nn.Module)):
        values = vars(value).values()
    else:
        return
    if depth:
        for item in values:
            _scan(item, found, dtypes, depth - 1)
