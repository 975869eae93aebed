"""An audit on the simulated GPU judges what needs no numbers."""

from pathlib import Path

import pytest

from mezzotint.auditing.planning import audit_on_ghost
from mezzotint.auditing.script import Target
from mezzotint.rules.judge import judge
from mezzotint.rules.trace.weights import LOST_UPDATES

STEP = """
import torch
net = torch.nn.Linear(64, 64, device="cuda", dtype={dtype})
optimizer = torch.optim.{optimizer}
for _ in range(2):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        net(torch.ones(4, 64, device="cuda")).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""
KAHAN = """
import torch
weight = torch.nn.Parameter(torch.ones(64, device="cuda", dtype=torch.bfloat16))
class Kahan(torch.optim.Optimizer):
    def __init__(self, weights):
        super().__init__(weights, {})
        self.lost = torch.zeros(64, device="cuda", dtype=torch.bfloat16)
    @torch.no_grad()
    def step(self):
        self.lost.sub_(1e-3 * weight.grad)
        before = weight.clone()
        weight.add_(self.lost)
        self.lost.add_(before.sub_(weight))
optimizer = Kahan([weight])
for _ in range(2):
    weight.float().square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def _codes(text: str, folder: Path) -> set[str]:
    path = folder / "train.py"
    path.write_text(text)
    outcome = audit_on_ghost(Target(path=path), "H100", steps=2)
    assert outcome.trace.steps
    return {one.code for one in judge(outcome.trace).findings} & {LOST_UPDATES.code}


@pytest.mark.parametrize(
    "optimizer",
    ["AdamW(net.parameters())", "AdamW(net.parameters(), fused=True)", "AdamW(net.parameters(), foreach=False)",
     "SGD(net.parameters(), lr=0.1, momentum=0.9)", "SGD(net.parameters(), lr=0.1, fused=True)"],
)  # fmt: skip
def test_updates_rounded_in_bfloat16_weights_are_found(optimizer: str, tmp_path: Path) -> None:
    assert _codes(STEP.format(dtype="torch.bfloat16", optimizer=optimizer), tmp_path) == {"MZ241"}


def test_float32_weights_and_compensated_updates_are_not(tmp_path: Path) -> None:
    assert not _codes(STEP.format(dtype="torch.float32", optimizer="AdamW(net.parameters())"), tmp_path)
    assert not _codes(KAHAN, tmp_path)
