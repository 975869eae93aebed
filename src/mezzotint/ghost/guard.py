"""A device guard for CUDA where torch was built without it.

Autograd's C++ code asks the guard of a tensor's device for the current device and stream; without a guard it aborts the
process. PyTorch has a guard that does nothing, made for this purpose, but installs it only over a guard that counts no
devices. A build for the CPU has none at all, so one that counts no devices is registered first. Only its `deviceCount`
is ever called, before PyTorch's own takes its place, so all entries of its method table may be the same function.

That is how torch 2.13 to 2.15 are built; no header is compiled here that would notice a change. So the exchange is
first tried in a forked child, which may crash: the parent goes on only if the child found PyTorch's guard in place.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from mezzotint.errors import GhostError
from mezzotint.torch_internals.fake import is_cuda_build, use_registered_guard

_CUDA = 1  # c10::DeviceType::CUDA
_REGISTER = (
    "_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"  # Itanium name mangling
)
_NUM_METHODS = 64
_DEADLINE = 10.0  # seconds; the child needs milliseconds
_fork = getattr(os, "fork", None)  # not that of a recording, which counts the processes that a script starts
_kept: list[object] = []  # what C++ points to lives as long as the process


class CountingGuard:
    """An object with a C++ method table whose methods all return `count`, and the calls that it got."""

    def __init__(self, num_methods: int = _NUM_METHODS, count: int = 0) -> None:
        self.calls: list[int] = []

        def answer(this: int) -> int:
            self.calls.append(this)
            return count

        self._answer = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(answer)
        address = ctypes.cast(self._answer, ctypes.c_void_p).value
        self._methods = (ctypes.c_void_p * _NUM_METHODS)(*[address] * num_methods)  # null beyond
        self._object = (ctypes.c_void_p * 1)(ctypes.addressof(self._methods))
        self.address = ctypes.addressof(self._object)

    def register(self) -> None:
        """Register it for CUDA, and let PyTorch put its own in its place."""
        register = _register_function()
        register.argtypes = [ctypes.c_int8, ctypes.c_void_p]
        register.restype = None
        register(_CUDA, self.address)
        use_registered_guard()

    def was_replaced(self) -> bool:
        """Whether it was asked once, and a public call that goes through the guard of CUDA does not reach it now."""
        stream = torch.Stream(stream_id=0, device_index=0, device_type=_CUDA)
        with contextlib.suppress(RuntimeError):  # PyTorch's guard may have no streams to ask
            stream.query()
        return self.calls == [self.address]


def install_guard() -> None:
    """Make sure that C++ finds a guard for CUDA. Done once per process, never undone: without a GPU it does nothing.

    Raises GhostError where the build of torch has no such function (Windows names it otherwise), or where its guards
    are built otherwise than expected.
    """
    if _kept or is_cuda_build():
        return
    _register_function()
    guard = CountingGuard()
    check_guard(guard)
    _kept.append(guard)
    guard.register()


def check_guard(guard: CountingGuard) -> None:
    """Register a guard in a forked child only. Raises GhostError where it crashed, hung, or was not replaced."""
    if _fork is None:
        raise GhostError("the ghost GPU checks its device guard in a forked process, and this system has none")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: the child only calls C and exits
            child = _fork()
    except OSError as error:
        raise GhostError(f"the ghost GPU could not start a process to check its device guard: {error}") from error
    if child == 0:
        _try_in_child(guard)
    status = _wait(child)
    if status == 0:
        return
    found = (
        f"it did not end within {_DEADLINE:.0f} seconds" if status is None
        else f"it crashed with signal {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status)
        else "torch's own guard was not in place afterwards"
    )  # fmt: skip
    raise GhostError(
        f"device guards of torch {torch.__version__} must be built as in torch 2.13 to 2.15, and are not: in a trial, "
        f"{found}; use one of these versions, or a build of torch with CUDA"
    )


def _try_in_child(guard: CountingGuard) -> None:
    """Register the guard and end this process: 0 where it was replaced."""
    code = 1
    try:
        import resource  # not on Windows

        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        guard.register()
        code = 0 if guard.was_replaced() else 1
    finally:
        os._exit(code)


def _wait(child: int) -> int | None:
    """Return the status of a child, None where it had to be killed."""
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _register_function() -> Any:
    try:
        return getattr(_library(), _REGISTER)
    except AttributeError:
        raise GhostError(
            f"torch {torch.__version__} has no registerDeviceGuard under the name that Linux and macOS builds give it; "
            "the ghost GPU needs one of those, or a build with CUDA"
        ) from None


def _library() -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libc10.so", "libc10.dylib"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    raise GhostError(f"{folder} has no libc10; the ghost GPU needs torch for Linux or macOS")
