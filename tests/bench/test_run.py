"""The race itself: turns, retakes, refusals, and that nothing of torch is left changed."""

import contextlib
import itertools
from collections.abc import Callable

import pytest
import torch

from mezzotint.bench import run as bench_run
from mezzotint.bench.cases import FORMATS, Case, Op, suite
from mezzotint.bench.run import run, run_case
from mezzotint.errors import ConfigError

TINY = {
    Op.ATTENTION: (1, 1, 8, 8),
    Op.ATTENTION_BACKWARD: (1, 1, 8, 8),
    Op.LAYER_NORM: (4, 8),
    Op.RMS_NORM: (4, 8),
    Op.SOFTMAX: (4, 8),
    Op.ADD: (64,),
    Op.GELU: (64,),
    Op.UPDATE: (64,),
}


@pytest.mark.parametrize("op", Op)
def test_every_operation_runs_in_every_format(op: Op) -> None:
    case = Case(op=op, shape=TINY.get(op, (16, 32, 48)))
    found = run_case("cpu", case, case.formats, 0.05)
    assert {m.format for m in found.measurements} | {name for name, _ in found.refused} == set(case.formats)
    assert {m.format for m in found.measurements} >= {"float32", "bfloat16"}
    assert all(second > 0 for m in found.measurements for second in m.seconds)
    assert dict(found.refused).keys() <= {"tfloat32"}


def test_the_three_products_are_a_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}
    monkeypatch.setattr(
        bench_run, "product", lambda device, name, layout, size, is_fresh: sizes.setdefault(layout, size)
    )
    for op in (Op.MATMUL, Op.MATMUL_INPUT_GRADIENT, Op.MATMUL_WEIGHT_GRADIENT):
        bench_run._call("cpu", Case(op=op, shape=(5, 7, 3)), "float32")
    layer = torch.nn.Linear(3, 7, bias=False)
    x = torch.zeros(5, 3, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert sizes["NT"][:2] == tuple(y.shape)
    assert sizes["NN"][:2] == tuple(x.grad.shape)
    assert sizes["TN"][:2] == tuple(layer.weight.grad.shape)


def test_formats_take_turns_in_both_orders() -> None:
    calls: list[str] = []
    clock = itertools.count()

    def timer(call: Callable[[], object]) -> float:
        call()
        next(clock)
        return 1e-3

    def contestant(name: str) -> bench_run._Contestant:
        return bench_run._Contestant(
            format=name,
            kernels="torch",
            call=lambda: calls.append(name),
            context=contextlib.nullcontext,
            seconds=[1e-3],
        )

    base, other, slow = contestant("float32"), contestant("bfloat16"), contestant("float16")
    slow.seconds = [1.0]
    again: list[float] = []
    bench_run._race([base, other, slow], base, again, timer, lambda: 0, 1e9)
    assert calls[:4] == ["float32", "bfloat16", "float16", "float32"]
    assert calls[4:7] == ["float32", "bfloat16", "float32"]
    assert len(base.seconds) == len(again) == len(other.seconds) == bench_run.ROUNDS
    assert len(slow.seconds) == 1


def test_a_sample_that_was_interrupted_is_taken_again() -> None:
    times = iter([9.0, 1.0, 5.0])
    interruptions = iter([0, 1, 1, 1])
    contestant = bench_run._Contestant(
        format="float32", kernels="torch", call=lambda: None, context=contextlib.nullcontext, seconds=[]
    )
    assert bench_run._sample(contestant, lambda call: next(times), lambda: next(interruptions)) == 1.0


def test_what_torch_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench_run.product

    def product(device: str, name: str, *args: object, **kwargs: object) -> Callable[[], object]:
        if name == "bfloat16":
            raise RuntimeError("no kernel\nfor it")
        if name == "float16":
            raise torch.OutOfMemoryError("x")
        return real(device, name, *args, **kwargs)

    monkeypatch.setattr(bench_run, "product", product)
    found = run_case("cpu", Case(op=Op.MATMUL, shape=(8, 8, 8)), FORMATS, 0.01)
    assert dict(found.refused) == {
        "bfloat16": "no kernel",
        "float16": "no memory left",
        "tfloat32": "a format of GPUs",
    }


def test_nothing_is_left_changed() -> None:
    before = (torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    result = run("cpu", suite("cpu", ops=["matmul"], sizes=[16]), FORMATS, seconds=0.1)
    after = (torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert result.roof("float32").source == "best measured here"
    assert result.facts["torch"] == torch.__version__
    torch.set_float32_matmul_precision("high")
    try:
        with bench_run._without_tf32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before[2])


def test_an_absent_device_is_named() -> None:
    with pytest.raises(ConfigError, match="cuda:7"):
        run("cuda:7", suite("cuda", ops=["update"]), ["float32"])


@pytest.mark.cuda
@pytest.mark.parametrize("op", Op)
def test_every_operation_runs_on_cuda(op: Op) -> None:
    case = Case(op=op, shape=TINY.get(op, (16, 32, 48)))
    found = run_case("cuda", case, case.formats, 0.05)
    assert {m.format for m in found.measurements} >= {"float32", "float16"}
