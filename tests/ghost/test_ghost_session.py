"""What a program finds on the ghost GPU, and that nothing of it is left."""

import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import flex_attention as flex

from mezzotint.errors import GhostError, PlanError
from mezzotint.ghost import values
from mezzotint.ghost.session import ghost_gpu


def switches() -> dict[str, object]:
    """Return everything that a session replaces."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    modules = type(torch)  # importing a submodule sets an attribute
    found = {f"cuda.{name}": value for name, value in vars(torch.cuda).items() if not isinstance(value, modules)}
    found |= {f"accelerator.{name}": value for name, value in vars(torch.accelerator).items()}
    found |= {f"Module.{name}": value for name, value in vars(nn.Module).items()}
    found |= {f"Function.{name}": value for name, value in vars(torch.autograd.Function).items()}
    found |= {f"Tensor.{name}": value for name, value in vars(torch.Tensor).items()}
    for owner in (torch.distributed, torch.distributed.distributed_c10d, torch.func, torch.jit, torch.nn.parallel):
        found |= {  # by identity: some refuse to be compared
            f"{owner.__name__}.{name}": id(value) for name, value in vars(owner).items() if type(value) is not modules
        }
    for kind in (FakeTensor, nn.DataParallel, torch.utils.data.DataLoader, torch.optim.Optimizer):
        found |= {f"{kind.__name__}.{name}": value for name, value in vars(kind).items() if name != "fake_mode"}
    found |= {f"torch.{name}": getattr(torch, name) for name in ("save", "load", "compile", "Generator", "Tensor")}
    found["flex"] = flex.flex_attention_hop, flex._vmap_for_bhqkv, flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    found["parse"] = torch._C._nn._parse_to
    found["defaults"] = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    found["anomaly"] = torch.is_anomaly_enabled(), torch.are_deterministic_algorithms_enabled()
    found["attention"] = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    hooks = sys.modules["torch.nn.modules.module"], sys.modules["torch.optim.optimizer"]
    found["hooks"] = [
        len(value) for owner in hooks for name, value in sorted(vars(owner).items()) if name.startswith("_global_")
        and isinstance(value, dict)
    ]  # fmt: skip
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    found["keys"] = [str(one) for one in keys]
    found["engine"] = torch.autograd.graph._engine_run_backward
    for key in ("AutocastIPU", "AutocastHPU", "AutogradCUDA"):
        found[key] = [has_kernel(f"aten::{name}", key) for name in ("mm", "add.Tensor", "rms_norm", "lstm.input")]
    found["available"] = torch.cuda.is_available()
    found["modes"] = torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack()
    found["rng"] = torch.get_rng_state().tolist()
    found["tf32"] = torch.backends.cuda.matmul.allow_tf32
    return found


def a_step() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).cuda()
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cuda")
    with torch.autocast("cuda"):
        loss = F.cross_entropy(model(torch.randn(16, 64, device="cuda")), torch.zeros(16, dtype=torch.long).cuda())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.state, "the step was skipped"


def test_nothing_is_left() -> None:
    before = switches()
    with ghost_gpu("A100"):
        assert torch.cuda.is_available()
        torch.backends.cuda.matmul.allow_tf32 = True
        a_step()
    assert switches() == before
    x = torch.randn(3, requires_grad=True)
    (x * x).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())
    with pytest.raises((AssertionError, RuntimeError)):
        torch.randn(2).cuda()


def a_failing_step(error: type[BaseException]) -> None:
    with ghost_gpu("A100"):
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.bfloat16)
        torch.autograd.set_detect_anomaly(True)
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_flash_sdp(False)
        torch.manual_seed(7)
        torch.set_grad_enabled(False)
        torch.set_grad_enabled(True)
        with torch.device("cpu"):
            a_step()
        torch.compile(nn.Linear(2, 2))
        torch.set_grad_enabled(False)
        raise error


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, GeneratorExit])
def test_nothing_is_left_after_an_error(error: type[BaseException]) -> None:
    before = switches()
    with pytest.raises(error):
        a_failing_step(error)
    assert switches() == before
    with ghost_gpu("H100"):
        a_step()
    assert switches() == before


def test_other_threads_see_no_ghost() -> None:
    found: list[object] = []

    def compute() -> None:
        x = torch.randn(4, requires_grad=True)
        (x * x).sum().backward()
        found.append(torch.equal(x.grad, 2 * x.detach()))

    with ghost_gpu("H100"):
        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        a_step()
    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert found == [True, True]


def test_real_modules_come_back() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    values = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ghost_gpu("H100"):
        model.cuda()
        assert model[0].weight is model[1].weight
        assert isinstance(model[0].weight, nn.Parameter)
        assert model[0].weight.is_cuda
        model(torch.arange(4, device="cuda")).sum().backward()
        assert model[0].weight.grad.is_cuda
        optimizer.step()
    assert model[0].weight is model[1].weight
    assert type(model[0].weight) is nn.Parameter
    assert torch.equal(model[0].weight, values)
    model(torch.arange(4)).sum().backward()
    optimizer.step()


def test_dtypes_are_those_of_cuda_autocast() -> None:
    with ghost_gpu("H100"), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.randn(4, 8, device="cuda")
        low = F.linear(x, torch.randn(8, 8, device="cuda"))
        assert low.dtype is torch.bfloat16
        assert F.softmax(low, -1).dtype is torch.float32
        assert F.layer_norm(low, (8,)).dtype is torch.float32
        assert F.rms_norm(low, (8,)).dtype is torch.float32
        assert low.mean().dtype is torch.bfloat16
        assert low.sum().dtype is torch.float32
        assert F.log_softmax(low, -1, dtype=torch.bfloat16).dtype is torch.bfloat16
    with ghost_gpu("H100"):
        assert torch.autocast("cuda").fast_dtype is torch.float16


def test_numbers_are_placeholders_and_are_counted() -> None:
    with ghost_gpu("H100") as gpu:
        loss = torch.randn(8, device="cuda").mean()
        assert loss.item() == 1.0
        assert f"{loss:.2f}" == "1.00"
        assert torch.full((), 7.5, device="cuda").item() == 7.5
        assert torch.tensor(3, device="cuda").item() == 3
        assert not bool(torch.isnan(loss))
        assert loss.cpu().numpy().shape == ()
    assert {what for _, _, what in gpu.assumed} == {"item", "numpy"}
    assert all(path == __file__ for path, _, _ in gpu.assumed)


def wait_for_a_value() -> None:
    x = torch.randn(4, device="cuda").square()
    while x.sum().item() > 0.5:
        x = x * 0.5


def test_a_loop_that_waits_for_a_value_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MAX_ASKED", 100)
    with ghost_gpu("H100"), pytest.raises(GhostError, match="asked 100 times"):
        wait_for_a_value()


def test_masks_keep_every_element() -> None:
    with ghost_gpu("H100") as gpu:
        x = torch.randn(4, 8, device="cuda", requires_grad=True)
        mask = torch.rand(4, 8, device="cuda") > 0.5
        assert x[mask].shape == (32,)
        assert torch.masked_select(x, mask).shape == (32,)
        assert mask.nonzero().shape == (32, 2)
        x[mask].sum().backward()
        assert torch.unique(x).shape == (32,)
        with pytest.raises(GhostError, match="depends on the numbers"):
            torch.repeat_interleave(x, mask.sum(1), 0)
    assert gpu.assumed


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_as_cudnn_does(kind: type[nn.Module]) -> None:
    with ghost_gpu("H100"):
        model = kind(8, 16, 2, batch_first=True, bidirectional=True).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out, _ = model(torch.randn(4, 5, 8, device="cuda"))
        assert out.shape == (4, 5, 32)
        assert out.dtype is torch.bfloat16
        out.sum().backward()
        assert all(weight.grad.dtype is torch.float32 for weight in model.parameters())


def test_ctc_runs() -> None:
    with ghost_gpu("H100"):
        scores = torch.randn(50, 16, 20, device="cuda", requires_grad=True)
        lengths = torch.full((16,), 50, device="cuda"), torch.full((16,), 30, device="cuda")
        F.ctc_loss(scores.log_softmax(2), torch.randint(1, 20, (16, 30), device="cuda"), *lengths).backward()
        assert scores.grad.shape == scores.shape


@pytest.mark.parametrize(
    ("gpu", "dtype", "size", "has_mask", "wanted"),
    [
        ("H100", torch.bfloat16, 64, False, "cudnn"),
        ("A100", torch.bfloat16, 64, False, "flash"),
        ("A100", torch.float32, 64, False, "efficient"),
        ("A100", torch.float16, 64, True, "efficient"),
        ("V100", torch.float16, 64, False, "efficient"),
        ("V100", torch.bfloat16, 64, False, "math"),
        ("H100", torch.float64, 64, False, "math"),
        ("A100", torch.bfloat16, 100, False, "flash"),
    ],
)
def test_attention_takes_the_kernel_of_the_card(
    gpu: str, dtype: torch.dtype, size: int, has_mask: bool, wanted: str
) -> None:
    from mezzotint.trace.recorder import Recorder

    with ghost_gpu(gpu), Recorder(has_ranges=False) as recorder:
        q = torch.randn(2, 4, 16, size, device="cuda", dtype=dtype, requires_grad=True)
        mask = torch.ones(16, 16, dtype=torch.bool, device="cuda") if has_mask else None
        F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=not has_mask).sum().backward()
    ran = [one.call.name for one in recorder.trace().operations]
    name = {"math": "bmm"}.get(wanted, f"_scaled_dot_product_{wanted}_attention")
    assert name in ran
    assert (wanted == "math") == ("bmm" in ran)
    assert any("backward" in one for one in ran)


def test_memory_answers_from_the_simulated_allocator() -> None:
    with ghost_gpu("H100"):
        x = torch.empty(1 << 20, device="cuda")
        assert torch.cuda.memory_allocated() == 4 << 20
        assert torch.cuda.memory_reserved() == 20 << 20
        y = x.view(2, -1)
        assert torch.cuda.memory_allocated() == 4 << 20
        del x, y
        assert torch.cuda.memory_allocated() == 0
        assert torch.cuda.max_memory_allocated() == 4 << 20
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0


def test_streams_events_seeds_and_devices() -> None:
    with ghost_gpu("RTX 4090"):
        assert "4090" in torch.cuda.get_device_name()
        assert torch.cuda.get_device_capability() == (8, 9)
        with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream()):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            torch.cuda.synchronize()
            assert event.elapsed_time(event) == 1.0
        torch.cuda.manual_seed_all(3)
        generator = torch.Generator(device="cuda").manual_seed(1)
        assert torch.rand(3, device="cuda", generator=generator).is_cuda
        loader = torch.utils.data.DataLoader(torch.arange(8), batch_size=4, num_workers=2, pin_memory=True)
        assert [batch.cuda().shape for batch in loader] == [(4,), (4,)]


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(PlanError, match="did you mean H100"):
        ghost_gpu("H1000")
    with pytest.raises(GhostError, match="no CUDA GPU"):
        ghost_gpu("MI300X")
    with ghost_gpu("H100"):
        with pytest.raises(GhostError, match="on already"):
            ghost_gpu("H100").__enter__()
        with pytest.raises(GhostError, match=r"torch\.func\.vmap"):
            torch.func.vmap(torch.sin)(torch.randn(3, device="cuda"))
        with pytest.raises(GhostError, match="with 2 processes"):
            torch.distributed.init_process_group("nccl", rank=0, world_size=2)
        with pytest.raises(GhostError, match="graphs"):
            torch.cuda.CUDAGraph()
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            ghost_gpu("H100").__enter__()
        except GhostError as error:
            errors.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in str(errors[0])


def test_checkpoints_stay_in_memory(tmp_path: Path) -> None:
    path, plain = tmp_path / "model.pt", tmp_path / "numbers.pt"
    path.write_bytes(b"an older checkpoint")
    with ghost_gpu("H100") as gpu:
        model = nn.Linear(4, 4).cuda()
        torch.save({"model": model.state_dict(), "step": 3}, path)
        loaded = torch.load(path)
        model.load_state_dict(loaded["model"])
        torch.save({"step": 3}, plain)
    assert loaded["step"] == 3
    assert path.read_bytes() == b"an older checkpoint"
    assert torch.load(plain) == {"step": 3}
    assert any("wrote no file" in note for note in gpu.notes)


def test_every_node_sees_meta() -> None:
    with ghost_gpu("H100"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.Linear(8, 1)).cuda()
        loss = model(torch.randn(4, 8, device="cuda")).sum()
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            assert all(meta.device.type == "meta" for meta in node._input_metadata)
            nodes += [after for after, _ in node.next_functions]
        assert len(seen) > 5
