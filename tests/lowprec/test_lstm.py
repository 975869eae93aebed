"""Whole LSTMs on 16-bit inputs, against float64: forward, backward, what they keep, and whom they leave alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounds import DTYPES, forced
from torch import Tensor, nn

import mezzotint as mz
from mezzotint.lowprec.calls import call_counts
from mezzotint.lowprec.choice import Path

WHOLE = ("lstm.input", Path.UPCAST)
SHAPES = [
    {},
    {"bias": False},
    {"batch_first": True},
    {"num_layers": 2},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
]


@pytest.fixture(autouse=True)
def _forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with forced("upcast", monkeypatch):
        yield


def lstm(dtype: torch.dtype, **options: Any) -> tuple[nn.LSTM, nn.LSTM]:
    """Return a layer in a format, and the same numbers in float64."""
    torch.manual_seed(0)
    low, full = nn.LSTM(12, 10, **options).to(dtype), nn.LSTM(12, 10, **options).double()
    full.load_state_dict({name: value.double() for name, value in low.state_dict().items()})
    return low, full


def sequence(dtype: torch.dtype) -> Tensor:
    return torch.randn(5, 3, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def num_served(model: nn.Module, *inputs: Any) -> int:
    before = call_counts().get(WHOLE, 0)
    with mz.fast_cpu():
        model(*inputs)
    return call_counts().get(WHOLE, 0) - before


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype, options: dict[str, Any], is_autocast: bool) -> None:
    """Saved outputs, states and gradients are rounded between layers: 32 eps of the largest, as for single steps."""
    low, full = lstm(dtype, **options)
    if is_autocast:
        low.float()
    low_in, full_in = sequence(dtype).requires_grad_(), sequence(dtype).double().requires_grad_()
    with mz.fast_cpu():
        before = call_counts().get(WHOLE, 0)
        with torch.autocast("cpu", dtype=dtype, enabled=is_autocast):
            out, (_, cell) = low(low_in)
        assert call_counts()[WHOLE] - before == 1
        assert out.dtype is dtype
        (out.float().sum() + cell.float().square().sum()).backward()
    exact, (_, exact_cell) = full(full_in)
    (exact.sum() + exact_cell.square().sum()).backward()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=16 * eps)
    pairs = [(low_in, full_in), *zip(low.parameters(), full.parameters(), strict=True)]
    for one, other in pairs:
        assert one.grad.dtype is one.dtype
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=0, atol=32 * eps * float(other.grad.abs().max()))


@pytest.mark.parametrize("is_autocast", [False, True])
def test_what_waits_for_backward_is_compact(is_autocast: bool) -> None:
    low, _ = lstm(torch.float16, num_layers=2)
    if is_autocast:
        low.float()
    kept: list[torch.dtype] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.dtype)
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with mz.fast_cpu(), torch.autocast("cpu", dtype=torch.float16, enabled=is_autocast), keeping:
        low(sequence(torch.float16))
    assert set(kept) == {torch.float16}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    low, full = lstm(torch.float16)
    with mode():
        assert num_served(low, sequence(torch.float16)) == 1
        with mz.fast_cpu():
            got = low(sequence(torch.float16))[0]
        assert bool(((got.double() - full(sequence(torch.float16).double())[0]).abs() <= 16 * 2.0**-10).all())


def test_what_does_not_suit_is_torchs_own() -> None:
    low, _ = lstm(torch.float16)
    x = sequence(torch.float16)
    assert num_served(low, x) == 1
    assert num_served(nn.LSTM(12, 10, proj_size=4).half(), x) == 0
    assert num_served(low, nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2]))) == 0
    with pytest.raises((RuntimeError, ValueError)):
        num_served(nn.LSTM(12, 10), x)  # weights of another dtype, and no autocast


def test_other_dtypes_do_not_change_by_a_bit() -> None:
    mz.fast_cpu()  # registered from here on
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        layer = nn.LSTM(12, 10, num_layers=2, dropout=0.5).to(dtype)

        def run(layer: nn.LSTM = layer, dtype: torch.dtype = dtype) -> list[Tensor]:
            torch.manual_seed(1)
            out, states = layer(sequence(dtype))
            return [out, *states, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]

        shut = run()
        with mz.fast_cpu():
            opened = run()
        assert all(torch.equal(one, other) for one, other in zip(shut, opened, strict=True))
