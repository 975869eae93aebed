"""The gate and what stands behind it: open inside the context, torch's own bits everywhere else.

The kernels are forced on for both formats, so that the tests mean the same on every CPU.
"""

import contextlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bounds import forced
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mezzotint as mz
from mezzotint.errors import ConfigError
from mezzotint.hardware.support import FormatSupport, Support
from mezzotint.hardware.timings import MatmulTimings
from mezzotint.lowprec import calls, switch
from mezzotint.lowprec.calls import call_counts
from mezzotint.lowprec.choice import Path as KernelPath

DTYPES = [torch.bfloat16, torch.float16]
PATIENCE = 240  # seconds for a process that only has to start, on a machine with other work


@pytest.fixture(autouse=True, params=["upcast", "packed"])
def _forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with forced(request.param, monkeypatch):
        yield


def everything_float32() -> list[Tensor]:
    """Return float32 and float64 results and gradients of all operations that have a kernel of ours."""
    generator = torch.Generator().manual_seed(5)
    results = []
    for dtype in (torch.float32, torch.float64):
        image = torch.randn(2, 3, 9, 9, generator=generator, dtype=dtype).requires_grad_()
        weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=dtype).requires_grad_()
        pictures = F.conv2d(image, weight, padding=1)
        results += [pictures, *torch.autograd.grad(pictures.square().sum(), (image, weight))]
        results += [
            F.conv_transpose2d(image, weight.transpose(0, 1)),
            F.conv1d(image[:, :, 0], weight[:, :, 0], stride=2),
        ]
        x = torch.randn(33, 17, generator=generator, dtype=dtype).requires_grad_()
        y = torch.randn(17, 9, generator=generator, dtype=dtype).requires_grad_()
        b = torch.randn(9, generator=generator, dtype=dtype)
        q = torch.randn(2, 2, 12, 8, generator=generator, dtype=dtype).requires_grad_()
        out = (
            x @ y
            + torch.addmm(b, x, y, alpha=2)
            + torch.bmm(x[None], y[None])[0]
            + torch.baddbmm(b, x[None], y[None])[0]
        )
        attention = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        results += [out, attention, *torch.autograd.grad(out.sum() + attention.sum(), (x, y, q))]
        results += [x.detach().t() @ x.detach(), x.t() @ x, torch.addbmm(b, x[None], y[None])]
        results += [torch.ones(33, 9, dtype=dtype).addmm_(x.detach(), y.detach(), beta=0.5)]
    return results


def test_float32_does_not_change_by_a_bit() -> None:
    mz.fast_cpu()  # the kernels are registered from here on, the gate is shut
    shut = everything_float32()
    with mz.fast_cpu():
        opened = everything_float32()
    with torch.autograd.set_multithreading_enabled(False):
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(shut, opened, strict=True))


def test_integers_and_complex_numbers_still_multiply() -> None:
    with mz.fast_cpu():
        assert (torch.ones(2, 3, dtype=torch.int64) @ torch.ones(3, 2, dtype=torch.int64)).tolist() == [[3, 3], [3, 3]]
        assert (torch.ones(2, 2, dtype=torch.complex64) @ torch.ones(2, 2, dtype=torch.complex64)).real.tolist() == [
            [2, 2],
            [2, 2],
        ]


def test_errors_are_torchs_own() -> None:
    with mz.fast_cpu():
        with pytest.raises(RuntimeError, match="same dtype"):
            torch.ones(2, 2).bfloat16() @ torch.ones(2, 2)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            torch.ones(2, 3) @ torch.ones(2, 3)
        with pytest.raises(RuntimeError):
            torch.ones(2, 3).bfloat16() @ torch.ones(2, 3).bfloat16()


