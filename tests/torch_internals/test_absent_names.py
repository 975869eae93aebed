"""A torch without one of the private names: a sentence, a note, or the same result, never a silently other verdict."""

import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

import mezzotint as mz
from mezzotint.auditing.sensitivity import Probe
from mezzotint.errors import MezzotintError
from mezzotint.report.audit_text import print_audit
from mezzotint.torch_internals import autograd, registry
from mezzotint.torch_internals.registry import Feature, Internal

INTERNALS = registry.declared()
# where a hook point is a function of Python that functions of torch call by its name
HOOK_POINTS = {
    "torch.autograd._engine_run_backward": (torch.autograd.backward, torch.autograd.grad),
    "torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype": (
        torch.nn.utils.clip_grad._clip_grads_with_norm_,
        torch.nn.utils.clip_grad._get_total_norm,
    ),
}


@contextmanager
def without(internal: Internal) -> Iterator[None]:
    """Make mezzotint see a torch that does not have a name, and that works by another."""
    path = internal.path
    owner, _, name = path.rpartition(".")
    undo: list[Callable[[], None]] = []

    def put(target: Any, key: str, value: Any) -> None:
        held = getattr(target, key)
        setattr(target, key, value)
        undo.append(lambda: setattr(target, key, held))

    try:
        for function in HOOK_POINTS.get(path, ()):
            inner = getattr(function, "__wrapped__", function)
            code = inner.__code__
            names = tuple(f"{one}_renamed" if one == name else one for one in code.co_names)
            put(inner, "__code__", code.replace(co_names=names))
        if path in HOOK_POINTS:
            home = registry.find(owner)
            held = getattr(home, name)
            setattr(home, f"{name}_renamed", held)
            delattr(home, name)
            undo.append(lambda: (setattr(home, name, held), delattr(home, f"{name}_renamed"))[0])
        elif internal.check is not None:
            registry._declared[path] = replace(internal, check=lambda: False)
            undo.append(lambda: registry._declared.update({path: internal}))
        real_find = registry.find
        missing = registry.find(path, None) if path in registry._stand_ins else None
        for module in list(sys.modules.values()):
            if not getattr(module, "__name__", "").startswith("mezzotint"):
                continue
            for key, value in list(vars(module).items()):
                if value is real_find:
                    put(module, key, lambda p, default=None: default if p == path else real_find(p, default))
                elif missing is not None and value is missing and not isinstance(value, type):
                    put(module, key, registry._stand_ins[path])
        yield
    finally:
        while undo:
            undo.pop()()


def check_refusal(error: MezzotintError, internal: Internal, feature: Feature) -> None:
    """One sentence that names what is missing and what to install, from a feature that needs it."""
    assert feature in internal.needed_by
    assert internal.path in str(error)
    assert "install torch 2.13 to 2.15" in str(error)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def faulty_step(device: str = "cpu") -> None:
    """Clip scaled gradients (MZ221), and run backward inside autocast (MZ252)."""
    torch.manual_seed(0)
    model = Net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = model(torch.ones(2, 4, device=device)).float().square().mean()
            scaler.scale(loss).backward()
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()


def audited() -> tuple[list[str], list[str]]:
    with mz.audit() as seen:
        faulty_step()
    codes = [f"{one.code} {one.line} {one.module}" for one in seen.findings]
    return sorted(codes), list(seen.trace.notes)


@cache
def expected() -> tuple[list[str], list[str]]:
    return audited()


def names(feature: Feature, *, or_silent: bool = True) -> list[Any]:
    return [
        pytest.param(one, id=one.path)
        for one in INTERNALS
        if feature in one.needed_by or feature in one.noted_in or (or_silent and not one.needed_by and not one.noted_in)
    ]


def test_the_program_shows_its_faults() -> None:
    codes, notes = expected()
    assert {code[:5] for code in codes} >= {"MZ221", "MZ252"}
    assert notes == []


