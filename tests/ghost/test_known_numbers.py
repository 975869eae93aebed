"""What is known of a ghost's numbers is told truly, and what is not known any more is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mezzotint.errors import GhostError
from mezzotint.ghost.session import ghost_gpu


def test_what_came_from_the_cpu_is_known() -> None:
    labels = torch.tensor([0, 3, 1, 3, 2, 3])
    with ghost_gpu("H100") as gpu:
        ghost = labels.cuda()
        assert ghost.max().item() == 3
        assert int(ghost.max()) + 1 == 4
        assert ghost.tolist() == labels.tolist()
        assert torch.equal(ghost.cpu(), labels)
        assert not isinstance(ghost.cpu(), type(ghost))
        assert torch.unique(ghost).tolist() == [0, 1, 2, 3]
        assert torch.bincount(ghost).tolist() == [1, 1, 1, 3]
        assert (ghost == 3).nonzero().flatten().tolist() == [1, 3, 5]
        assert bool((ghost < 4).all())
        assert torch.randn(6, 5, device="cuda")[ghost == 3].shape == (3, 5)  # known mask, unknown numbers
        assert torch.masked_select(torch.randn(6, device="cuda"), ghost == 3).shape == (3,)
        lengths = torch.tensor([2, 5], device="cuda")
        mask = torch.arange(5, device="cuda")[None] < lengths[:, None]
        assert mask.sum(1).tolist() == [2, 5]
    assert not gpu.assumed
    assert labels.tolist() == [0, 3, 1, 3, 2, 3]


def test_the_cpu_tensor_may_change_later() -> None:
    counts = torch.tensor([1, 2])
    with ghost_gpu("H100"):
        ghost = counts.cuda()
        counts[0] = 7
        assert ghost.tolist() == [1, 2]


def test_writes_are_followed_or_forgotten() -> None:
    with ghost_gpu("H100") as gpu:
        pointer = torch.zeros(1, dtype=torch.long, device="cuda")
        pointer[0] = 5
        pointer += 2
        assert int(pointer) == 7
        assert not gpu.assumed
        values = torch.zeros(4, device="cuda")
        part = values[1:]
        part.add_(torch.randn(3, device="cuda"))
        values.sum().item()  # a view was written to with numbers that nobody knows
        assert {what for _, _, what in gpu.assumed} == {"item"}
    with ghost_gpu("H100") as gpu:
        steps = torch.zeros(1, device="cuda")
        torch._foreach_add_([steps], [torch.randn(1, device="cuda")])
        steps.item()
        assert gpu.assumed
    with ghost_gpu("H100") as gpu:
        stale = torch.zeros(1, device="cuda")
        stale.data = torch.randn(1, device="cuda")
        stale.item()
        assert gpu.assumed


def test_yes_or_no_is_guessed_as_the_numbers_are() -> None:
    with ghost_gpu("H100"):
        loss = torch.randn(8, device="cuda").square().mean()
        assert loss.item() == 1.0
        assert bool(loss > 0.5)
        assert not bool(loss > 1.5)
        assert bool(torch.isfinite(loss))
        assert not bool(torch.isnan(loss))
        x = torch.randn(8, device="cuda")
        assert bool(torch.isfinite(x).all())
        assert not bool(torch.isnan(x).any())
        assert f"{loss}" == "1.0"
        torch.distributions.Normal(x, x.exp()).log_prob(x)  # checks its arguments


def test_packed_sequences() -> None:
    lengths = torch.tensor([3, 7, 5])
    with ghost_gpu("H100") as gpu:
        model = nn.LSTM(4, 8, batch_first=True).cuda()
        x = torch.randn(3, 7, 4, device="cuda")
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        assert packed.data.shape == (15, 4)
        out, found = nn.utils.rnn.pad_packed_sequence(model(packed)[0], batch_first=True)
        assert out.shape == (3, 7, 8)
        assert found.tolist() == [3, 7, 5]
        out.sum().backward()
    assert not gpu.assumed


def test_sparse_gradients_are_refused() -> None:
    with ghost_gpu("H100"):
        table = nn.Embedding(10, 4, sparse=True).cuda()
        loss = table(torch.tensor([1, 2], device="cuda")).sum()
        with pytest.raises(GhostError, match="sparse=True"):
            loss.backward()


def test_operations_without_a_fake_kernel_are_tried_on_the_cpu() -> None:
    with ghost_gpu("H100"):
        shape = torch.ones(4, device="cuda", requires_grad=True)
        sample = torch.distributions.Gamma(shape, shape).rsample()
        assert sample.is_cuda
        sample.sum().backward()
        assert shape.grad.shape == (4,)
        cell = nn.GRUCell(4, 8).cuda()
        cell(torch.randn(2, 4, device="cuda")).sum().backward()
        assert cell.weight_hh.grad.shape == (24, 8)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_fused_updates(kind: type[torch.optim.Optimizer]) -> None:
    with ghost_gpu("H100"):
        model = nn.Linear(4, 4).cuda()
        optimizer = kind(model.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
        F.relu(model(torch.randn(2, 4, device="cuda"))).sum().backward()
        optimizer.step()
