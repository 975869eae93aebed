"""A device guard for CUDA where torch was built without it.

Autograd's C++ code asks the guard of a tensor's device for the current device and stream; without a guard it aborts the
process. PyTorch has a guard that does nothing, made for this purpose, but installs it only over a guard that counts no
devices. A build for the CPU has none at all, so one that counts no devices is registered first. Only its `deviceCount`
is ever called, before PyTorch's own takes its place, so all entries of its method table may be the same function.
"""

import ctypes
from pathlib import Path

import torch

from mezzotint.errors import GhostError
from mezzotint.torch_internals.fake import is_cuda_build, use_registered_guard

_CUDA = 1  # c10::DeviceType::CUDA
_REGISTER = (
    "_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"  # Itanium name mangling
)
_NUM_METHODS = 64
_kept: list[object] = []  # what C++ points to lives as long as the process


def install_guard() -> None:
    """Make sure that C++ finds a guard for CUDA. Done once per process, never undone: without a GPU it does nothing.

    Raises GhostError where the build of torch has no such function (Windows names it otherwise).
    """
    if _kept or is_cuda_build():
        return
    library = _library()
    try:
        register = getattr(library, _REGISTER)
    except AttributeError:
        raise GhostError(
            f"torch {torch.__version__} has no registerDeviceGuard under the name that Linux and macOS builds give it; "
            "the ghost GPU needs one of those, or a build with CUDA"
        ) from None
    count = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(lambda _self: 0)
    address = ctypes.cast(count, ctypes.c_void_p).value
    methods = (ctypes.c_void_p * _NUM_METHODS)(*[address] * _NUM_METHODS)
    guard = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
    _kept.extend((count, methods, guard))
    register.argtypes = [ctypes.c_int8, ctypes.c_void_p]
    register.restype = None
    register(_CUDA, ctypes.addressof(guard))
    use_registered_guard()


def _library() -> ctypes.CDLL:
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libc10.so", "libc10.dylib"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    raise GhostError(f"{folder} has no libc10; the ghost GPU needs torch for Linux or macOS")