@pytest.mark.parametrize("internal", names(Feature.RECORDING))
def test_an_audit_says_what_it_does_not_know(internal: Internal) -> None:
    known = expected()
    with without(internal):
        try:
            codes, notes = audited()
        except MezzotintError as error:
            check_refusal(error, internal, Feature.RECORDING)
            return
    said = [note for note in notes if internal.path in note]
    assert said if internal.noted_in and Feature.RECORDING in internal.noted_in else codes == known[0]
    assert codes == known[0] or said
    assert audited() == known  # everything is put back


def test_public_functions_serve_where_the_engine_is_called_by_another_name() -> None:
    with without(next(one for one in INTERNALS if one.path == "torch.autograd._engine_run_backward")):
        assert not autograd.sees_backward()
        codes, notes = audited()
    assert codes == expected()[0]
    assert any("torch.autograd._engine_run_backward is missing" in note for note in notes)
    assert autograd.sees_backward()


def test_a_hook_point_that_nobody_calls_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is there still, but torch calls another: a check that only looks for the name would pass."""
    for function in (torch.autograd.backward, torch.autograd.grad):
        code = function.__code__
        renamed = tuple("_run" if one == "_engine_run_backward" else one for one in code.co_names)
        monkeypatch.setattr(function, "__code__", code.replace(co_names=renamed))
    monkeypatch.setattr(torch.autograd, "_run", torch.autograd._engine_run_backward, raising=False)
    autograd._checked.clear()
    codes, notes = audited()
    monkeypatch.undo()
    autograd._checked.clear()
    assert codes == expected()[0]
    assert any("_engine_run_backward is missing" in note for note in notes)


def test_clipping_is_a_note_in_every_result(caplog: pytest.LogCaptureFixture) -> None:
    internal = next(one for one in INTERNALS if one.path.endswith("_group_tensors_by_device_and_dtype"))
    note = internal.note()
    assert "clipping could not be watched" in note
    assert "MZ221" in note
    with without(internal):
        with mz.audit() as seen:
            faulty_step()
        assert note in seen.trace.notes
        assert note in " ".join(_text(seen).split())
        assert internal.path in _page(seen)
        with pytest.raises(AssertionError, match="clipping could not be watched"):
            mz.assert_policy(faulty_step, "fp16-mixed")
        with caplog.at_level("WARNING", logger="mezzotint"), mz.watch(every=1) as watched:
            faulty_step()
        assert note in caplog.text
        assert all(note in row["notes"] for row in watched.rows)


def test_a_passing_check_of_a_policy_warns() -> None:
    internal = next(one for one in INTERNALS if one.path.endswith("_group_tensors_by_device_and_dtype"))
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(2, 4)).mean().backward()
        optimizer.step()

    with without(internal), pytest.warns(registry.MissingInternalWarning, match="MZ221"):
        mz.assert_policy(step, "float32")


def _text(seen: Any) -> str:
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    judged = seen.judgement
    print_audit(
        Console(file=out, width=400),
        seen.trace,
        judged.findings,
        verdict=judged.verdict,
        policy=str(judged.policy),
        is_policy_declared=judged.is_declared,
        report_path=None,
    )
    return out.getvalue()


def _page(seen: Any) -> str:
    from mezzotint.auditing.session import report_page

    return report_page(seen.trace, seen.judgement)


def on_ghost() -> tuple[int, list[str]]:
    with mz.ghost_gpu("A100") as gpu:
        faulty_step("cuda")
    return gpu.peak_allocated, list(gpu.notes)


@pytest.mark.parametrize("internal", names(Feature.GHOST, or_silent=False))
def test_a_simulated_gpu_refuses_or_says_what_it_lacks(internal: Internal) -> None:
    with without(internal):
        try:
            peak, notes = on_ghost()
        except MezzotintError as error:
            check_refusal(error, internal, Feature.GHOST)
            return
    assert Feature.GHOST in internal.noted_in
    assert peak > 0
    assert any(internal.path in note for note in notes)


def train() -> list[list[float]]:
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    engine = mz.Engine(model, optimizer, policy="bf16-kahan", scheduler=scheduler, max_grad_norm=1.0)
    for _ in range(2):
        with engine.forward():
            loss = model(torch.ones(2, 4)).float().square().mean()
        engine.backward(loss)
        engine.update()
    return [one.float().flatten().tolist() for one in model.parameters()]


@pytest.mark.parametrize("internal", names(Feature.ENGINE))
def test_the_engine_trains_to_the_same_bits_or_refuses(internal: Internal) -> None:
    wanted = train()
    with without(internal), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of")
        try:
            found = train()
        except MezzotintError as error:
            check_refusal(error, internal, Feature.ENGINE)
            return
    assert Feature.ENGINE not in internal.needed_by
    assert found == wanted


@pytest.mark.parametrize("internal", names(Feature.FAST_CPU, or_silent=False))
def test_fast_cpu_refuses(internal: Internal) -> None:
    with without(internal), pytest.raises(mz.MezzotintError, match=r"install torch"):
        mz.fast_cpu("bfloat16")


@pytest.mark.parametrize("internal", names(Feature.BISECT, or_silent=False))
def test_a_bisect_says_what_it_does_not_know(internal: Internal) -> None:
    with without(internal):
        assert Probe(steps=1).run(faulty_step, 0).gradients
        assert any(internal.path in note for note in registry.notes(Feature.BISECT))


IMPORTS = """
import pkgutil, sys
from importlib import import_module
from mezzotint.torch_internals import registry
real = registry.find
registry.find = lambda path, default=None: default
import mezzotint
for module in pkgutil.walk_packages(mezzotint.__path__, "mezzotint."):
    if not module.name.endswith("__main__") and "trainers" not in module.name:
        import_module(module.name)
