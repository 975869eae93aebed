"""FSDP2 on two processes, plain, audited and watched: prints digests. Arguments: RANK FILE."""

# ruff: noqa: T201
import hashlib
import logging
import os
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import mezzotint as mz

warnings.simplefilter("ignore")
logging.basicConfig()


def train() -> str:
    """Train; return the digest."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for module in (net[0], net[2], net):
        fully_shard(module, mp_policy=mixed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    digest = hashlib.sha256()
    for _ in range(4):
        loss = net(torch.randn(4, 8)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        digest.update(loss.detach().numpy().tobytes())
    for one in net.parameters():
        digest.update(one.detach().full_tensor().numpy().tobytes())
    return digest.hexdigest()


rank, file = int(sys.argv[1]), sys.argv[2]
os.environ.update(MASTER_ADDR="localhost", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
print("plain", train())
with mz.audit() as audit:
    print("audit", train())
print("reduce", audit.policy.reduce)
print("notes", audit.trace.notes, sorted({call.op for call in audit.trace.calls if "c10d" in call.op}))
with mz.watch(every=1) as watch:
    print("watch", train())
print("watched", len(watch.rows), watch.fault, [one.kind for one in watch.alarms])
dist.destroy_process_group()
