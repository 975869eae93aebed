"""`mz.audit` around a part of a program, and `assert_policy` as a team's test."""

import pytest
import torch
from torch import nn

from mezzotint.auditing.checking import assert_policy
from mezzotint.auditing.session import audit
from mezzotint.errors import PolicyError, UserError


def training_step(dtype: torch.dtype | None = torch.bfloat16, params: torch.dtype = torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).to(params)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step() -> None:
        x = torch.randn(4, 8, dtype=params)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = net(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


@pytest.mark.parametrize(("dtype", "policy"), [(torch.bfloat16, "bf16-mixed"), (None, "float32")])
def test_a_step_that_keeps_its_policy(dtype: torch.dtype | None, policy: str):
    assert_policy(training_step(dtype), policy)


@pytest.mark.parametrize(
    ("step", "policy", "said"),
    [
        (training_step(None), "bf16-mixed", r"MZ291 addmm of .*runs in float32 .*compute=bfloat16"),
        (training_step(), "float32", r"MZ291 .*runs in bfloat16"),
        (training_step(params=torch.bfloat16), "bf16-mixed", r"MZ292 the weight of .* is bfloat16"),
        (training_step(torch.float16), "fp16-mixed", r"MZ226|MZ294"),
    ],
)
def test_a_departure_is_named(step, policy: str, said: str):
    with pytest.raises(AssertionError, match=said):
        assert_policy(step, policy)


def test_codes_can_be_accepted():
    with pytest.raises(AssertionError):
        assert_policy(training_step(None), "bf16-mixed")
    assert_policy(training_step(None), "bf16-mixed", ignore=["mz291"])


def test_no_step_is_no_proof():
    with pytest.raises(AssertionError, match="no training step was seen"):
        assert_policy(lambda: torch.ones(3).sum(), "float32")


def test_the_body_ends_after_the_steps_that_were_asked_for():
    step, count = training_step(), 0
    with audit(steps=2) as seen:
        for _ in range(10):
            step()
            count += 1
    assert count == 2
    assert seen.num_steps == 2
    assert seen.verdict == "nothing wrong found in 2 steps"
    assert str(seen.policy).startswith("params=float32, compute=bfloat16, loss=float32")


def test_errors_of_the_body_come_through():
    with pytest.raises(ZeroDivisionError), audit():
        raise ZeroDivisionError


def test_what_is_asked_for_is_checked_first():
    with pytest.raises(UserError, match="steps=0"):
        audit(steps=0)
    with pytest.raises(PolicyError):
        audit(policy="bf17-mixed")


def test_audits_do_not_nest():
    with audit(), pytest.raises(UserError, match="at work already"), audit():
        pass
