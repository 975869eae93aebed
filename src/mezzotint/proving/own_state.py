"""What arms that take turns in one process must not share: random numbers and torch's process-wide settings.

Each arm has its own generators (torch's on every device, numpy's, Python's) and settings, put in place for its turn
and taken away after it, so that it computes what it would have computed alone. What cannot be exchanged, because a
with-block would be left and entered again, is refused by name.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from mezzotint.errors import ProofError
from mezzotint.lowprec import gate
from mezzotint.torch_internals.autograd import has_saved_tensors_hooks


class _Setting(NamedTuple):
    read: Callable[[], Any]
    write: Callable[[Any], None]


def _attribute(owner: Any, name: str) -> _Setting:
    return _Setting(lambda: getattr(owner, name), lambda value: setattr(owner, name, value))


def _set_anomaly_detection(value: tuple[bool, bool]) -> None:
    torch.autograd.set_detect_anomaly(*value)


_SETTINGS = (
    _Setting(torch.get_default_dtype, torch.set_default_dtype),
    _Setting(torch.get_num_threads, torch.set_num_threads),
    _Setting(torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    _Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    _attribute(torch.backends.cudnn, "benchmark"),
    _attribute(torch.backends.cudnn, "deterministic"),
    _attribute(torch.backends.cudnn, "allow_tf32"),
    _attribute(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    _attribute(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    _Setting(
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        _set_anomaly_detection,
    ),
)


class OwnState:
    """The random numbers and settings of one arm, beginning from `seed`; `who` is what a refusal calls it."""

    def __init__(self, seed: int, who: str) -> None:
        self._seed = seed
        self._who = who
        self._random: dict[str, Any] | None = None
        self._settings = read_settings()

    @contextmanager
    def active(self, *, is_checked: bool = True) -> Iterator[None]:
        """Run on this arm's state. Raises ProofError where the turn ends inside a context that others would share.

        Such a context is left when the run is closed, which is done without a check.
        """
        outside, settings, contexts = _read_random(), read_settings(), _open_contexts()
        if self._random is None:
            seed_everything(self._seed)
        else:
            _write_random(self._random)
        _write_settings(settings, self._settings)
        try:
            yield
        finally:
            self._random, self._settings = _read_random(), read_settings()
            left_open = [name for name, value in _open_contexts().items() if value != contexts[name]]
            _write_settings(self._settings, settings)
            _write_random(outside)
        if left_open and is_checked:
            raise ProofError(
                f"{self._who} gave up its turn inside {left_open[0]}, which the other arms would run in; leave it "
                "before each yield"
            )


def seed_everything(seed: int) -> None:
    """Seed every generator that training draws from."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def start_cuda() -> None:
    """Initialise CUDA where it is, so that each arm's generators exist from its first turn on."""
    if torch.cuda.is_available():
        torch.cuda.init()  # type: ignore[no-untyped-call]


def _read_random() -> dict[str, Any]:
    state = {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if "mps" in _devices():
        state["mps"] = torch.mps.get_rng_state()
    return state


def _write_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def _devices() -> tuple[str, ...]:
    return tuple(
        name for name, is_here in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        if is_here
    )  # fmt: skip


def read_settings() -> tuple[Any, ...]:
    """Return torch's process-wide settings; None for one that torch does not tell (it refuses mixed interfaces)."""
    values = []
    for setting in _SETTINGS:
        try:
            values.append(setting.read())
        except RuntimeError:
            values.append(None)
    return tuple(values)


def _write_settings(now: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    for setting, before, value in zip(_SETTINGS, now, wanted, strict=True):
        if value is not None and before is not None and value != before:
            setting.write(value)


def _open_contexts() -> dict[str, Any]:
    """Return what with-blocks of torch change, by the words of the user's program."""
    kinds = ("cpu", *_devices())
    found: dict[str, Any] = {
        "torch.autocast": [
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else 0)
            for kind in kinds
        ],
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.no_grad": torch.is_grad_enabled(),
        "a torch dispatch mode": _length("torch.utils._python_dispatch", "_get_current_dispatch_mode_stack"),
        "a torch function mode (torch.device, torch.set_default_device)": _length(
            "torch.overrides", "_get_current_function_mode_stack"
        ),
        "saved_tensors_hooks": has_saved_tensors_hooks(),
        "mz.fast_cpu": tuple(gate.is_ours(dtype) for dtype in gate.LOW_DTYPES),
    }
    return found


def _length(module: str, function: str) -> int:
    ask = getattr(sys.modules.get(module), function, None)
    return len(ask()) if ask is not None else 0
