"""Watching never hurts what it watches: faults of our own, other watchers, and odd programs leave every bit alone."""

import gc
import logging
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizer_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode
from torch.utils.flop_counter import FlopCounterMode

import mezzotint as mz
from mezzotint.auditing.fitting import FirstSteps
from mezzotint.auditing.script import Ending, parse_target, run_target
from mezzotint.errors import AuditError
from mezzotint.patches import Guard, Patches
from mezzotint.trace import mode, recorder
from mezzotint.trace.watch import Watch


def train(num_steps: int = 3) -> list[torch.Tensor]:
    """A small training that uses what is followed: autocast, a scaler, clipping, two threads of numbers, a save."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    average = [one.detach().bfloat16() for one in net.parameters()]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    found = []
    for _ in range(num_steps):
        x = torch.randn(4, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(x).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        for kept, one in zip(average, net.parameters(), strict=True):
            kept.mul_(0.9).add_(one.detach().bfloat16(), alpha=0.1)
        found.append(loss.detach())
    (gradient,) = torch.autograd.grad(net(torch.full((1, 8), 1e5)).square().sum(), [net[0].weight])
    return [*found, gradient, *average, *(value.clone() for value in net.state_dict().values())]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def plain() -> list[torch.Tensor]:
    return train()


# what the program calls of us, which the guard is built into, and what only answers torch's questions
_BOUNDARY = {
    "__torch_dispatch__",
    "run",
    "Watch.__enter__",
    "Watch.__exit__",
    "Watch.__init__",
    "ignore_compile_internals",
    "_should_skip_dynamo",
    "wrapper",
    "guarded",
}


def observing_functions() -> dict[str, types.FunctionType]:
    """Return every function of ours that runs while a training is watched, by its name: found by running one."""
    codes = set()

    def note(frame, event, _arg) -> None:
        if event == "call" and "/mezzotint/" in frame.f_code.co_filename:
            codes.add(frame.f_code)

    sys.setprofile(note)
    try:
        with Watch(every=1):
            train(2)
    finally:
        sys.setprofile(None)
    functions = {one.__code__: one for one in gc.get_objects() if type(one) is types.FunctionType}
    found = {}
    for code in codes:
        function = functions.get(code)
        room = Path(code.co_filename).parent.name
        if (
            function is None
            or code.co_freevars
            or _BOUNDARY & {code.co_name, code.co_qualname}
            or room not in ("trace", "kernels")
        ):
            continue
        found[f"{room}.{Path(code.co_filename).stem}.{code.co_qualname}"] = function
    return found


def _raises(*_args, **_kwargs):
    raise RuntimeError("injected")


_ENDINGS = {
    "trace.mode.RecordingMode.leave",
    "trace.mode._popped",
    "trace.mode.sweep",
    "trace.protocol.Protocol.remove",
    "trace.recorder.Recorder.__exit__",
    "trace.recorder.Recorder.stop",
    "trace.watch.StepWatch.abandon",
    "trace.watch.Watch.stop",
}


def test_a_fault_anywhere_leaves_the_training_alone(caplog: pytest.LogCaptureFixture):
    plain = train(2)
    functions = observing_functions()
    assert len(functions) > 100
    for name, function in sorted(functions.items()):
        code = function.__code__
        caplog.clear()
        is_ours = []
        watch = Watch(every=1)  # no training runs while it is made
        function.__code__ = _raises.__code__
        try:
            with watch:
                result = train(2)
        except RuntimeError as error:
            is_ours.append(error)
        finally:
            function.__code__ = code
        assert not is_ours, name
        assert same(result, plain), name
        said = [one.message for one in caplog.records if "has ended" in one.message]
        assert len(said) <= 1, (name, said)
        if watch.fault is not None:
            assert said == [watch.fault], name
            assert "injected" in said[0], name
        if name in _ENDINGS:  # what they were to take away is left, and does nothing
            assert all(one._guard.fault for one in recorder._active), name
            for one in list(recorder._active):
                one.__exit__(None, None, None)
            watch.stop()
            mode.sweep()
            while _get_current_dispatch_mode_stack():
                assert _pop_mode()._tape.guard.fault, name
        assert not recorder._active, name
        assert not _get_current_dispatch_mode_stack(), name
        assert not optimizer_hooks._global_optimizer_post_hooks, name


def _vmap_of_grad() -> object:
    weight = torch.linspace(-1, 1, 4)
    return torch.func.vmap(torch.func.grad(lambda x: (x * weight).sin().sum()))(torch.ones(3, 4))


def _jvp() -> object:
    return torch.func.jvp(lambda x: (x.sin() * x).sum(), (torch.ones(4),), (torch.full((4,), 0.5),))


def _dual() -> object:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(4), torch.full((4,), 2.0))
        return torch.autograd.forward_ad.unpack_dual(dual.exp().relu()).tangent


def _hessian() -> object:
    return torch.func.hessian(lambda x: (x**3).sum())(torch.ones(3))


def _batched() -> object:
    x = torch.ones(3, requires_grad=True)
    return torch.autograd.grad((x**2).exp(), x, torch.eye(3), is_grads_batched=True)


def _per_sample() -> object:
    net = nn.Linear(4, 2)
    with torch.no_grad():
        for one in net.parameters():
            one.fill_(0.5)
    weights = dict(net.named_parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def loss(weights, x):
        return torch.func.functional_call(net, weights, x).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, torch.ones(3, 4))
    for name, one in weights.items():
        one.grad = grads[name].sum(0)
    optimizer.step()
    return [one.detach() for one in weights.values()]


def _inner_backward() -> object:
    x = torch.ones(3, requires_grad=True)
    torch.func.functionalize(lambda y: y.sin_())(torch.ones(3))
    x.exp().sum().backward()
    return x.grad


PROGRAMS = [_vmap_of_grad, _jvp, _dual, _hessian, _batched, _per_sample, _inner_backward]


@pytest.mark.parametrize(
    "watching", [lambda: Watch(every=1), lambda: Watch(every=2), mz.audit], ids=["1", "2", "audit"]
)
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: one.__name__)
def test_function_transforms(program: Callable[[], object], watching):
    expected = program()
    with watching() as seen:
        train(1)
        found = program()
        train(1)
    assert torch.equal(
        torch.cat([one.flatten() for one in _flat(found)]), torch.cat([o.flatten() for o in _flat(expected)])
    )
    if isinstance(seen, Watch):
        assert seen.fault is None


def _flat(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [one for part in value for one in _flat(part)]


@pytest.mark.parametrize("every", [1, 2])
def test_an_audit_inside_a_watch(plain: list[torch.Tensor], every: int, caplog: pytest.LogCaptureFixture):
    with Watch(every=every) as watch:
        with mz.audit(has_ranges=False) as audit:
            result = train()
        assert audit.num_steps == 3
        train()
    assert same(result, plain)
    assert watch.fault is None
    assert watch.rows
    assert sum("skips its turns" in one.message for one in caplog.records) == 1


def test_a_watch_inside_an_audit(plain: list[torch.Tensor], caplog: pytest.LogCaptureFixture):
    with mz.audit(has_ranges=False) as audit, Watch(every=1) as watch:
        result = train()
    assert same(result, plain)
    assert audit.num_steps == 3
    assert watch.rows == []
    assert sum("skips its turns" in one.message for one in caplog.records) == 1


def test_callbacks_of_trainers_beside_others(plain: list[torch.Tensor]):
    with Watch(every=1):
        callback = FirstSteps(steps=2, report=None, has_ranges=False)
        callback.begin()
        assert same(train(), plain)
        callback.step_ended()
        assert callback.result is not None
    with mz.audit(has_ranges=False) as audit:
        callback = FirstSteps(steps=2, report=None)
        callback.begin()
        assert same(train(), plain)
        callback.step_ended()
        callback.end()
        assert callback.result is None
    assert audit.num_steps == 3


def test_two_audits_are_still_refused():
    with mz.audit(), pytest.raises(AuditError, match="leave the outer audit"), mz.audit():
        pass


def test_an_audit_in_a_script_under_the_command(tmp_path: Path):
    script = tmp_path / "train.py"
    script.write_text(
        "import torch, mezzotint as mz\n"
        "net = torch.nn.Linear(2, 2)\n"
        "optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n"
        "with mz.audit(steps=1) as audit:\n"
        "    for _ in range(2):\n"
        "        net(torch.ones(1, 2)).sum().backward()\n"
        "        optimizer.step()\n"
        "assert audit.is_skipped and audit.num_steps == 0 and audit.verdict\n"
        "assert any('recorded nothing' in note for note in audit.trace.notes)\n"
        "mz.assert_policy(lambda: (net(torch.ones(1, 2)).sum().backward(), optimizer.step()), 'bf16')\n"
    )
    outcome = run_target(parse_target(str(script), (), is_module=False), steps=3, has_ranges=False)
    assert (outcome.ending, outcome.text) == (Ending.END, None)
    assert len(outcome.trace.steps) == 3


def test_nested_watches_and_exits_in_any_order(plain: list[torch.Tensor]):
    step = torch.amp.GradScaler.step
    one, two = Watch(every=1), Watch(every=1)
    one.start()
    two.start()
    first = train()
    one.stop()
    second = train()
    two.stop()
    assert same(first, plain)
    assert same(second, plain)
    assert torch.amp.GradScaler.step is step
    assert one.rows
    assert two.rows
    with one, one:
        assert same(train(), plain)
    assert not optimizer_hooks._global_optimizer_post_hooks


def test_modes_of_the_program_leave_in_their_order(plain: list[torch.Tensor]):
    with Watch(every=1) as watch:
        with FlopCounterMode(display=False) as flops:
            result = train()
        assert all(isinstance(one, mode.RecordingMode) for one in _get_current_dispatch_mode_stack())
        again = train()
    assert flops.get_total_flops() > 0
    assert same(result, plain)
    assert same(again, plain)
    assert len(watch.rows) >= 3
    assert not _get_current_dispatch_mode_stack()


class _Interrupting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise KeyboardInterrupt


class _OwnError(Exception):
    pass


@pytest.mark.parametrize("kind", [_OwnError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_exceptions_of_the_program_pass_unchanged(kind: type[BaseException]):
    raised = kind("of the program")

    def hook(_grad):
        raise raised

    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(hook)
    with pytest.raises(kind) as caught, Watch(every=1) as watch:
        y.sum().backward()
    assert caught.value is raised
    assert watch.fault is None
    assert raised.__context__ is None


def test_a_watch_in_a_generator_and_other_threads(plain: list[torch.Tensor]):
    def steps():
        with Watch(every=1):
            yield train()

    running = steps()
    assert same(next(running), plain)
    thread = threading.Thread(target=running.close)
    thread.start()
    thread.join()
    found: list[list[torch.Tensor]] = []
    with Watch(every=1) as watch:
        thread = threading.Thread(target=lambda: found.append(train()))
        thread.start()
        thread.join()
    assert same(found[0], plain)
    assert watch.fault is None
    assert same(train(), plain)
    assert not _get_current_dispatch_mode_stack()


def test_errors_of_on_alarm_and_of_files(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def stuck(num_steps: int, **options) -> tuple[torch.Tensor, Watch]:
        weight = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
        optimizer = torch.optim.SGD([weight], lr=1e-4)
        with Watch(every=1, **options) as watch:
            for _ in range(num_steps):
                weight.float().sum().backward()
                optimizer.step()
        return weight.detach(), watch

    def on_alarm(_alarm):
        raise ValueError("of the user")

    (tmp_path / "file").write_text("")
    weight, watch = stuck(4, on_alarm=on_alarm, out=tmp_path / "file" / "metrics.jsonl")
    assert bool((weight == 1).all())
    assert watch.fault is None
    assert len(watch.rows) == 4
    assert {one.kind for one in watch.alarms} >= {"lost-updates", "stopped-weights"}
    said = [one.message for one in caplog.records if "has ended" in one.message]
    assert len(said) == 2
    assert any("calling on_alarm" in one and "of the user" in one for one in said)
    assert any("writing to" in one for one in said)

    def interrupt(_alarm):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stuck(4, on_alarm=interrupt)


def test_a_fault_of_an_audit_is_a_note(monkeypatch: pytest.MonkeyPatch, plain: list[torch.Tensor]):
    monkeypatch.setattr(mode.Tape, "_note_addresses", _raises)
    with mz.audit() as audit:
        assert same(train(), plain)
    assert any("injected" in note for note in audit.trace.notes)


def test_a_recording_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mode, "MAX_OPERATIONS", 50)
    with mz.audit() as audit:
        train()
    assert len(audit.trace.operations) <= 51
    assert any("fewer steps" in note for note in audit.trace.notes)


def test_patches_end_in_any_order():
    class Owner:
        def call(self) -> str:
            return "plain"

    original = Owner.call
    first, second = Patches(), Patches(Guard("a test"))
    first.wrap(Owner, "call", lambda function, *args: "first " + function(*args))
    second.wrap(Owner, "call", lambda function, *args: "second " + function(*args))
    assert Owner().call() == "second first plain"
    first.undo()
    assert Owner().call() == "second plain"
    second.undo()
    assert Owner.call is original


class _Wrapper(torch.Tensor):
    """A subclass that holds a plain tensor, as libraries do."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=requires_grad)

    def __init__(self, inner: torch.Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from torch.utils._pytree import tree_map_only

        bare = lambda one: one.inner  # noqa: E731
        out = func(*tree_map_only(_Wrapper, bare, args), **tree_map_only(_Wrapper, bare, kwargs or {}))
        if func.overloadpacket.__name__.endswith("_"):
            return args[0]
        return tree_map_only(torch.Tensor, _Wrapper, out)


def _wrapped_training() -> list[torch.Tensor]:
    weight = nn.Parameter(_Wrapper(torch.linspace(-1, 1, 16).view(4, 4)))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        (weight * weight).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [weight.detach().inner]


def test_a_wrapper_subclass_trains_the_same():
    expected = _wrapped_training()
    with Watch(every=1) as watch:
        assert same(_wrapped_training(), expected)
    assert watch.fault is None
    with mz.audit() as audit:
        assert same(_wrapped_training(), expected)
    assert audit.num_steps == 3
    assert not [note for note in audit.trace.notes if "has ended" in note]


def _moves(watch: Watch) -> list[str]:
    return [one.place for one in watch.alarms if one.kind == "stopped-weights"]


def _train_weight(make: Callable[[], nn.Parameter], optimizer, gradient: Callable[[nn.Parameter], None]) -> list[str]:
    weight = make()
    stepping = optimizer([weight])
    with Watch(every=1) as watch:
        for _ in range(6):
            gradient(weight)
            stepping.step()
    assert watch.fault is None
    return _moves(watch)


def _constant(value: float) -> Callable[[nn.Parameter], None]:
    def fill(weight: nn.Parameter) -> None:
        weight.grad = torch.full_like(weight, value)

    return fill


def _sparse(weight: nn.Parameter) -> None:
    weight.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, *weight.shape[1:]), weight.shape, check_invariants=True)


