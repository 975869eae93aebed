"""Claims on loss scaling, and on weights that updates cannot reach."""

import torch
from torch import nn

from mezzotint.claims.claim import Answer, Basis, Claim, Family, Figures, Verdict
from mezzotint.engine.engine import Engine

_SCALE = 65536.0  # where torch's scaler begins


def _spread_of_gradients() -> torch.Tensor:
    """Gradients as they are spread in training: log-normal around 1e-6, over some ten decades."""
    exponents = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.5 - 6
    return (10.0**exponents).float()


def _lost(dtype: torch.dtype, scale: float = 1.0) -> float:
    gradients = _spread_of_gradients() * scale
    rounded = gradients.to(dtype)
    return float(((rounded == 0) | rounded.isinf()).float().mean())


def _judge_scaling(found: Figures) -> Answer:
    is_repaired = found["scaled"] < found["plain"] / 20
    return Answer(
        verdict=Verdict.TRUE if is_repaired else Verdict.FALSE,
        figure=f"of log-normal gradients around 1e-6, {found['plain']:.1%} become 0 in float16, {found['scaled']:.2%} "
        f"when scaled "
        f"by {_SCALE:.0f} first (0 or infinite)",
    )


def _judge_bfloat16_scaling(found: Figures) -> Answer:
    return Answer(
        verdict=Verdict.TRUE if found["bfloat16"] == 0.0 < found["float16"] else Verdict.FALSE,
        figure=f"of the same gradients {found['bfloat16']:.0%} become 0 in bfloat16, {found['float16']:.1%} in float16",
    )


def _overflows() -> Figures:
    """Torch's scaler through overflows without end, then one good step."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))  # makes its state
    count = 0
    while scaler.get_scale() > 0 and count < 1000:
        weight.grad = torch.full((3,), float("inf"))
        scaler.step(optimizer)
        scaler.update()
        count += 1
    optimizer.zero_grad()
    scaler.scale(weight.square().sum()).backward()  # type: ignore[no-untyped-call]
    scaler.step(optimizer)
    return {"num_overflows": count, "scale": scaler.get_scale(), "num_nan": int(weight.isnan().sum())}


def _judge_overflows(found: Figures) -> Answer:
    is_broken = found["scale"] == 0.0 and found["num_nan"] > 0
    return Answer(
        verdict=Verdict.FALSE if is_broken else Verdict.TRUE,
        figure=f"torch's scaler reaches {found['scale']:g} after {found['num_overflows']} overflows in a row, and "
        f"the next step, "
        f"which is finite, writes NaN into {found['num_nan']} of 3 weights; mezzotint's engine stops before, with "
        f"the "
        "tensor's name",
    )


def _clipping() -> Figures:
    """The norm that clipping sees before and after `unscale_`."""
    model = nn.Linear(4, 1)
    nn.init.constant_(model.weight, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 4)).mean()).backward()
    before = float(nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
    scaler.unscale_(optimizer)
    after = float(nn.utils.clip_grad_norm_(model.parameters(), float("inf")))
    return {"before": before, "after": after}


def _judge_clipping(found: Figures) -> Answer:
    factor = found["before"] / found["after"]
    return Answer(
        verdict=Verdict.FALSE if factor > 2 else Verdict.TRUE,
        figure=f"with a gradient scaler the norm is then {factor:.0f} times too large, so that everything is "
        f"clipped; call "
        "scaler.unscale_(optimizer) first",
    )


def weights_after_updates() -> Figures:
    """Where weights of 1 are after 20 AdamW steps of 0.001 each, by policy."""
    found = {}
    for policy in ("float32", "bf16-pure", "bf16-stochastic", "bf16-kahan", "bf16-master"):
        layer = nn.Linear(64, 16, bias=False)
        nn.init.ones_(layer.weight)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.0)
        engine = Engine(layer, optimizer, policy=policy, seed=0)
        for _ in range(20):
            with engine.forward():
                loss = layer(torch.ones(1, 64)).float().sum()
            engine.backward(loss)
            engine.update()
        found[policy] = round(float(layer.weight.detach().float().mean()), 5)
    return found


def _judge_weights(found: Figures) -> Answer:
    moved = {policy: 1 - value for policy, value in found.items()}
    wanted = moved["float32"]
    is_needed = moved["bf16-pure"] < 0.1 * wanted
    is_repaired = all(abs(moved[policy] / wanted - 1) < 0.25 for policy in ("bf16-stochastic", "bf16-kahan"))
    return Answer(
        verdict=Verdict.CONDITIONAL if is_needed and is_repaired else Verdict.TRUE if is_needed else Verdict.FALSE,
        condition="the optimizer rounds to nearest" if is_needed and is_repaired else "",
        figure=f"20 AdamW steps of 0.001 move weights of 1.0 by {wanted:.3f} in float32, by "
        f"{moved['bf16-pure']:.3f} in "
        f"bfloat16, by {moved['bf16-stochastic']:.3f} with stochastic rounding, {moved['bf16-kahan']:.3f} with Kahan "
        f"compensation, {moved['bf16-master']:.3f} with float32 masters",
    )


LOSS_SCALING = (
    Claim(
        name="loss-scaling",
        family=Family.TUTORIAL,
        text="A gradient scaler keeps float16's small gradients",
        where="arXiv 1710.03740",
        verdict=Verdict.TRUE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 2.9e-8*65536 --format float16",
        measure=lambda: {"plain": _lost(torch.float16), "scaled": _lost(torch.float16, _SCALE)},
        judge=_judge_scaling,
    ),
    Claim(
        name="bfloat16-scaling",
        family=Family.TUTORIAL,
        text="bfloat16 needs no gradient scaler",
        where="https://pytorch.org/blog/empowering-pytorch-on-intel-xeon-scalable-processors-with-bfloat16/",
        verdict=Verdict.TRUE,
        basis=Basis.COMPUTED,
        command="mezzotint formats 1e-20 --format bfloat16",
        measure=lambda: {"bfloat16": _lost(torch.bfloat16), "float16": _lost(torch.float16)},
        judge=_judge_bfloat16_scaling,
    ),
    Claim(
        name="master-weights",
        family=Family.TUTORIAL,
        text="The weights have to be kept in float32",
        where="arXiv 1710.03740",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.MEASURED,  # the same figures each time, but the first time loops are compiled for it
        command="mezzotint claims master-weights --run",
        measure=weights_after_updates,
        judge=_judge_weights,
        seconds=20,
    ),
    Claim(
        name="scaler-prevents-nan",
        family=Family.INTERNET,
        text="GradScaler prevents NaN",
        where="https://runebook.dev/en/docs/pytorch/amp",
        verdict=Verdict.FALSE,
        basis=Basis.COMPUTED,
        command="mezzotint claims scaler-prevents-nan",
        measure=_overflows,
        judge=_judge_overflows,
    ),
    Claim(
        name="clip-after-backward",
        family=Family.INTERNET,
        text="Gradients can be clipped right after backward",
        where="https://github.com/Lightning-AI/pytorch-lightning/issues/9330",
        verdict=Verdict.FALSE,
        basis=Basis.COMPUTED,
        command="mezzotint audit SCRIPT",
        measure=_clipping,
        judge=_judge_clipping,
    ),
)
