"""The device guard is tried in a process of its own before torch's C++ code relies on it."""

import os
from typing import Any

import pytest
import torch

from mezzotint.errors import GhostError
from mezzotint.ghost import compiled, guard, kernels, owners, session
from mezzotint.ghost.faces import Faces
from mezzotint.ghost.mode import FaceMode, GhostFakeMode, GhostMode
from mezzotint.ghost.session import ghost_gpu
from mezzotint.torch_internals import dispatch
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


STAGES: dict[str, tuple[Any, str]] = {
    "hooks of modules": (compiled, "register_module_forward_hook"),
    "functions of torch.cuda": (session, "patch_cuda"),
    "kernels around autograd": (Faces, "_kernel"),
    "hooks of optimizers": (owners, "register_optimizer_step_post_hook"),
    "kernels of CUDA": (kernels, "_recurrent"),
    "fake tensors": (GhostFakeMode, "__enter__"),
    "operations": (GhostMode, "__enter__"),
    "functions": (FaceMode, "__enter__"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_while_entering_restores_everything(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> tuple[Any, ...]:
        return (
            dict(os.environ), torch.cuda.is_available(), torch.Tensor.backward, dict(vars(torch.cuda)),
            len(global_forward_hooks), len(global_pre_hooks), len(global_post_steps), session._FAKE_LOG.level,
            torch.get_rng_state().tolist(), dispatch.operator_names(), tuple(session._active),
        )  # fmt: skip

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise ZeroDivisionError(stage)

    from torch.nn.modules.module import _global_forward_hooks as global_forward_hooks
    from torch.nn.modules.module import _global_forward_pre_hooks as global_pre_hooks
    from torch.optim.optimizer import _global_optimizer_post_hooks as global_post_steps

    before = state()
    monkeypatch.setattr(*STAGES[stage], fail)
    with pytest.raises(ZeroDivisionError, match=stage), ghost_gpu("H100"):
        pass
    monkeypatch.undo()
    assert state() == before
    weight = torch.ones(2, 2, requires_grad=True)
    (weight @ weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[4.0, 4.0], [4.0, 4.0]]
    with ghost_gpu("H100"):
        assert torch.ones(2, device="cuda").is_cuda
