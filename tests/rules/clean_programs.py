"""Programs that are right and look as if they were not: no rule may warn."""

from collections.abc import Callable

import torch
from programs_of_rules import brain, data, half, parts, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

Step = Callable[[], object]


def masks_of_minus_infinity() -> Step:
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)

    def loss(net: nn.Module) -> Tensor:
        h = net(data())
        scores = (h @ h.t()).masked_fill(mask, float("-inf"))
        return (scores.softmax(-1) @ h).float().square().mean()

    return trained(loss, region=half, is_scaled=True)


def masks_of_finfo() -> Step:
    def loss(net: nn.Module) -> Tensor:
        h = net(data())
        scores = h @ h.t()
        scores = scores.masked_fill(torch.eye(6, dtype=torch.bool), torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ h).float().square().mean()

    return trained(loss, region=half, is_scaled=True)


def first_steps_overflow_while_the_scale_is_sought() -> Step:
    net, optimizer, scaler = parts(init_scale=2.0**40)

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def accumulation_at_a_boundary() -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        for micro in range(3):
            with half():
                loss = F.mse_loss(net(data()).float(), torch.zeros(6, 4)) / 3
            scaler.scale(loss).backward()
            if micro == 2:
                scaler.unscale_(optimizer)
                clip_grad_norm_(net.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=False)

    return step


def generator_and_critic() -> Step:
    generator, for_generator, scaler = parts(width=8, out=8)
    critic, for_critic, _ = parts(width=8, out=1)

    def step() -> None:
        with half():
            fake = generator(data())
            loss = critic(fake.detach()).float().mean() - critic(data()).float().mean()
        for_critic.zero_grad()
        scaler.scale(loss).backward()
        with half():
            other = -critic(fake).float().mean()
        for_generator.zero_grad()
        scaler.scale(other).backward(inputs=list(generator.parameters()))
        scaler.step(for_critic)
        scaler.step(for_generator)
        scaler.update()

    return step


def two_scalers() -> Step:
    one, first, first_scaler = parts()
    two, second, second_scaler = parts(init_scale=4.0)

    def step() -> None:
        for net, optimizer, scaler in ((one, first, first_scaler), (two, second, second_scaler)):
            with half():
                loss = net(data()).float().square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def timesteps_within_the_format() -> Step:
    def loss(net: nn.Module) -> Tensor:
        t = torch.randint(0, 200, (6, 8)).to(torch.bfloat16)
        return net(t / 200).float().square().mean()

    return trained(loss)


def token_counts_divide_the_loss() -> Step:
    def loss(net: nn.Module) -> Tensor:
        mask = torch.rand(600, 4) > 0.2
        values = net(data(600)).float().square() * mask
        return values.sum() / mask.sum()

    return trained(loss)


def labels_are_large_integers() -> Step:
    def loss(net: nn.Module) -> Tensor:
        return F.mse_loss(net(data()).float(), torch.randint(0, 5000, (6, 4)).float() / 5000)

    return trained(loss)


def checkpointed_in_both_modes() -> Step:
    def loss(net: nn.Module) -> Tensor:
        x = data().requires_grad_(True)
        return (
            (checkpoint(net, x, use_reentrant=True) + checkpoint(net, x, use_reentrant=False)).float().square().mean()
        )

    return trained(loss, region=half, is_scaled=True)


def float32_island() -> Step:
    def loss(net: nn.Module) -> Tensor:
        h = net(data())
        with torch.autocast("cpu", enabled=False):
            h = h.float()
            gram = h.t() @ h
        return gram.square().mean()

    return trained(loss)


def stochastic_rounding() -> Step:
    torch.manual_seed(0)
    net = nn.Linear(8, 4).to(torch.bfloat16)

    class Rounded(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self) -> None:
            for weight in net.parameters():
                exact = weight.float() - 1e-4 * weight.grad.float()
                noise = torch.randint(0, 1 << 16, exact.shape, dtype=torch.int32)
                weight.copy_(((exact.view(torch.int32) + noise) & -65536).view(torch.float32))

    optimizer = Rounded(net.parameters(), {})

    def step() -> None:
        net(data().to(torch.bfloat16)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def evaluation_between_steps() -> Step:
    train = trained(lambda net: net(data()).float().square().mean())
    net, _, _ = parts()

    def step() -> None:
        train()
        net.eval()
        with torch.inference_mode(), brain():
            net(data()).softmax(-1).argmax(-1)
        net.train()

    return step


def losses_are_logged() -> Step:
    total = torch.zeros(())
    net, optimizer, _ = parts()

    def step() -> None:
        with brain():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total.add_(loss.detach())
        f"{total.item():.3f} {torch.stack([w.grad.norm() for w in net.parameters()]).norm():.3f}"

    return step


def dropout_and_layer_norm() -> Step:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(30, 8), nn.LayerNorm(8), nn.Dropout(0.2), nn.Linear(8, 30))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)

    def step() -> None:
        ids = torch.randint(0, 30, (4, 9))
        with brain():
            loss = F.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def gradients_are_hooked_and_checked() -> Step:
    net, optimizer, scaler = parts()
    for weight in net.parameters():
        weight.register_hook(lambda grad: grad.clamp(-1e4, 1e4))

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        assert all(torch.isfinite(weight.grad).all() for weight in net.parameters())
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return step


def scale_taken_off_by_hand() -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        with half():
            loss = net(data()).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        inverse = 1.0 / scaler.get_scale()
        for weight in net.parameters():
            weight.grad.mul_(inverse)
        clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return step


def sum_of_logits_inside_the_range() -> Step:
    return trained(lambda net: net(data()).sum(1).float().square().mean(), region=half, is_scaled=True)


PROGRAMS = {
    name: value
    for name, value in list(globals().items())
    if callable(value) and getattr(value, "__module__", None) == __name__ and not name.startswith("_")
}