def _one_row(weight: nn.Parameter) -> None:
    weight.grad = torch.zeros_like(weight)
    weight.grad[-1] = 1.0


def _infinite_moment(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(weights, lr=1e-2)
    weights[0].grad = torch.full_like(weights[0], 1e22)
    optimizer.step()
    return optimizer


def _ones(dtype: torch.dtype = torch.float32, rows: int = 8) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.ones(rows, 64, dtype=dtype))


@pytest.mark.parametrize(
    ("make", "optimizer", "gradient", "is_alarmed"),
    [
        (_ones(torch.bfloat16), lambda one: torch.optim.SGD(one, lr=1e-4), _constant(1.0), True),
        (_ones(), _infinite_moment, _constant(1.0), True),
        (_ones(), lambda one: torch.optim.SGD(one, lr=1e-2), _constant(1.0), False),
        (_ones(), lambda one: torch.optim.SGD(one, lr=0.0), _constant(1.0), False),
        (_ones(), lambda one: torch.optim.SGD(one, lr=torch.tensor(0.0)), _constant(1.0), False),
        (_ones(), lambda one: torch.optim.SGD(one, lr=1e-2), _constant(0.0), False),
        (_ones(), lambda one: torch.optim.SGD(one, lr=1e-2), lambda weight: None, False),
        (_ones(), lambda one: torch.optim.SGD(one, lr=1e-2), _sparse, False),
        (_ones(rows=4096), lambda one: torch.optim.SGD(one, lr=1e-2), _one_row, False),
    ],
    ids=[
        "bfloat16",
        "infinite moment",
        "moves",
        "no rate",
        "no rate in a tensor",
        "zero",
        "frozen",
        "sparse",
        "one row",
    ],
)
def test_weights_that_have_stopped(make, optimizer, gradient, is_alarmed: bool):
    assert bool(_train_weight(make, optimizer, gradient)) == is_alarmed


def test_the_variables_of_the_program_stay_its_own():
    def program(lr: float) -> dict[str, object]:
        settings = locals()
        net = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=lr)
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return settings

    def caller() -> dict[str, object]:
        settings, names = locals(), "x"
        settings["added"] = names
        program(0.1)
        return settings

    with Watch(every=1) as watch, mz.audit():
        assert set(program(0.1)) == {"lr"}
        assert set(caller()) == {"added", "program"}
    assert watch.fault is None


def test_a_guard_says_one_sentence(caplog: pytest.LogCaptureFixture):
    ended = []
    guard = Guard("a test", lambda: ended.append(1))
    with caplog.at_level(logging.WARNING):
        for text in ("x" * 1000, "second"):
            with guard:
                raise ValueError(text)
    assert len(caplog.records) == len(ended) == 1
    assert len(caplog.records[0].message) < 350
    assert guard.hook(lambda: 1)() is None