class Layer(nn.Module):
    """Linear layers around attention, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(2, 10, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(2, 10, 16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_through_autocast(dtype: torch.dtype, is_checkpointed: bool) -> None:
    """Gradients agree with float64 to the format's rounding: each passes at most about 8 roundings of half an ulp.

    With entries of order 1 and eps the format's machine epsilon, that bounds the relative error of the norm by
    8 * eps / 2; 8 * eps leaves room for the cancellation inside softmax.
    """
    torch.manual_seed(0)
    layer = Layer()
    x = torch.randn(2, 10, 16)

    def gradients(model: nn.Module, inputs: Tensor, lowered: bool) -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast("cpu", dtype=dtype, enabled=lowered):
            out = checkpoint(model, inputs, use_reentrant=False) if is_checkpointed else model(inputs)
            loss = out.double().pow(2).sum()
        loss.backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    with mz.fast_cpu():
        got = gradients(layer, x, True)
    exact = gradients(layer.double(), x.double(), False)
    assert float((got - exact).norm() / exact.norm()) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_with_a_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 8, 16)
    mask = torch.zeros(8, 8).masked_fill(torch.ones(8, 8).triu(1).bool(), float("-inf"))
    expected_in = q.to(dtype).float().requires_grad_()
    expected = F.scaled_dot_product_attention(expected_in, expected_in, expected_in, attn_mask=mask)
    expected.sum().backward()
    low = q.to(dtype).requires_grad_()
    with mz.fast_cpu():
        got = F.scaled_dot_product_attention(low, low, low, attn_mask=mask.to(dtype))
        got.sum().backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.float(), expected, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(low.grad.float(), expected_in.grad, rtol=8 * eps, atol=8 * eps)


def test_the_gate_nests_and_closes_after_an_exception() -> None:
    assert not switch.is_active("bfloat16")
    with mz.fast_cpu():
        with mz.fast_cpu("bfloat16"):
            assert switch.is_active("bfloat16")
        assert switch.is_active("bfloat16")
        assert switch.is_active("float16")
    assert not switch.is_active("bfloat16")
    with pytest.raises(ZeroDivisionError), mz.fast_cpu():
        raise ZeroDivisionError
    assert not switch.is_active("float16")


def test_a_switch_for_the_whole_process() -> None:
    switched = mz.fast_cpu()
    switched.enable()
    with mz.fast_cpu():
        assert switch.is_active("float16")
    assert switch.is_active("bfloat16")
    switched.disable()
    assert not switch.is_active("bfloat16")


def test_one_format_only() -> None:
    with mz.fast_cpu("float16"):
        assert switch.is_active("float16")
        assert not switch.is_active("bfloat16")


def test_many_threads_enter_leave_and_multiply() -> None:
    left, right = torch.randn(24, 24).bfloat16(), torch.randn(24, 24).bfloat16()
    expected = (left.float() @ right.float()).bfloat16()
    wrong: list[str] = []

    def work() -> None:
        for _ in range(100):
            with mz.fast_cpu():
                if not torch.equal(left @ right, expected):
                    wrong.append("product")
            torch.ones(4, 4) @ torch.ones(4, 4)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not switch.is_active("bfloat16")


def test_vmap_func_grad_and_inference_mode() -> None:
    weight = torch.randn(5, 4).bfloat16()
    rows = torch.randn(3, 6, 5).bfloat16()
    with mz.fast_cpu():
        batched = torch.vmap(lambda row: row @ weight)(rows)
        gradient = torch.func.grad(lambda w: (rows[0] @ w).float().sum())(weight)
        with torch.inference_mode():
            plain = rows[0] @ weight
    assert torch.equal(batched[0], (rows[0].float() @ weight.float()).bfloat16())
    assert torch.equal(plain, batched[0])
    assert gradient.shape == weight.shape


def test_the_wish_off_keeps_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    switch._choices.clear()
    monkeypatch.setenv(switch.VARIABLE, "off")
    with mz.fast_cpu():
        assert not switch.is_active("bfloat16")
    assert {choice.path for choice in switch.status()} == {"stock"}


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="float32"):
        mz.fast_cpu("float32")
    switch._choices.clear()
    monkeypatch.setenv(switch.VARIABLE, "sometimes")
    with pytest.raises(ConfigError, match="MEZZOTINT_LOWPREC='sometimes'"):
        mz.fast_cpu()


class Products(torch.utils.data.Dataset):
    """A data set whose items are computed on our kernels."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        with mz.fast_cpu("bfloat16"):
            return (torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()).float()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python warns that a forked process had threads
def test_forked_loader_workers() -> None:
    mz.fast_cpu()
    loader = torch.utils.data.DataLoader(Products(), num_workers=1, multiprocessing_context="fork", timeout=PATIENCE)
    assert [batch.sum().item() for batch in loader] == [64.0**3, 64.0**3]


