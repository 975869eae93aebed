"""More programs that break a rule and that do not, as in `programs_of_rules`: gradients that are missing, decisions."""

from collections.abc import Callable
from functools import partial

import torch
from programs_of_rules import Step, brain, data, half, parts, trained
from torch import Tensor, nn
from torch.nn import functional as F

# steps without gradients


def _masked(empty: Tensor | None, *, is_caught: bool = False) -> Step:
    """Return a step whose loss is `empty` in every second step; None keeps the graph."""
    net, optimizer, scaler = parts()
    count = [0]

    def step() -> None:
        count[0] += 1
        optimizer.zero_grad()
        with half():
            prediction = net(data())
        loss = F.mse_loss(prediction.float(), torch.ones(6, 4))
        if count[0] % 2 == 0:
            loss = prediction.float().sum() * 0 if empty is None else empty.clone().requires_grad_()
        scaler.scale(loss).backward()
        try:
            scaler.step(optimizer)
        except AssertionError:
            if not is_caught:
                raise
        scaler.update()

    return step


def bad_mz237() -> Step:
    return _masked(torch.zeros(()))


def bad_mz237_full() -> Step:
    return _masked(torch.full((), 0.5))


def bad_mz237_detached() -> Step:
    net, optimizer, scaler = parts()

    def step() -> None:
        optimizer.zero_grad()
        with half():
            features = net(data()).detach()
        weight = torch.ones(4, requires_grad=True)
        scaler.scale((features.float() * weight).mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def bad_mz237_replaced_parameters() -> Step:
    """The optimizer holds the parameters from before the model was cast."""
    net, _, _ = parts()
    optimizer = torch.optim.SGD([nn.Parameter(weight.detach().clone()) for weight in net.parameters()], lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            loss = net(data()).float().square().mean()
        loss.backward()
        optimizer.step()

    return step


def bad_mz237_frozen_by_mistake() -> Step:
    net, optimizer, _ = parts()
    head = nn.Linear(4, 1)

    def step() -> None:
        with torch.no_grad(), brain():
            h = net(data())
        head(h.float()).square().mean().backward()
        optimizer.step()

    return step


def good_mz237() -> Step:
    return _masked(None)


def good_mz237_skipped() -> Step:
    net, optimizer, scaler = parts()
    count = [0]

    def step() -> None:
        count[0] += 1
        optimizer.zero_grad()
        with half():
            loss = net(data()).float().square().mean()
        if count[0] == 2:
            return
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def good_mz237_unused_head() -> Step:
    net, _, _ = parts()
    unused = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW([*net.parameters(), *unused.parameters()])

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            loss = net(data()).float().square().mean()
        loss.backward()
        optimizer.step()

    return step


def good_mz237_frozen() -> Step:
    net, optimizer, _ = parts()
    for weight in net[0].parameters():
        weight.requires_grad_(False)

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            loss = net(data()).float().square().mean()
        loss.backward()
        optimizer.step()

    return step


# skipped steps


def _skipping(loss_of, *, scale: float = 256.0) -> Step:
    net, optimizer, scaler = parts(init_scale=scale)
    count = [0]

    def step() -> None:
        count[0] += 1
        optimizer.zero_grad()
        with half():
            prediction = net(data())
        scaler.scale(loss_of(prediction.float(), count[0])).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def bad_mz238() -> Step:
    """Every second batch has no valid element."""
    return _skipping(lambda out, count: (out.square().mean(-1) * (count % 2)).sum() / (6 * (count % 2)))


def bad_mz238_loss() -> Step:
    return _skipping(lambda out, count: out.square().mean() / torch.tensor(float(count % 2)))


def bad_mz238_root_of_zero() -> Step:
    return _skipping(lambda out, _count: (out - out.detach()).square().sum(-1).sqrt().mean() + out.square().mean())


def bad_mz238_distance_to_itself() -> Step:
    return _skipping(lambda out, count: (out * (count % 2)).square().sum(-1).pow(0.5).mean())


def good_mz238() -> Step:
    return _skipping(lambda out, count: (out.square().mean(-1) * (count % 2)).sum() / max(1, 6 * (count % 2)))


def good_mz238_search() -> Step:
    return _skipping(lambda out, _count: out.square().mean(), scale=2.0**30)


def good_mz238_one_search() -> Step:
    return _skipping(lambda out, _count: out.square().sum(), scale=2.0**17)


def good_mz238_guarded_root() -> Step:
    return _skipping(lambda out, _count: (out.square().sum(-1) + 1e-6).sqrt().mean())


# inference tensors


def _rollout(mode, *, is_cloned: bool = False) -> Step:
    body, optimizer, _ = parts()
    head = nn.Linear(4, 3)

    def step() -> None:
        with mode(), brain():
            hidden = body(data())
        hidden = hidden.clone() if is_cloned else hidden
        with brain():
            loss = head(hidden).float().square().mean()
        loss.backward()
        optimizer.step()

    optimizer.add_param_group({"params": list(head.parameters())})
    return step


def bad_mz262() -> Step:
    return _rollout(torch.inference_mode)


def bad_mz262_product() -> Step:
    with torch.inference_mode():
        table = torch.randn(6, 4)
    return trained(lambda net: (net(data()).float() * table).mean())


def bad_mz262_matmul() -> Step:
    with torch.inference_mode():
        table = torch.randn(4, 4)

    return trained(lambda net: (net(data()) @ table).mean(), region=partial(brain, enabled=False))


def bad_mz262_method() -> Step:
    with torch.inference_mode():
        table = torch.randn(6, 4)

    return trained(lambda net: net(data()).float().mul(table).mean())


def good_mz262() -> Step:
    return _rollout(torch.no_grad)


def good_mz262_cloned() -> Step:
    return _rollout(torch.inference_mode, is_cloned=True)


def good_mz262_added() -> Step:
    """A sum needs nothing of its operands in backward."""
    with torch.inference_mode():
        table = torch.randn(6, 4)
    return trained(lambda net: (net(data()).float() + table).mean())


# one-element activations, internal tables, log-probabilities


def good_mz201_one_output_of_one_sample() -> Step:
    net, optimizer, _ = parts(out=1)

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            value = net(data(1))
        value.float().square().mean().backward()
        optimizer.step()

    return step


def good_mz201_value_head() -> Step:
    net, optimizer, _ = parts(out=1)

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            value = torch.sigmoid(net(data(1))).squeeze()
        F.mse_loss(value.float(), torch.tensor(0.5)).backward()
        optimizer.step()

    return step


def good_mz201_pooled() -> Step:
    net, optimizer, _ = parts(out=1)

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            value = net(data(5)).mean(0, keepdim=True)
        (value.float() - 1).square().sum().backward()
        optimizer.step()

    return step


def good_mz201_one_logit() -> Step:
    net, optimizer, _ = parts(out=1)

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            logit = net(data(1))[0, 0]
        F.binary_cross_entropy_with_logits(logit.float(), torch.tensor(1.0)).backward()
        optimizer.step()

    return step


def bad_mz201_one_sample() -> Step:
    net, optimizer, _ = parts(out=1)

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            loss = net(data(1)).mul(1.0).abs().sum()
        loss.float().backward()
        optimizer.step()

    return step


def _ctc(dtype: torch.dtype) -> Step:
    torch.manual_seed(0)
    net = nn.Linear(8, 20)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        with brain():
            logits = net(torch.randn(30, 2, 8))
        logits = logits.to(dtype)
        logp = logits - logits.logsumexp(-1, keepdim=True)
        sizes = torch.full((2,), 30), torch.full((2,), 5)
        F.ctc_loss(logp.float(), torch.randint(1, 20, (2, 5)), *sizes).backward()
        optimizer.step()

    return step


def bad_mz202_by_logsumexp() -> Step:
    return _ctc(torch.bfloat16)


def good_mz202_by_logsumexp() -> Step:
    return _ctc(torch.float32)


# grids


def _gridded(lines_of) -> Step:
    """Return a step that samples at positions which `lines_of` makes."""
    return trained(lambda net: net(data()).float().square().mean() + lines_of().float().square().mean())


def bad_mz271() -> Step:
    return _gridded(lambda: torch.linspace(-1, 1, 512, dtype=torch.bfloat16))


def bad_mz271_fractions() -> Step:
    return _gridded(lambda: torch.arange(0, 1, 1 / 1000, dtype=torch.bfloat16))


def bad_mz271_cast() -> Step:
    return _gridded(lambda: (torch.arange(1000) / 1000).to(torch.bfloat16).view(10, 100))


def bad_mz271_times() -> Step:
    return _gridded(lambda: torch.linspace(0, 1, 5000).half())


def bad_mz271_affine() -> Step:
    theta = torch.eye(2, 3, dtype=torch.bfloat16)[None]
    return _gridded(lambda: F.affine_grid(theta, [1, 1, 640, 640], align_corners=False))


def bad_mz271_meshgrid() -> Step:
    def lines() -> Tensor:
        xs, ys = torch.meshgrid(torch.linspace(0, 1, 700), torch.linspace(0, 1, 700), indexing="ij")
        return xs.to(torch.bfloat16) + ys.to(torch.bfloat16)

    return _gridded(lines)


def good_mz271() -> Step:
    return _gridded(lambda: torch.linspace(-1, 1, 512))


def good_mz271_few() -> Step:
    return _gridded(lambda: torch.linspace(0, 0.1, 12, dtype=torch.bfloat16))


def good_mz271_exact() -> Step:
    return _gridded(lambda: (torch.arange(0, 256, 2) / 256).to(torch.bfloat16))


def good_mz271_sines() -> Step:
    return _gridded(lambda: torch.outer(torch.arange(900.0), torch.rand(4)).sin().to(torch.bfloat16))


def good_mz271_inputs_of_a_network() -> Step:
    x = torch.linspace(-1, 1, 1000).view(-1, 1).expand(-1, 8)
    return trained(lambda net: net(x).float().square().mean())


# decisions


def _routed(choose) -> Step:
    torch.manual_seed(0)
    gate, experts = nn.Linear(8, 32, bias=False), nn.Parameter(torch.randn(32, 8))
    nn.init.normal_(gate.weight, std=0.01)
    optimizer = torch.optim.SGD([*gate.parameters(), experts], lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        scores = gate(data(128))
        loss = choose(scores, experts).float().square().mean()
        loss.backward()
        optimizer.step()

    return step


def bad_mz272() -> Step:
    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        weight, chosen = scores.softmax(-1).to(torch.bfloat16).topk(4)
        return weight[..., None].float() * experts[chosen]

    return _routed(choose)


def bad_mz272_argmax() -> Step:
    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        chosen = torch.sigmoid(scores.to(torch.bfloat16)).argmax(-1)
        return experts[chosen] * scores.mean()

    return _routed(choose)


def bad_mz272_sort() -> Step:
    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        order = scores.softmax(-1).half().sort(dim=-1, descending=True).indices[:, :2]
        return experts[order].sum(1) * scores.mean()

    return _routed(choose)


def bad_mz272_nearest() -> Step:
    """The nearest entry of a code book, by distances that were rounded."""

    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        distances = (scores[:, None, :8] - experts[None] * 0.01).square().sum(-1) + 1
        return experts[distances.to(torch.bfloat16).argmin(-1)] * scores.mean()

    return _routed(choose)


def bad_mz272_threshold() -> Step:
    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        probabilities = torch.sigmoid(scores).to(torch.bfloat16)
        return scores * (probabilities > 0.5 + 1e-3)

    return _routed(choose)


def good_mz272() -> Step:
    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        weight, chosen = scores.softmax(-1).topk(4)
        return weight.to(torch.bfloat16)[..., None].float() * experts[chosen]

    return _routed(choose)


def good_mz272_accuracy() -> Step:
    """Figures for a log."""

    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        labels = torch.zeros(128, dtype=torch.int64)
        rounded = scores.softmax(-1).to(torch.bfloat16)
        with torch.no_grad():
            (rounded.argmax(-1) == labels).float().mean().item()
            (rounded.topk(3).indices == labels[:, None]).any(-1).float().mean().item()
        return scores

    return _routed(choose)


def good_mz272_clear_choice() -> Step:
    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        clear = torch.zeros_like(scores).scatter(1, torch.arange(128)[:, None] % 32, 1.0)
        return experts[clear.to(torch.bfloat16).argmax(-1)] * scores.mean()

    return _routed(choose)


def good_mz272_sampled() -> Step:
    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        with torch.no_grad(), brain():
            token = torch.multinomial((scores @ torch.ones(32, 32)).softmax(-1), 1)
        return experts[token[:, 0]] * scores.mean()

    return _routed(choose)


def good_mz272_relu() -> Step:
    def choose(scores: Tensor, experts: Tensor) -> Tensor:
        rounded = scores.to(torch.bfloat16)
        return scores * (rounded > 0)

    return _routed(choose)


# cancellation


def _subtracted(compute, dtype: torch.dtype, **options) -> Step:
    def loss(net: nn.Module) -> Tensor:
        h = net(data(64))
        return h.float().square().mean() + 1e-3 * compute(h.float(), dtype).float().square().mean()

    return trained(loss, **options)


def _window_sums(h: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        totals = (h.detach() + 2).to(dtype).cumsum(0)
    return totals[1:] - totals[:-1]


def _distances(h: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = (h + 5).to(dtype), (h.flip(0) + 5).to(dtype)
    with torch.autocast("cpu", enabled=False):
        return (a * a).sum(-1)[:, None] + (b * b).sum(-1)[None] - 2 * (a @ b.t())


def _cdist(h: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        a, b = (h + 5).to(dtype), (h.flip(0) * 1.1 + 5).to(dtype)
        return torch.cdist(a[:40], b[1:30], compute_mode="use_mm_for_euclid_dist")


def _centred(h: Tensor, dtype: torch.dtype) -> Tensor:
    h = (h * 0.2 + 30).to(dtype)
    return h - h.mean(0)


def _times(h: Tensor, dtype: torch.dtype) -> Tensor:
    return (h + 1000).to(dtype) - torch.full((64, 4), 1000.5).to(dtype)


def bad_mz273() -> Step:
    return _subtracted(_window_sums, torch.bfloat16)


def bad_mz273_distances() -> Step:
    return _subtracted(_distances, torch.bfloat16)


def bad_mz273_cdist() -> Step:
    return _subtracted(_cdist, torch.bfloat16)


def bad_mz273_centred() -> Step:
    return _subtracted(_centred, torch.bfloat16)


def bad_mz273_timestamps() -> Step:
    return _subtracted(_times, torch.bfloat16)


def good_mz273() -> Step:
    return _subtracted(_window_sums, torch.float32)


def good_mz273_distances() -> Step:
    return _subtracted(_distances, torch.float32)


def good_mz273_centred() -> Step:
    return _subtracted(_centred, torch.float32)


def good_mz273_residual() -> Step:
    return trained(lambda net: (net(data()) - data()[:, :4].to(torch.bfloat16)).float().square().mean())


def good_mz273_straight_through() -> Step:
    def loss(net: nn.Module) -> Tensor:
        h = net(data())
        return (h + (h.round() - h).detach()).float().square().mean()

    return trained(loss)


def good_mz273_softmax_by_hand() -> Step:
    def loss(net: nn.Module) -> Tensor:
        h = net(data())
        e = (h - h.amax(-1, keepdim=True)).exp()
        return (e / e.sum(-1, keepdim=True)).float().square().mean()

    return trained(loss)


# numbers read from scaled gradients


def _grad_norm(net: nn.Module) -> Tensor:
    return torch.stack([weight.grad.norm() for weight in net.parameters()]).norm()


def _read(read: Callable[[nn.Module, torch.amp.GradScaler], object], *, is_unscaled: bool = False) -> Step:
    """Return a step that reads something from its gradients before the scaler steps."""
    net, optimizer, scaler = parts(init_scale=1024.0)

    def step() -> None:
        optimizer.zero_grad()
        with half():
            loss = net(data()).float().square().mean()
        scaler.scale(loss).backward()
        if is_unscaled:
            scaler.unscale_(optimizer)
        with torch.no_grad():
            read(net, scaler)
        scaler.step(optimizer)
        scaler.update()

    return step


def bad_mz239() -> Step:
    return _read(lambda net, _: _grad_norm(net).item())


def bad_mz239_largest() -> Step:
    return _read(lambda net, _: max(float(weight.grad.abs().max()) for weight in net.parameters()))


def bad_mz239_sum_of_squares() -> Step:
    return _read(lambda net, _: sum(weight.grad.square().sum().item() for weight in net.parameters()) ** 0.5)


def bad_mz239_trust_ratio() -> Step:
    return _read(lambda net, _: [float(w.grad.norm() / (w.norm() + 1e-6)) for w in net.parameters()])


def bad_mz239_foreach() -> Step:
    def read(net: nn.Module, _: object) -> float:
        return float(torch.nn.utils.get_total_norm([weight.grad for weight in net.parameters()]))

    return _read(read)


def good_mz239() -> Step:
    return _read(lambda net, _: _grad_norm(net).item(), is_unscaled=True)


def good_mz239_divided() -> Step:
    return _read(lambda net, scaler: float(_grad_norm(net) / scaler.get_scale()))


def good_mz239_divided_by_the_number() -> Step:
    return _read(lambda net, _: float(_grad_norm(net) / 1024.0))


def good_mz239_gradients_divided() -> Step:
    def read(net: nn.Module, _: object) -> float:
        return float(torch.stack([(weight.grad * (1 / 1024)).norm() for weight in net.parameters()]).norm())

    return _read(read)


def good_mz239_clipped() -> Step:
    return _read(lambda net, _: float(nn.utils.clip_grad_norm_(net.parameters(), 1.0)), is_unscaled=True)


def good_mz239_finite() -> Step:
    return _read(lambda net, _: bool(torch.isfinite(_grad_norm(net))))


def good_mz239_cosine() -> Step:
    def read(net: nn.Module, _: object) -> float:
        a, b = (weight.grad.flatten()[:4] for weight in list(net.parameters())[:2])
        return float((a * b).sum() / (a.norm() * b.norm()))

    return _read(read)


def good_mz239_weights() -> Step:
    return _read(lambda net, _: [float(weight.norm()) for weight in net.parameters()])
