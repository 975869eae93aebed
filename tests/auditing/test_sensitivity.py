"""Errors against float32 on real programs: planted culprits are found, and the engine applies what is printed."""

import pytest
import torch
from torch import Tensor, nn

import mezzotint as mz
from mezzotint.auditing.bisect import Ending, bisect, candidate_tree
from mezzotint.auditing.sensitivity import Probe, error_function
from mezzotint.errors import AuditError, PolicyError
from mezzotint.modules.islands import find_modules, make_islands


class Centre(nn.Module):
    """Subtracts two large projections: what is left of their difference is lost in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.right.weight.copy_(self.left.weight + 0.01 * torch.randn(16, 16))
            self.left.bias.fill_(300.0)
            self.right.bias.fill_(300.0)

    def forward(self, x: Tensor) -> Tensor:
        return 30 * (self.left(x) - self.right(x))


class Net(nn.Module):
    def __init__(self, culprit: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Centre() if i == culprit else nn.Linear(16, 16) for i in range(3)])
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def make_step():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        x = torch.randn(64, 16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def program() -> None:
    step = make_step()
    for _ in range(3):
        step()


def test_the_culprit_is_found_and_the_engine_keeps_it():
    error, paths = error_function(program, metric="gradient", steps=1, seed=0)
    assert paths[0] == "net"
    before = error(())
    result = bisect(candidate_tree([path for path in paths if path != "net"]), error, tolerance=0.2 * before)
    assert result.ending is Ending.FOUND
    assert {name.rsplit(".", 1)[0] if name.endswith(("left", "right")) else name for name in result.keep} == {
        "net.blocks.1"
    }
    assert result.error_after < 0.2 * before < before

    keep = "|".join(name.removeprefix("net.") for name in result.keep)
    errors = {}
    for policy in ("float32", "bf16-mixed", f"bf16-mixed, keep={keep}"):
        torch.manual_seed(0)
        net = Net()
        engine = mz.Engine(net, torch.optim.SGD(net.parameters(), lr=0.0), policy=policy)
        x = torch.randn(64, 16)
        with engine.forward():
            loss = net(x).float().square().mean()
        engine.backward(loss)
        errors[policy] = torch.cat([weight.grad.flatten() for weight in net.parameters()])
    wanted = errors.pop("float32")
    plain, kept = ((found - wanted).norm() / wanted.norm() for found in errors.values())
    assert kept < 0.2 * plain
    assert plain == pytest.approx(before, rel=0.05)


def test_everything_kept_is_float32():
    error, paths = error_function(program, metric="gradient", steps=1, seed=0)
    assert error(paths) < 1e-6
    loss_error, _ = error_function(program, metric="loss", steps=3, seed=0)
    assert loss_error(["net"]) < 1e-6 < loss_error(())


def test_measurements_repeat():
    one, two = (Probe(steps=1).run(program, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.gradients, two.gradients, strict=True))
    assert one.losses == two.losses


def test_programs_that_do_not_train_are_refused():
    with pytest.raises(AuditError, match="does not train"):
        error_function(lambda: None, metric="gradient", steps=1, seed=0)
    with pytest.raises(AuditError, match="metric"):
        error_function(program, metric="speed", steps=1, seed=0)


def test_an_island_is_the_float32_module_bit_for_bit():
    torch.manual_seed(0)
    net = Net(culprit=9)
    make_islands(find_modules({"model": net}, ["blocks.1"]).values(), "cpu")
    x = torch.randn(8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = net(x)
        y = x + torch.tanh(net.blocks[0](x))
        with torch.autocast("cpu", enabled=False):
            middle = nn.functional.linear(y.float(), net.blocks[1].weight, net.blocks[1].bias)
        y = y + torch.tanh(middle)
        y = y + torch.tanh(net.blocks[2](y))
        wanted = net.head(y)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_islands_under_checkpointing(is_reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    grads = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        net = Net(culprit=9)
        make_islands(find_modules({"model": net}, ["blocks.*"]).values(), "cpu")
        x = torch.randn(8, 16, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = checkpoint(net, x, use_reentrant=is_reentrant) if is_checkpointed else net(x)
        y.float().sum().backward()
        grads.append([weight.grad.clone() for weight in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_an_exception_ends_the_island():
    net = nn.Sequential(nn.Linear(4, 4))
    make_islands(find_modules({"model": net}, ["0"]).values(), "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError):
            net(torch.randn(2, 5))
        assert torch.is_autocast_enabled("cpu")
        assert net(torch.randn(2, 4)).dtype is torch.float32


def test_copies_and_pickles_keep_their_islands():
    import copy
    import pickle

    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    make_islands(find_modules({"model": net}, ["1"]).values(), "cpu")
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert other(torch.randn(2, 4)).dtype is torch.float32


def test_patterns_find_modules_or_say_what_is_near():
    net = Net()
    assert list(find_modules({"model": net}, ["blocks.*", "head"])) == ["blocks.0", "blocks.1", "blocks.2", "head"]
    assert list(find_modules({"g": net, "d": net.head}, ["g.head"])) == ["g.head"]
    with pytest.raises(PolicyError, match="did you mean head"):
        find_modules({"model": net}, ["heat"])


@pytest.mark.parametrize("policy", ["float32, keep=head", "bf16-master, keep=head"])
def test_policies_with_nothing_to_keep_are_refused(policy: str):
    net = Net()
    with pytest.raises(PolicyError, match="keep=head"):
        mz.Engine(net, torch.optim.SGD(net.parameters(), lr=0.1), policy=policy)
