"""For each rule a program that breaks it and one that does not, by name: `bad_mz201`, `good_mz201`.

Each function builds a program and returns its step. A suffix ("bad_mz201_sum") makes another variant.
"""

import io
import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

Step = Callable[[], object]
half = partial(torch.autocast, "cpu", dtype=torch.float16)
brain = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def parts(width: int = 8, out: int = 4, **options):
    """Return a small model, its optimizer and a gradient scaler."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, out))
    return (
        net,
        torch.optim.SGD(net.parameters(), lr=0.01),
        torch.amp.GradScaler("cpu", **{"init_scale": 256.0, **options}),
    )


def trained(loss_of: Callable[[nn.Module], Tensor], *, region=brain, is_scaled: bool = False) -> Step:
    """Return the textbook step around a loss."""
    net, optimizer, scaler = parts()

    def step() -> None:
        with region():
            loss = loss_of(net)
        optimizer.zero_grad()
        if is_scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()

    return step


def data(rows: int = 6) -> Tensor:
    return torch.randn(rows, 8)


# losses


def bad_mz201() -> Step:
    return trained(lambda net: net(data()).square().mean())


def bad_mz201_sum_of_two() -> Step:
    return trained(lambda net: net(data()).abs().sum() + 0.1 * net(data()).square().mean(), region=half, is_scaled=True)


def good_mz201() -> Step:
    return trained(lambda net: net(data()).float().square().mean())


def _log_probabilities(dtype: torch.dtype) -> Step:
    net, optimizer, _ = parts()

    def step() -> None:
        with brain():
            logits = net(data())
        (-torch.log_softmax(logits.to(dtype), -1)[:, 0].float().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bad_mz202() -> Step:
    return _log_probabilities(torch.bfloat16)


def good_mz202() -> Step:
    return _log_probabilities(torch.float32)


def _ratio(dtype: torch.dtype) -> Step:
    net, optimizer, _ = parts()
    old = torch.log_softmax(torch.randn(6, 4), -1).to(dtype)

    def step() -> None:
        with brain():
            logits = net(torch.ones(6, 8))
        new = torch.log_softmax(logits.to(dtype), -1)
        ratio = (new - old).exp()
        (ratio.float() * torch.randn(6, 4)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bad_mz203() -> Step:
    return _ratio(torch.bfloat16)


def good_mz203() -> Step:
    return _ratio(torch.float32)


def _positions(dtype: torch.dtype, length: int) -> Step:
    def loss(net: nn.Module) -> Tensor:
        t = torch.arange(length).to(dtype)
        window = (t[:, None] - t[None, :]).abs() < 4
        return net(data()).float().square().mean() + window.float().mean()

    return trained(loss)


def bad_mz204() -> Step:
    return _positions(torch.bfloat16, 300)


def bad_mz204_arange() -> Step:
    return trained(lambda net: net(data()).float().mean() + torch.arange(3000, dtype=torch.float16).float().mean() * 0)


def bad_mz204_autocast() -> Step:
    table = torch.randn(1, 4)

    def loss(net: nn.Module) -> Tensor:
        t = torch.arange(600).float()[:, None]
        return (t @ table).float().sin().mean() + net(data()).float().mean()

    return trained(loss)


def good_mz204() -> Step:
    return _positions(torch.float32, 300)


def good_mz204_short() -> Step:
    return _positions(torch.bfloat16, 256)


def _angles(dtype: torch.dtype) -> Step:
    frequencies = (10000.0 ** (-torch.arange(0, 8, 2) / 8)).to(dtype)

    def loss(net: nn.Module) -> Tensor:
        angles = torch.arange(200, dtype=torch.float32).to(dtype)[:, None] * frequencies
        return net(data()).float().square().mean() + angles.cos().float().mean() + angles.sin().float().mean()

    return trained(loss)


def bad_mz205() -> Step:
    return _angles(torch.bfloat16)


def good_mz205() -> Step:
    return _angles(torch.float32)


def bad_mz206() -> Step:
    return trained(lambda net: F.binary_cross_entropy(torch.sigmoid(net(data())).float(), torch.ones(6, 4)))


def good_mz206() -> Step:
    return trained(lambda net: F.binary_cross_entropy_with_logits(net(data()), torch.ones(6, 4)))


class Again(torch.autograd.Function):
    """Recomputes its function in backward, under autocast with or without the dtype of forward."""

    @staticmethod
    def forward(ctx, function, dtype, x, *weights):
        ctx.function, ctx.dtype, ctx.weights = function, dtype, weights
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_(True)
        with torch.enable_grad(), torch.autocast("cpu", dtype=ctx.dtype):
            out = ctx.function(x)
        return None, None, *torch.autograd.grad(out, (x, *ctx.weights), grad.to(out.dtype))


def _recomputed(dtype: torch.dtype | None) -> Step:
    def loss(net: nn.Module) -> Tensor:
        x = data().requires_grad_(True)
        return Again.apply(net, dtype, x, *net.parameters()).float().square().mean()

    return trained(loss, region=half, is_scaled=True)


def bad_mz207() -> Step:
    return _recomputed(None)


def good_mz207() -> Step:
    return _recomputed(torch.float16)


def good_mz207_of_torch() -> Step:
    return trained(lambda net: checkpoint(net, data(), use_reentrant=False).float().square().mean())


def bad_mz202_log_of_softmax() -> Step:
    def loss(net: nn.Module) -> Tensor:
        with brain():
            logits = net(data())
        return -(torch.softmax(logits, -1) + 1e-6).log().float()[:, 0].mean()

    return trained(loss, region=partial(brain, enabled=False))


def good_mz202_log_of_softmax() -> Step:
    return trained(lambda net: -torch.softmax(net(data()).float(), -1).log()[:, 0].mean())


def _counted_by_sum(dtype: torch.dtype) -> Step:
    def loss(net: nn.Module) -> Tensor:
        positions = (torch.ones(2, 400, dtype=dtype).cumsum(-1) - 1).long()
        return net(data()).float().mean() + positions.float().mean() * 0

    return trained(loss)


def bad_mz204_cumsum() -> Step:
    return _counted_by_sum(torch.bfloat16)


def good_mz204_cumsum() -> Step:
    return _counted_by_sum(torch.float32)


def _ids_through(dtype: torch.dtype) -> Step:
    table = torch.randn(5000, 8)

    def loss(net: nn.Module) -> Tensor:
        ids = torch.randint(4000, 5000, (6,)).to(dtype)
        return net(table[ids.long().clamp(max=4999)]).float().square().mean()

    return trained(loss)


def bad_mz204_ids() -> Step:
    return _ids_through(torch.bfloat16)


def good_mz204_ids() -> Step:
    return _ids_through(torch.int64)


def bad_mz205_drawn_times() -> Step:
    def loss(net: nn.Module) -> Tensor:
        t = torch.randint(500, 1000, (6, 1)).to(torch.bfloat16)
        return net(data()).float().square().mean() + (t * torch.ones(4, dtype=torch.bfloat16)).sin().float().mean()

    return trained(loss)


def _variance(dtype: torch.dtype) -> Step:
    def loss(net: nn.Module) -> Tensor:
        h = (net(data()) + 20).to(dtype)
        variance = (h * h).mean(-1) - h.mean(-1) ** 2
        return h.float().square().mean() * 1e-3 + variance.float().clamp(-1, 1).mean()

    return trained(loss)


def bad_mz208() -> Step:
    return _variance(torch.bfloat16)


def good_mz208() -> Step:
    return _variance(torch.float32)


# ranges


def _squares(dtype: torch.dtype) -> Step:
    return trained(
        lambda net: (1000.0 * (net(data()) + 1)).to(dtype).square().float().mean().clamp(max=1.0),
        region=half,
        is_scaled=True,
    )


def bad_mz211() -> Step:
    return _squares(torch.float16)


def good_mz211() -> Step:
    return _squares(torch.float32)


def bad_mz212() -> Step:
    return trained(lambda net: net(data()).float().square().mean() + torch.log(torch.zeros(3)).exp().sum())


def good_mz212() -> Step:
    return trained(lambda net: net(data()).float().square().mean() + torch.log(torch.ones(3)).exp().sum())


def bad_mz213() -> Step:
    return trained(
        lambda net: (net(data()) / (net(data()).square() + 1e-8).sqrt()).float().square().mean(),
        region=half,
        is_scaled=True,
    )


def _decay_in(dtype: torch.dtype) -> Step:
    decay = torch.ones(())

    def loss(net: nn.Module) -> Tensor:
        decay.copy_(torch.full((), 0.999, dtype=dtype))
        return net(data()).float().square().mean()

    return trained(loss)


def bad_mz213_decay() -> Step:
    return _decay_in(torch.bfloat16)


def good_mz213_decay() -> Step:
    return _decay_in(torch.float32)


def good_mz213() -> Step:
    def loss(net: nn.Module) -> Tensor:
        x = net(data()).float()
        return (x / (x.square() + 1e-8).sqrt()).square().mean()

    return trained(loss, region=half, is_scaled=True)


def bad_mz214() -> Step:
    return trained(lambda net: net(data(512)).float().square().mean() * 1e-4, region=half, is_scaled=True)


def good_mz214() -> Step:
    return trained(lambda net: 8 * net(data()).float().square().sum(), region=half, is_scaled=True)


# scaling


def _scaled(*calls: str, scale: float = 256.0) -> Step:
    """Return a step that makes these calls in this order."""
    net, optimizer, scaler = parts(init_scale=scale)

    def backward() -> None:
        with half():
            loss = net(data()).float().square().mean()
        scaler.scale(loss).backward()

    acts = {
        "backward": backward,
        "unscale": lambda: scaler.unscale_(optimizer),
        "clip": lambda: clip_grad_norm_(net.parameters(), 1.0),
        "own clip": lambda: _clip_by_hand(net),
        "step": lambda: scaler.step(optimizer),
        "update": scaler.update,
        "raw step": optimizer.step,
        "zero": optimizer.zero_grad,
    }

    def step() -> None:
        for call in calls:
            acts[call]()

    return step


def _clip_by_hand(net: nn.Module) -> None:
    norm = torch.stack([weight.grad.norm() for weight in net.parameters()]).norm()
    for weight in net.parameters():
        weight.grad.mul_((1.0 / (norm + 1e-6)).clamp(max=1.0))


def bad_mz221() -> Step:
    return _scaled("zero", "backward", "clip", "step", "update")


def bad_mz221_by_hand() -> Step:
    return _scaled("zero", "backward", "own clip", "step", "update")


def good_mz221() -> Step:
    return _scaled("zero", "backward", "unscale", "clip", "step", "update")


def good_mz221_by_hand() -> Step:
    return _scaled("zero", "backward", "unscale", "own clip", "step", "update")


def bad_mz222() -> Step:
    return _scaled("zero", "backward", "raw step")


def good_mz222() -> Step:
    return _scaled("zero", "backward", "unscale", "step", "update")


def _scaled_by_hand(is_divided: bool) -> Step:
    net, optimizer, _ = parts()

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        (loss * 1024.0).backward()
        if is_divided:
            for weight in net.parameters():
                weight.grad /= 1024.0
        optimizer.step()

    return step


def bad_mz222_by_hand() -> Step:
    return _scaled_by_hand(False)


def good_mz222_by_hand() -> Step:
    return _scaled_by_hand(True)


def good_mz222_weight_of_a_loss() -> Step:
    return trained(lambda net: 1024.0 * net(data()).float().square().mean())


def _perturbed(factor_of: Callable[[torch.amp.GradScaler, nn.Module], object]) -> Step:
    """Return a step of sharpness-aware minimization: weights move along the gradient and back."""
    net, optimizer, scaler = parts()

    def backward() -> None:
        optimizer.zero_grad()
        with half():
            loss = net(data()).float().square().mean()
        scaler.scale(loss).backward()

    def step() -> None:
        backward()
        with torch.no_grad():
            factor = factor_of(scaler, net)
            moves = [weight.grad * factor for weight in net.parameters()]
            torch._foreach_add_(list(net.parameters()), moves)
        backward()
        with torch.no_grad():
            torch._foreach_sub_(list(net.parameters()), moves)
        scaler.step(optimizer)
        scaler.update()

    return step


def bad_mz222_moved() -> Step:
    return _perturbed(lambda _scaler, _net: 1e-4)


def good_mz222_moved() -> Step:
    return _perturbed(lambda scaler, _net: 1e-4 / scaler.get_scale())


def good_mz222_moved_by_unit_length() -> Step:
    return _perturbed(lambda _scaler, net: 1e-2 / torch.stack([w.grad.norm() for w in net.parameters()]).norm())


def bad_mz223() -> Step:
    return _scaled("zero", "backward", "unscale", "backward", "unscale", "step", "update")


def good_mz223() -> Step:
    return _scaled("zero", "backward", "backward", "unscale", "step", "update")


def bad_mz224() -> Step:
    return _scaled("zero", "backward", "unscale", "backward", "step", "update")


def good_mz224() -> Step:
    return _scaled("backward", "backward", "step", "update", "zero")


def good_mz224_zeroed_by_hand() -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        for weight in net.parameters():
            weight.grad.zero_()

    return step


def good_mz224_left_over() -> Step:
    """The generator's loss leaves gradients in the critic, which are zeroed before the critic steps."""
    generator, for_generator, scaler = parts(width=8, out=8)
    critic, for_critic, _ = parts(width=8, out=1)

    def step() -> None:
        for _part, optimizer in ((critic, for_critic), (generator, for_generator)):
            with half():
                loss = critic(generator(data())).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def _penalty(is_divided: bool) -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        x = data().requires_grad_(True)
        with half():
            out = net(x)
        (slope,) = torch.autograd.grad(scaler.scale(out.float().sum()), x, create_graph=True)
        if is_divided:
            slope = slope / scaler.get_scale()
        loss = out.float().mean() + (slope.norm(2, 1) - 1).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def bad_mz225() -> Step:
    return _penalty(False)


