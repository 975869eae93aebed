"""Several processes: every policy trains the same weights in all of them, or is refused before anything changed."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mezzotint as mz
from mezzotint.errors import MezzotintError
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.presets import PRESETS

LOW = [name for name in PRESETS if parse_policy(name).params != "float32"]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))


def engine_of(model, policy):
    return mz.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), policy=policy)


def outcome(model, engine, rank, scale=1.0):
    """Return the error of one update, else the sum of the weights."""
    torch.manual_seed(rank)
    try:
        with engine.forward():
            loss = model(torch.randn(4, 16)).float().square().mean() * scale
        engine.backward(loss)
        engine.update()
    except MezzotintError as error:
        return f"{type(error).__name__}: {error}"
    return sum(p.double().sum().item() for p in model.parameters())


def snapshot(model):
    return [(p.dtype, p.detach().clone(), p.grad) for p in model.parameters()], [type(m) for m in model.modules()]


def refusal(model, policy):
    before = snapshot(model)
    try:
        engine_of(model, policy)
    except MezzotintError as error:
        after = snapshot(model)
        is_unchanged = before[1] == after[1] and all(
            a[0] is b[0] and torch.equal(a[1], b[1]) for a, b in zip(before[0], after[0], strict=True)
        )
        return f"{'unchanged' if is_unchanged else 'CHANGED'} {type(error).__name__}: {error}"
    return "accepted"


def scenes(rank):
    """Return what happened, by scene."""
    seen = {}
    for policy in PRESETS:
        model = DistributedDataParallel(net())
        if policy in LOW:
            seen[f"ddp {policy}"] = refusal(model, policy)
            seen[f"inside {policy}"] = refusal(nn.Sequential(model), policy)
            seen[f"around {policy}"] = refusal(model.module, policy)
        else:
            engine = engine_of(model, policy)
            seen[f"ddp {policy}"] = outcome(model, engine, rank)
        del model
    for policy in ("bf16-mixed", "bf16-stochastic"):
        inner = net()
        engine = engine_of(inner, policy)
        model = DistributedDataParallel(inner)
        seen[f"later {policy}"] = outcome(model, engine, rank)
    alone = net()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        outcome(alone, engine_of(alone, "float32"), rank)
    seen["alone"] = [str(w.message) for w in told]
    model = DistributedDataParallel(net())
    with model.no_sync():
        seen["unreduced"] = outcome(model, engine_of(model, "bf16-mixed"), rank)
    model = DistributedDataParallel(net())
    scale = float("nan") if rank == 0 else 1.0
    seen["nan on one"] = outcome(model, engine_of(model, "bf16-mixed"), rank, scale)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for policy in LOW:
        seen[f"fsdp2 {policy}"] = refusal(fully_shard(net(), mesh=mesh), policy)
    model = fully_shard(net(), mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = engine_of(model, "bf16-mixed")
        outcome(model, engine, rank)
        seen["fsdp2 bf16-mixed"] = engine.steps
        model = net()
        engine = engine_of(model, "bf16-mixed")
        fully_shard(model, mesh=mesh)
        seen["fsdp2 later"] = outcome(model, engine, rank)
    return seen


def work(rank, folder):
    torch.set_num_threads(1)
    # a file to meet in: another program may take a port that was free
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    Path(folder, f"{rank}.json").write_text(json.dumps(scenes(rank)))
    dist.barrier()
    os._exit(0)  # DDP's reducer keeps gloo's threads, which may abort while the interpreter goes: pytorch#190489


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("policy", PRESETS)
def test_a_policy_reduces_gradients_or_is_refused_unchanged(both, policy):
    first, second = (seen[f"ddp {policy}"] for seen in both)
    assert first == second
    if policy not in LOW:
        assert isinstance(first, float), first
        return
    for where in ("ddp", "inside", "around"):
        for seen in both:
            text = seen[f"{where} {policy}"]
            assert text.startswith("unchanged PolicyError: params=bfloat16 is refused under DistributedDataParallel")
            assert "bf16-mixed" in text
    assert both[0][f"fsdp2 {policy}"].startswith("unchanged PolicyError: params=bfloat16 is refused under")


def test_gradients_that_were_not_reduced_end_the_first_update_in_all_processes(both):
    for seen in both:
        assert "processes disagree at the first update" in seen["unreduced"]


def test_a_loss_that_is_not_finite_in_one_process_ends_all(both):
    for seen in both:
        assert seen["nan on one"].startswith("NonFiniteError: the first loss is"), seen["nan on one"]


def test_a_model_without_wrapper_is_told(both):
    for seen in both:
        assert any("no DistributedDataParallel" in text for text in seen["alone"]), seen["alone"]


def test_a_wrapper_made_after_the_engine(both):
    assert both[0]["later bf16-mixed"] == both[1]["later bf16-mixed"]
    assert isinstance(both[0]["later bf16-mixed"], float)
    for seen in both:
        assert "wrapped in DistributedDataParallel after the Engine" in seen["later bf16-stochastic"]
        assert seen["fsdp2 bf16-mixed"] == 1
        assert "wrap the model first" in seen["fsdp2 later"]
