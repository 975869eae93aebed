"""The device guard is tried in a process of its own before torch's C++ code relies on it."""

import os

import pytest
import torch

from mezzotint.errors import GhostError
from mezzotint.ghost import guard
from mezzotint.ghost.session import ghost_gpu
from mezzotint.torch_internals.fake import is_cuda_build

pytestmark = pytest.mark.skipif(is_cuda_build(), reason="builds with CUDA have a guard")


def test_the_guard_as_built_is_replaced_by_torch() -> None:
    guard.check_guard(guard.CountingGuard())


@pytest.mark.parametrize(
    ("built", "found"),
    [
        ({"num_methods": 0}, "SIGSEGV"),
        ({"num_methods": 6}, "SIGSEGV"),  # a table where the method that torch calls lies elsewhere
        ({"count": 1}, "not in place"),
    ],
)
def test_another_layout_is_a_sentence(built: dict[str, int], found: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GhostError, match=rf"torch 2\.13 to 2\.15, and are not: .*{found}"):
        guard.check_guard(guard.CountingGuard(**built))
    assert capfd.readouterr() == ("", "")


def test_a_trial_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = guard.CountingGuard()
    monkeypatch.setattr(hanging, "register", lambda: os.read(os.pipe()[0], 1))
    monkeypatch.setattr(guard, "_DEADLINE", 0.2)
    with pytest.raises(GhostError, match="did not end"):
        guard.check_guard(hanging)


def test_a_failed_trial_leaves_no_ghost(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = guard.CountingGuard(num_methods=0)
    monkeypatch.setattr(guard, "_kept", [])
    monkeypatch.setattr(guard, "CountingGuard", lambda: broken)
    with pytest.raises(GhostError, match="device guards of torch"), ghost_gpu("H100"):
        pass
    assert not torch.cuda.is_available()
    monkeypatch.undo()
    with ghost_gpu("H100"):
        assert torch.ones(2, device="cuda").is_cuda
