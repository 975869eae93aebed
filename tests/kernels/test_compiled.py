"""The decorator of compiled loops where nothing can be cached."""

import pytest

from mezzotint.kernels import compiled as module


def test_a_loop_is_compiled_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.njit

    def njit(**options: bool):  # type: ignore[no-untyped-def]
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(module, "njit", njit)
    twice = module.compiled(lambda number: number + number)
    assert twice(21) == 42


def test_importing_the_tensors_room_does_not_import_the_compiler() -> None:
    import subprocess
    import sys

    code = "import sys, mezzotint.kernels.tensors; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