registry.find = real
missing = [name for name in ("mezzotint.trace.recorder", "mezzotint.ghost.session") if name not in sys.modules]
assert not missing, missing
"""


def test_every_module_is_imported_without_any_private_name() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_the_recorder_registers_nothing_at_forks() -> None:
    code = (
        "import os, torch; made = []; os.register_at_fork = lambda **kw: made.append(kw); "
        "import mezzotint.trace.recorder, mezzotint.trace.watch; assert not made, made"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("version", "is_warned"),
    [("2.13.0+cpu", False), ("2.14.1", False), ("2.15.3", False), ("2.16.0.dev1", True), ("3.0", True)],
)
def test_an_untested_torch_warns_once(version: str, is_warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_has_warned", False)
    monkeypatch.setattr(registry, "torch", types.SimpleNamespace(__version__=version))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        registry.warn_if_untested()
        registry.warn_if_untested()
    texts = [str(one.message) for one in caught if one.category is registry.UntestedTorchWarning]
    assert len(texts) == is_warned
    assert all("2.13 to 2.15" in text and version in text for text in texts)


# a torch without the name: the class that no longer gives it, and its method
GONE = {
    "torch.nn.Module._is_replica": (torch.nn.Module, "_replicate_for_data_parallel", None),
    "torch.nn.Module._compiled_call_impl": (torch.nn.Module, "_compiled_call_impl", None),
    "torch.optim.Optimizer._opt_called": (LambdaLR, "__init__", lambda *_: None),
    "torch.optim.lr_scheduler.LRScheduler._wrapped_by_lr_sched": (LambdaLR, "__init__", lambda *_: None),
}


@pytest.mark.parametrize("path", GONE)
def test_a_check_notices_that_a_name_is_gone(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (internal,) = [one for one in INTERNALS if one.path == path]
    assert internal.is_available()
    owner, name, instead = GONE[path]
    if instead is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, instead)
    assert not internal.is_available()