@pytest.mark.parametrize(
    ("level", "path"), [(Support.NATIVE, "stock"), (Support.EMULATED, "upcast"), (Support.UNKNOWN, "upcast")]
)
def test_a_machine_too_busy_to_measure_is_judged_by_its_flags(
    level: Support, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = MatmulTimings(device="cpu", threads=1, m=1, n=1, k=1, times=(), is_disturbed=True)
    told = FormatSupport(format="bfloat16", support=level, reason="flags", measured_ratio=None)
    monkeypatch.setenv(switch.VARIABLE, "auto")
    monkeypatch.setattr(switch, "_can_pack", lambda _: False)
    monkeypatch.setattr(switch, "measure_matmul", lambda *_: busy)
    monkeypatch.setattr(switch, "format_support", lambda *_: told)
    choice = switch.choice_for("bfloat16")
    assert choice.path == path
    assert "too busy to measure" in choice.reason


def test_an_interrupt_inside_closes_the_gate() -> None:
    with pytest.raises(KeyboardInterrupt), mz.fast_cpu():
        raise KeyboardInterrupt
    assert not switch.is_active("bfloat16")


def test_outside_the_context_results_are_torchs_own() -> None:
    left, right = torch.randn(70, 90).bfloat16(), torch.randn(90, 40).bfloat16()
    image, weight = torch.randn(1, 4, 9, 9).half(), torch.randn(4, 4, 3, 3).half()
    stock = left @ right, F.conv2d(image, weight)
    with mz.fast_cpu():
        left @ right
    before = call_counts()
    after = left @ right, F.conv2d(image, weight)
    assert call_counts() == before
    assert all(torch.equal(a, b) for a, b in zip(stock, after, strict=True))


@pytest.mark.parametrize("name", ["mm", "bmm", "addmm", "baddbmm"])
def test_out_overloads_serve_compiled_graphs(name: str) -> None:
    """What a compiled graph calls, called by hand: compiling takes a C++ compiler and a quarter of a minute."""
    left, right = torch.randn(64, 128).bfloat16(), torch.randn(128, 96).bfloat16()
    operands = [left, right] if name in ("mm", "bmm") else [torch.randn(96).bfloat16(), left, right]
    if name in ("bmm", "baddbmm"):
        operands[-2:] = [left[None], right[None]]
    plain = getattr(torch, name)
    gate = mz.fast_cpu(compiled=True)
    expected = plain(*(t.float() for t in operands))
    shape = (1, 64, 96) if expected.dim() == 3 else (64, 96)
    with gate:
        out = torch.empty(shape, dtype=torch.bfloat16)
        assert plain(*operands, out=out) is out
        columns = torch.empty(*shape[:-2], 96, 64, dtype=torch.bfloat16).mT
        plain(*operands, out=columns)
        wide = plain(*(t.float() for t in operands), out=torch.empty(0))
    torch.testing.assert_close(out, expected.bfloat16(), rtol=2**-8, atol=1e-5)
    assert torch.equal(out, columns)
    assert torch.equal(wide, expected)
    # outside the gate, the original
    torch.testing.assert_close(plain(*operands, out=torch.empty_like(out)), out, rtol=2**-7, atol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler here")
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what another run left on disk may have been compiled for other instructions, or for more threads
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    x = torch.randn(256, 64)

    def run(model: nn.Module) -> list[Tensor]:
        with mz.fast_cpu(compiled=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
            grads = torch.autograd.grad(out.float().square().sum(), list(layer.parameters()))
        return [out.detach().float(), *grads]

    eager = run(layer)
    before = call_counts()
    compiled = run(torch.compile(layer))
    counted = {key for key, value in call_counts().items() if value > before.get(key, 0)}
    assert {name for name, _ in counted} & {"mm.out", "addmm.out", "mm", "addmm"}
    for one, other in zip(compiled, eager, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02


DDP = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import mezzotint as mz
from mezzotint.lowprec.calls import call_counts

rank, meeting = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))
x = torch.randn(2, 64, 32)
parallel = DistributedDataParallel(model)
with mz.fast_cpu():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = parallel(x[rank]).float().square().mean()
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = sum(model(part).float().square().mean() for part in x) / 2
    expected = torch.autograd.grad(whole, list(model.parameters()))
assert any(path != "stock" for (_, path), number in call_counts().items() if number)
for one, other in zip(grads, expected):
    assert float((one - other).norm() / other.norm()) < 0.02
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # DDP's reducer keeps gloo's threads, which may abort while the interpreter goes: pytorch#190489
"""


@pytest.mark.slow
def test_distributed_data_parallel(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(DDP)
    # a file to meet in: another program may take a port that was free
    command = [sys.executable, str(script)]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "meeting")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=PATIENCE)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


def test_spawned_loader_workers() -> None:
    loader = torch.utils.data.DataLoader(Products(), num_workers=1, multiprocessing_context="spawn", timeout=PATIENCE)
    assert [batch.sum().item() for batch in loader] == [64.0**3, 64.0**3]


def test_what_falls_back_is_counted_and_told_once() -> None:
    calls._told.discard("aten::_grouped_mm")
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(2, 16, 16).bfloat16()
    ends = torch.tensor([8, 16], dtype=torch.int32)
    key = ("aten::_grouped_mm", KernelPath.STOCK)
    before = call_counts().get(key, 0)
    with mz.fast_cpu():
        with (
            pytest.warns(UserWarning, match="_grouped_mm runs on torch's own kernel"),
            contextlib.suppress(RuntimeError),
        ):
            torch._grouped_mm(a, b, offs=ends, bias=torch.zeros(2, 16).bfloat16())
        with contextlib.suppress(RuntimeError):
            torch._grouped_mm(a, b, offs=ends, bias=torch.zeros(2, 16).bfloat16())
    assert call_counts()[key] == before + 2
