"""Bytes per parameter against what torch's own optimizers and the engine allocate, and the finding about them."""

import pytest
import torch

import mezzotint as mz
from mezzotint.errors import ConfigError
from mezzotint.findings import Severity
from mezzotint.hardware.support import DeviceFacts
from mezzotint.policy.memory import bytes_per_parameter, check_memory, parse_count
from mezzotint.policy.policy import Policy
from mezzotint.policy.presets import PRESETS

GIB = 1 << 30


@pytest.mark.parametrize("name", [name for name in PRESETS if "fp16" not in name])
def test_bytes_are_what_the_engine_keeps(name: str) -> None:
    """Weights, gradients, states and persistent copies of a real step; transient copies are the rest."""
    policy = Policy.parse(name)
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = mz.Engine(model, optimizer, policy=policy)
    with engine.forward():
        loss = model(torch.randn(8, 64)).float().square().mean()
    engine.backward(loss)
    count = model.weight.numel()
    parts = bytes_per_parameter(policy)
    assert model.weight.grad is not None
    assert model.weight.nbytes / count == parts["weights"]
    assert model.weight.grad.nbytes / count == parts["gradients"]
    engine.update()
    kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.dim() > 0)
    assert kept / count == parts["optimizer states"]


def test_the_known_sums() -> None:
    totals = {name: sum(bytes_per_parameter(Policy.parse(name)).values()) for name in PRESETS}
    assert totals["float32"] == 16
    assert totals["bf16-mixed"] == 18
    assert totals["bf16-pure"] == 8
    assert totals["bf16-master"] == 2 + 4 + 8 + 4


def facts(**more: object) -> DeviceFacts:
    return DeviceFacts(kind="cuda", index=0, name="a card", **more)  # type: ignore[arg-type]


def test_what_fits_gives_no_finding() -> None:
    policy = Policy.parse("bf16-mixed")
    assert check_memory(policy, 1e9, facts(memory_bytes=80 * GIB, free_bytes=70 * GIB)) == ()
    assert check_memory(policy, 1e9, facts(memory_bytes=None)) == ()


def test_what_does_not_fit_is_counted() -> None:
    (finding,) = check_memory(Policy.parse("bf16-mixed"), 7e9, facts(memory_bytes=80 * GIB))
    assert (finding.code, finding.severity) == ("MZ311", Severity.ERROR)
    assert "7,000,000,000 parameters need 117.3 GiB" in finding.message
    assert "18 bytes each: weights 4, gradients 4, optimizer states 8, autocast's copies 2" in finding.message
    (finding,) = check_memory(Policy(), 4e9, facts(memory_bytes=80 * GIB, free_bytes=10 * GIB))
    assert finding.severity is Severity.WARNING
    assert "cuda:0 has free 10.0 GiB" in finding.message


@pytest.mark.parametrize(
    ("text", "count"), [("124M", 124e6), ("1.3b", 1.3e9), ("7e9", 7e9), ("350 m", 350e6), ("5", 5)]
)
def test_counts(text: str, count: float) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "-1", "0", "1e99", "7BB", "nan"])
def test_bad_counts_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="is no number of parameters; write 124M"):
        parse_count(text)
