"""What programs are written with: processes, compiled parts, FlexAttention, checkpoints, types, devices by number."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mezzotint.errors import GhostError
from mezzotint.ghost.session import ghost_gpu
from mezzotint.trace.recorder import Recorder


def test_devices_are_given_as_numbers_too() -> None:
    with ghost_gpu("H100"):
        x = torch.randn(3)
        assert x.cuda(0).is_cuda
        assert x.to(0).is_cuda
        assert torch.zeros(2, device=0).is_cuda
        model = nn.Linear(2, 2).to(0)
        assert model.weight.is_cuda
        assert nn.Linear(2, 2, device=0).cuda(0).weight.is_cuda
        with pytest.raises(GhostError, match=r"test_ghost_programs.py:\d+: cuda:1"):
            x.to("cuda:1")
        with pytest.raises(GhostError, match="cuda:1"):
            x.cuda(1)


def test_a_world_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    before = vars(dist).copy()
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "1")
    with ghost_gpu("H100"):
        assert not dist.is_initialized()
        with pytest.raises(ValueError, match="has not been initialized"):
            dist.get_rank()
        dist.init_process_group("nccl")
        assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "nccl")
        from torch.nn.parallel import DistributedDataParallel as Parallel

        model = Parallel(nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)).cuda(), device_ids=[0])
        sampler = torch.utils.data.DistributedSampler(range(8))  # type: ignore[arg-type]
        assert len(sampler) == 8
        with model.no_sync():
            loss = model(torch.randn(2, 4)).sum()  # moved to the card, as DDP does
        loss.backward()
        gathered = [torch.zeros(2, device="cuda")]
        dist.all_gather(gathered, torch.ones(2, device="cuda"))
        assert gathered[0].tolist() == [1.0, 1.0]
        assert dist.all_reduce(gathered[0], async_op=True).wait()
        assert next(iter(model.state_dict())).startswith("module.")
        with pytest.raises(GhostError, match="no other to talk to"):
            dist.send(gathered[0], 1)
        dist.destroy_process_group()
        monkeypatch.setitem(os.environ, "WORLD_SIZE", "8")
        with pytest.raises(GhostError, match=r"test_ghost_programs.py:\d+: .* 8 processes.*--world 8"):
            dist.init_process_group("nccl")
    assert vars(dist) == before
    assert torch.nn.parallel.DistributedDataParallel is DistributedDataParallel


def test_data_parallel_on_one_card() -> None:
    with ghost_gpu("H100"):
        model = nn.DataParallel(nn.Linear(4, 4)).cuda()
        model(torch.randn(2, 4)).sum().backward()
        assert model.module.weight.grad.is_cuda


def test_spawning_one_process_runs_it_here() -> None:
    seen = []
    with ghost_gpu("H100"):
        torch.multiprocessing.spawn(lambda rank, word: seen.append((rank, word)), args=("x",), nprocs=1)
        with pytest.raises(GhostError, match="4 processes"):
            torch.multiprocessing.spawn(print, nprocs=4)
    assert seen == [(0, "x")]


def test_old_tensor_types() -> None:
    with ghost_gpu("H100"):
        x = torch.cuda.FloatTensor(4, 2).normal_()
        assert (x.shape, x.dtype, x.is_cuda) == ((4, 2), torch.float32, True)
        assert torch.cuda.LongTensor([1, 2]).tolist() == [1, 2]
        assert x.type() == "torch.cuda.FloatTensor"
        assert isinstance(x, torch.cuda.FloatTensor)
        assert not isinstance(torch.ones(1), torch.cuda.FloatTensor)
        assert torch.ones(2).type(torch.cuda.HalfTensor).dtype is torch.float16
        assert torch.ones(2).type("torch.cuda.DoubleTensor").is_cuda
        torch.set_default_tensor_type(torch.cuda.FloatTensor)
        assert torch.Tensor([1.0, 2.0]).is_cuda
        assert torch.randn(3).is_cuda
        assert isinstance(x, torch.Tensor)
        assert nn.Linear(2, 2).weight.is_cuda
    assert not torch.randn(3).is_cuda
    assert not torch.Tensor([1.0]).is_cuda
    assert torch.ones(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize(
    ("where", "device"),
    [(None, "cpu"), ("cuda", "cuda"), (torch.device("cuda", 0), "cuda"), ({"cpu": "cuda:0"}, "cuda"), ("cpu", "cpu")],
)
def test_real_checkpoints_are_loaded_where_they_should_be(tmp_path: Path, where: object, device: str) -> None:
    path = tmp_path / "weights.pt"
    weights = nn.Linear(3, 2).state_dict()
    torch.save({"model": weights, "step": 5}, path)
    with ghost_gpu("H100"):
        found = torch.load(path, map_location=where)
        assert found["step"] == 5
        assert {one.device.type for one in found["model"].values()} == {device}
        nn.Linear(3, 2).cuda().load_state_dict(found["model"])
        moved = torch.load(path, map_location=lambda storage, _: storage.cuda(0))
        assert moved["model"]["weight"].is_cuda
        kept = torch.load(path, map_location=lambda storage, _: storage)
        assert torch.equal(kept["model"]["weight"], weights["weight"])


def test_saved_ghosts_do_not_change_with_the_model() -> None:
    with ghost_gpu("H100"):
        counter = {"steps": torch.zeros(1, device="cuda")}
        torch.save(counter, "in memory")
        counter["steps"] += 1
        assert torch.load("in memory")["steps"].item() == 0
        assert torch.load("in memory", map_location="cpu")["steps"].device.type == "cpu"


def test_what_is_compiled_is_told_from_what_is_not() -> None:
    with ghost_gpu("H100") as gpu:
        small, large = nn.Linear(4, 4).cuda(), nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)]).cuda()
        compiled = torch.compile(small, mode="max-autotune")
        assert compiled._orig_mod is small
        for _ in range(2):
            large(compiled(torch.randn(2, 4, device="cuda"))).sum().backward()
        assert gpu.regions.names == ["Linear"]
        assert 0.0 < gpu.regions.share < 0.3

        @torch.compile(fullgraph=True)
        def step(x: torch.Tensor) -> torch.Tensor:
            return large(x)

        for _ in range(9):
            step(torch.randn(2, 4, device="cuda"))
        assert gpu.regions.share > 0.5
    assert "_orig_mod" not in vars(small)


def test_what_is_compiled_is_told_without_gradients_and_beside_checkpoints() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.layers, x, use_reentrant=False)

    with ghost_gpu("H100") as gpu:
        model = torch.compile(Checkpointed().cuda())
        model(torch.randn(2, 4, device="cuda")).sum().backward()
        assert gpu.regions.share > 0.6  # what backward computes again is no forward pass
    with ghost_gpu("H100") as gpu, torch.no_grad():
        model = torch.compile(nn.Sequential(*[nn.Linear(4, 4) for _ in range(9)]).cuda())
        for _ in range(9):
            model(torch.randn(2, 4, device="cuda"))
        assert gpu.regions.share > 0.5


@pytest.mark.parametrize("is_compiled", [True, False])
def test_flex_attention(is_compiled: bool) -> None:
    with ghost_gpu("H100") as gpu, Recorder(has_ranges=False) as recorder:
        mask = create_block_mask(lambda _b, _h, q, kv: q >= kv, None, None, 256, 256, device="cuda")
        call = torch.compile(flex_attention) if is_compiled else flex_attention
        q = torch.randn(2, 4, 256, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        kv = torch.randn(2, 2, 256, 16, device="cuda", dtype=torch.bfloat16)
        call(q, kv, kv, block_mask=mask, enable_gqa=True).sum().backward()
        assert q.grad.shape == q.shape
    names = {one.call.name for one in recorder.trace().operations}
    assert ("_scaled_dot_product_flash_attention" in names) == is_compiled
    assert ("bmm" in names) != is_compiled
    assert bool(gpu.causal) == is_compiled
    assert any("flex_attention" in note for note in gpu.notes)


def test_scripted_functions_run_as_python() -> None:
    with ghost_gpu("H100") as gpu:

        @torch.jit.script
        def scaled(x: torch.Tensor) -> torch.Tensor:
            return x * 2.0

        assert scaled(torch.ones(2, device="cuda")).is_cuda
        model = torch.jit.trace(nn.Linear(2, 2).cuda(), torch.ones(1, 2, device="cuda"))
        assert model(torch.ones(1, 2, device="cuda")).is_cuda
    assert any("torch.jit" in note for note in gpu.notes)


def test_transforms_of_real_tensors_work() -> None:
    with ghost_gpu("H100"):
        assert torch.func.vmap(torch.sin)(torch.zeros(3)).tolist() == [0.0] * 3
        assert torch.func.grad(torch.sin)(torch.zeros(())).item() == 1.0
        with pytest.raises(GhostError, match=r"test_ghost_programs.py:\d+: torch.func.grad"):
            torch.func.grad(torch.sin)(torch.zeros((), device="cuda"))