def good_mz225() -> Step:
    return _penalty(True)


def bad_mz226() -> Step:
    return trained(lambda net: net(data()).float().square().mean(), region=half)


def good_mz226() -> Step:
    return trained(lambda net: net(data()).float().square().mean(), region=half, is_scaled=True)


def good_mz226_by_hand() -> Step:
    net, optimizer, _ = parts()

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        (loss * 1024.0).backward()
        for weight in net.parameters():
            weight.grad.div_(1024.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def good_mz226_inference() -> Step:
    teacher, _, _ = parts()

    def loss(net: nn.Module) -> Tensor:
        with torch.no_grad(), half():
            target = teacher(data())
        return F.mse_loss(net(data()).float(), target.float())

    return trained(loss)


def _weights_in(dtype: torch.dtype) -> Step:
    net, _, scaler = parts()
    net.to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        with half():
            loss = net(data().to(dtype)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def bad_mz227() -> Step:
    return _weights_in(torch.float16)


def good_mz227() -> Step:
    return _weights_in(torch.float32)


def _with_closure(*more: object) -> Step:
    net, optimizer, scaler = parts()

    def closure() -> Tensor:
        optimizer.zero_grad()
        with half():
            loss = net(data()).float().square().mean()
        scaler.scale(loss).backward()
        return loss

    def step() -> None:
        closure()
        scaler.step(optimizer, *(closure for _ in more))
        scaler.update()

    return step


def bad_mz228() -> Step:
    return _with_closure("closure")


def good_mz228() -> Step:
    return _with_closure()


def bad_mz229() -> Step:
    return _two_optimizers("step a", "update", "step b", "update")


def good_mz229() -> Step:
    return _two_optimizers("step a", "step b", "update")


def bad_mz229_between_micro_batches() -> Step:
    return _scaled("zero", "backward", "update", "backward", "step", "update")


def _two_optimizers(*calls: str) -> Step:
    one, first, scaler = parts()
    two, second, _ = parts()

    def step() -> None:
        with half():
            loss = one(data()).float().square().mean() + two(data()).float().square().mean()
        scaler.scale(loss).backward()
        for call in calls:
            {"step a": lambda: scaler.step(first), "step b": lambda: scaler.step(second), "update": scaler.update}[
                call
            ]()
        first.zero_grad()
        second.zero_grad()

    return step


def _saved(has_scaler: bool) -> Step:
    net, optimizer, scaler = parts()
    train = _scaled("zero", "backward", "step", "update")

    def step() -> None:
        train()
        state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
        if has_scaler:
            state["scaler"] = scaler.state_dict()
        torch.save(state, io.BytesIO())

    return step


def bad_mz230() -> Step:
    return _saved(False)


def good_mz230() -> Step:
    return _saved(True)


def bad_mz231() -> Step:
    return trained(lambda net: net(data()).float().square().mean(), is_scaled=True)


def good_mz231() -> Step:
    return trained(lambda net: net(data()).float().square().mean())


def _first_scaled(*later: bool) -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        for is_scaled in (True, *later):
            with half():
                loss = net(data()).float().square().mean()
            (scaler.scale(loss) if is_scaled else loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return step


def bad_mz232() -> Step:
    return _first_scaled(False)


def good_mz232() -> Step:
    return _first_scaled(True)


def _crossed(is_crossed: bool) -> Step:
    net, optimizer, scaler = parts()
    _, _, other = parts(init_scale=4.0)
    other.scale(torch.zeros(()))

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        stepping = other if is_crossed else scaler
        stepping.step(optimizer)
        stepping.update()

    return step


def bad_mz232_of_another_scaler() -> Step:
    return _crossed(True)


def good_mz232_of_its_scaler() -> Step:
    return _crossed(False)


def bad_mz232_at_once() -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        loss.backward()
        scaler.step(optimizer)

    return step


def _scaler_by_step(is_new: bool) -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        used = torch.amp.GradScaler("cpu") if is_new else scaler
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        used.scale(loss).backward()
        used.step(optimizer)
        used.update()

    return step


def bad_mz233() -> Step:
    return _scaler_by_step(True)


def good_mz233() -> Step:
    return _scaler_by_step(False)


def bad_mz234() -> Step:
    return _scaled("zero", "backward", "step", "raw step", "update")


def good_mz234() -> Step:
    return _scaled("zero", "backward", "step", "update")


def _scheduled(is_guarded: bool, every: int = 1) -> Step:
    net, optimizer, scaler = parts(init_scale=2.0**40)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if count % every == 0 and (not is_guarded or scaler.get_scale() >= scale):
            scheduler.step()

    return step


def bad_mz235() -> Step:
    return _scheduled(False)


def good_mz235() -> Step:
    return _scheduled(True)


def _noisy(*, is_unscaled: bool) -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if is_unscaled:
            scaler.unscale_(optimizer)
        for weight in net.parameters():
            weight.grad.add_(0.01 * torch.randn_like(weight.grad))
        scaler.step(optimizer)
        scaler.update()

    return step


def bad_mz236() -> Step:
    return _noisy(is_unscaled=False)


def bad_mz236_assigned() -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        for weight in net.parameters():
            weight.grad = weight.grad + 0.1 * weight.detach()
        scaler.step(optimizer)
        scaler.update()

    return step


def good_mz236() -> Step:
    return _noisy(is_unscaled=True)


def good_mz236_centered() -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        for weight in net.parameters():
            weight.grad.sub_(weight.grad.mean())  # carries the scale as well
        scaler.step(optimizer)
        scaler.update()

    return step


# weights


def _pure(dtype: torch.dtype, lr: float, optimizer_class=torch.optim.SGD, **options) -> Step:
    torch.manual_seed(0)
    net = nn.Linear(8, 4).to(dtype)
    optimizer = optimizer_class(net.parameters(), lr=lr, **options)

    def step() -> None:
        net(data().to(dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bad_mz241() -> Step:
    return _pure(torch.bfloat16, 1e-4)


def bad_mz241_fused() -> Step:
    return _pure(torch.bfloat16, 1e-5, torch.optim.AdamW, fused=True)


def good_mz241() -> Step:
    return _pure(torch.float32, 1e-4)


def good_mz241_masters() -> Step:
    torch.manual_seed(0)
    net = nn.Linear(8, 4).to(torch.bfloat16)
    masters = [weight.detach().float() for weight in net.parameters()]
    optimizer = torch.optim.SGD(masters, lr=1e-4)

    def step() -> None:
        net(data().to(torch.bfloat16)).float().square().mean().backward()
        for master, weight in zip(masters, net.parameters(), strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, net.parameters(), strict=True):
                weight.copy_(master)

    return step


def good_mz241_kahan() -> Step:
    torch.manual_seed(0)
    net = nn.Linear(8, 4).to(torch.bfloat16)
    dropped = [torch.zeros_like(weight) for weight in net.parameters()]

    class Kahan(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self) -> None:
            for weight, rest in zip(net.parameters(), dropped, strict=True):
                rest.add_(weight.grad, alpha=-1e-4)
                before = weight.clone()
                weight.add_(rest)
                rest.add_(before.sub_(weight))

    optimizer = Kahan(net.parameters(), {})

    def step() -> None:
        net(data().to(torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _averaged(dtype: torch.dtype) -> Step:
    net, optimizer, _ = parts()
    average = [weight.detach().clone().to(dtype) for weight in net.parameters()]

    def step() -> None:
        net(data()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for one, weight in zip(average, net.parameters(), strict=True):
                one.lerp_(weight.to(dtype), 1e-4)

    return step


def bad_mz242() -> Step:
    return _averaged(torch.bfloat16)


def good_mz242() -> Step:
    return _averaged(torch.float32)


def _assigned_average(dtype: torch.dtype) -> Step:
    net, optimizer, _ = parts()
    average = {name: weight.detach().clone().to(dtype) for name, weight in net.named_parameters()}

    @torch.no_grad()
    def follow() -> None:
        for name, weight in net.named_parameters():
            average[name] = 0.9999 * average[name] + (1 - 0.9999) * weight.to(dtype)

    def step() -> None:
        net(data()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        follow()

    return step


def bad_mz242_assigned() -> Step:
    return _assigned_average(torch.bfloat16)


def good_mz242_assigned() -> Step:
    return _assigned_average(torch.float32)


def _counted(dtype: torch.dtype, start: float) -> Step:
    net, optimizer, _ = parts()
    count = torch.tensor(start, dtype=dtype)

    def step() -> None:
        net(data()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        count.add_(1)

    return step


def bad_mz243() -> Step:
    return _counted(torch.bfloat16, 300.0)


def good_mz243() -> Step:
    return _counted(torch.float32, 300.0)


def good_mz243_low() -> Step:
    return _counted(torch.bfloat16, 3.0)


def bad_mz244() -> Step:
    return _pure(torch.bfloat16, 1.0, torch.optim.AdamW, betas=(0.9, 0.9999))


def good_mz244() -> Step:
    return _pure(torch.float32, 1.0, torch.optim.AdamW, betas=(0.9, 0.9999))


def _normed(dtype: torch.dtype) -> Step:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(torch.bfloat16)
    net[1].to(dtype)
    masters = [weight.detach().float() for weight in net.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)

    def step() -> None:
        net(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)).float().square().mean().backward()
        for master, weight in zip(masters, net.parameters(), strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()

    return step


def bad_mz245() -> Step:
    return _normed(torch.bfloat16)


def good_mz245() -> Step:
    return _normed(torch.float32)


def good_mz245_evaluated() -> Step:
    torch.manual_seed(0)
    frozen = nn.BatchNorm2d(3).to(torch.bfloat16).eval().requires_grad_(False)
    return trained(
        lambda net: net(data()).float().square().mean() + frozen(torch.randn(2, 3, 4, 4).bfloat16()).float().mean()
    )


def _micro_batches(dtype: torch.dtype, count: int) -> Step:
    torch.manual_seed(0)
    net = nn.Linear(8, 4).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(count):
            (net(data().to(dtype)).float().square().mean() / count).backward()
        optimizer.step()

    return step


def bad_mz246() -> Step:
    return _micro_batches(torch.bfloat16, 16)


def good_mz246() -> Step:
    return _micro_batches(torch.float32, 16)


def _summed_in(dtype: torch.dtype) -> Step:
    torch.manual_seed(0)
    net = nn.Linear(8, 4).to(torch.bfloat16)
    masters = [weight.detach().float() for weight in net.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1)

    def step() -> None:
        sums = [torch.zeros_like(weight, dtype=dtype) for weight in net.parameters()]
        for _ in range(12):
            (net(data().bfloat16()).float().square().mean() / 12).backward()
            for total, weight in zip(sums, net.parameters(), strict=True):
                total.add_(weight.grad)
                weight.grad = None
        for master, total in zip(masters, sums, strict=True):
            master.grad = total.float()
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, net.parameters(), strict=True):
                weight.copy_(master)

    return step


def bad_mz246_by_hand() -> Step:
    return _summed_in(torch.bfloat16)


def good_mz246_by_hand() -> Step:
    return _summed_in(torch.float32)


def _copied_back(is_copied_back: bool) -> Step:
    torch.manual_seed(0)
    net = nn.Linear(8, 4).to(torch.bfloat16)
    masters = [nn.Parameter(weight.detach().float()) for weight in net.parameters()]
    optimizer = torch.optim.SGD(masters, lr=1e-4)

    def step() -> None:
        net(data().bfloat16()).float().square().mean().backward()
        for master, weight in zip(masters, net.parameters(), strict=True):
            if is_copied_back:
                master.data.copy_(weight.data)
            master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        for master, weight in zip(masters, net.parameters(), strict=True):
            weight.data.copy_(master.data)

    return step


def bad_mz247() -> Step:
    return _copied_back(True)


def good_mz247() -> Step:
    return _copied_back(False)


def _checkpointed(**kept: Callable[[Tensor], Tensor]) -> Step:
    net, optimizer, _ = parts()
    train = trained(lambda net: net(data()).float().square().mean())

    def step() -> None:
        train()
        with brain():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = {name: {k: of(v) for k, v in net.state_dict().items()} for name, of in kept.items()}
        torch.save({**state, "optimizer": optimizer.state_dict()}, io.BytesIO())

    return step


def bad_mz248() -> Step:
    return _checkpointed(model=Tensor.half)


def good_mz248() -> Step:
    return _checkpointed(model=Tensor.clone, export=Tensor.half)


# regions


def _inner_updates(is_one_region: bool) -> Step:
    net, optimizer, _ = parts()

    def update(x: Tensor) -> None:
        loss = net(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def step() -> None:
        if is_one_region:
            with brain():
                for _ in range(3):
                    update(data())
        else:
            for _ in range(3):
                with brain():
                    loss = net(data()).float().square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    return step


def bad_mz251() -> Step:
    return _inner_updates(True)


def good_mz251() -> Step:
    return _inner_updates(False)


def bad_mz252() -> Step:
    net, optimizer, _ = parts()

    def step() -> None:
        with brain():
            net(data()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def good_mz252() -> Step:
    return trained(lambda net: net(data()).float().square().mean())


def _in_thread(has_region: bool) -> Step:
    found: list[Tensor] = []

    def loss(net: nn.Module) -> Tensor:
        def work() -> None:
            with brain(enabled=has_region):
                found.append(net(data()))

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found.pop().float().square().mean()

    return trained(loss)


def bad_mz253() -> Step:
    return _in_thread(False)


def good_mz253() -> Step:
    return _in_thread(True)


def bad_mz254() -> Step:
    return trained(
        lambda net: net(data()).square().mean(), region=partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    )


def good_mz254() -> Step:
    return trained(lambda net: net(data()).float().square().mean())


def bad_mz255() -> Step:
    def loss(net: nn.Module) -> Tensor:
        with torch.no_grad():
            torch.zeros(8, 8).addmm_(torch.randn(8, 8), torch.randn(8, 8))
        return net(data()).float().square().mean()

    return trained(loss)


def good_mz255() -> Step:
    return trained(lambda net: net(data()).float().square().mean())


def bad_mz256() -> Step:
    net, optimizer, _ = parts()

    def step() -> None:
        out = net(data())
        with brain():
            loss = F.mse_loss(out, torch.zeros(6, 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def bad_mz256_generator() -> Step:
    net, optimizer, _ = parts()

    @brain()
    def outputs():
        yield net(data())  # runs after the region has ended

    def step() -> None:
        optimizer.zero_grad()
        for out in outputs():
            out.square().mean().backward()
        optimizer.step()

    return step


def good_mz256() -> Step:
    return trained(lambda net: net(data()).float().square().mean())


def good_mz256_evaluation_only() -> Step:
    net, optimizer, _ = parts()

    def step() -> None:
        net(data()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad(), brain():
            net(data())

    return step


def _island(enters: Callable[[Tensor], Tensor]) -> Step:
    def loss(net: nn.Module) -> Tensor:
        h = net(data())
        with torch.autocast("cpu", enabled=False):
            p = torch.softmax(enters(h), -1)
        return p.float().square().mean()

    return trained(loss)


def bad_mz257() -> Step:
    return _island(lambda h: h)


def good_mz257() -> Step:
    return _island(Tensor.float)


def good_mz257_compact_module() -> Step:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1)).bfloat16().requires_grad_(False)

    def loss(net: nn.Module) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            wanted = teacher(data().bfloat16())
        return (net(data()).float() - wanted.float()).square().mean()

    return trained(loss)


def _stored_region(**options) -> Step:
    stored = torch.autocast("cpu", **options)

    def loss(net: nn.Module) -> Tensor:
        h = net[1](net[0](data()))
        with stored:
            out = net[2](h)
        return out.float().square().mean()

    return trained(loss, region=half, is_scaled=True)


def bad_mz258() -> Step:
    return _stored_region()


def good_mz258() -> Step:
    return _stored_region(dtype=torch.float16)


# refusals


def bad_mz261() -> Step:
    def loss(net: nn.Module) -> Tensor:
        out = torch.zeros(6, 4)
        out[torch.arange(6)] = net(data())
        return out.square().mean()

    return trained(loss)


def bad_mz261_function() -> Step:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad @ weight.t(), x.t() @ grad

    weight = nn.Parameter(torch.randn(4, 4))
    return trained(lambda net: Product.apply(net(data()), weight).float().square().mean())


def good_mz261() -> Step:
    def loss(net: nn.Module) -> Tensor:
        values = net(data())
        out = torch.zeros(6, 4, dtype=values.dtype)
        out[torch.arange(6)] = values
        return out.float().square().mean()

    return trained(loss)


def bad_mz261_numpy() -> Step:
    def loss(net: nn.Module) -> Tensor:
        out = net(data())
        out.detach().numpy()
        return out.float().square().mean()

    return trained(loss)


def bad_mz261_convolution() -> Step:
    net = nn.Conv1d(8, 4, 1).bfloat16()
    return trained(lambda _net: net(data()[:, :, None]).float().square().mean(), region=partial(brain, enabled=False))
