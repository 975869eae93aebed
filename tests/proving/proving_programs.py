"""Small programs that train, as users write them for `mezzotint prove`."""

from pathlib import Path

# A regression that learns in 12 steps; dropout, data and shuffling come from the global generators of all libraries.
LEARNER = """
import random
import numpy as np
import torch
from torch import nn

SHARED = torch.Generator().manual_seed(7)

def make_run(seed, policy, lr=0.05, steps=12, noise=0.0):
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    target = torch.randn(8, 1)
    for step in range(steps):
        inputs = torch.randn(32, 8) + float(np.random.rand()) * 0.01 + random.random() * 0.01
        inputs = inputs + 1e-3 * torch.randn(32, 8, generator=SHARED)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=policy.is_mixed):
            out = model(inputs)
        loss = (out.float() - inputs @ target).square().mean() + noise * random.random()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield {"loss": loss, "double": 2 * loss.item()}
    return {"accuracy": 1.0 / (1.0 + loss.item())}
"""


def script(folder: Path, text: str = LEARNER, name: str = "train.py") -> str:
    """Write a program and return it as a target."""
    path = folder / name
    path.write_text(text)
    return f"{path}:make_run"
