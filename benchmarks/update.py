"""One AdamW update of 50 million weights: time in torch's fused float32 step.

    python benchmarks/update.py --threads 1

The unit is `torch.optim.AdamW(fused=True)` on float32 weights, stepped in the same rounds. Ours are the engine's open,
step and close on bfloat16 weights with finite float32 gradients: in one pass, and as the optimizer's own step between
conversions, with `fused=True` and without. Peers own bfloat16 weights and gradients, as they demand; what they need:
`pip install torchao torch-optimi`.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

import harness
import peers
from mezzotint.engine import fused_update
from mezzotint.engine.weights import ShadowedWeights, cast_parameters, keep_gradients_float32
from mezzotint.policy.policy import Update

UPDATES = {"float32 masters": Update.MASTER, "stochastic": Update.STOCHASTIC, "Kahan": Update.KAHAN}


def shapes(width: int, num_layers: int, vocabulary: int) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of a small language model, norms and biases included."""
    yield (vocabulary, width)
    for _ in range(num_layers):
        yield from ((width,), (3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,))
    yield (width,)


class Weights(nn.Module):
    def __init__(self, of_shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=generator) * 0.02 for shape in of_shapes]
        self.all = nn.ParameterList(nn.Parameter(tensor) for tensor in tensors)

    def give_gradients(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        for parameter in self.all:
            parameter.grad = (torch.randn(parameter.shape, generator=generator) * 1e-3).to(dtype)


@contextmanager
def optimizers_own_step(is_wanted: bool) -> Iterator[None]:
    """Keep the one pass from being taken."""
    can_step = fused_update.can_step
    if is_wanted:
        fused_update.can_step = lambda *_: False
    try:
        yield
    finally:
        fused_update.can_step = can_step


def float32_step(of_shapes: list[tuple[int, ...]], **options: bool) -> Callable[[], object]:
    model = Weights(of_shapes)
    model.give_gradients(torch.float32)
    return AdamW(model.parameters(), lr=1e-4, **options).step


def engine_step(
    of_shapes: list[tuple[int, ...]], update: Update, *, is_one_pass: bool, **options: bool
) -> Callable[[], object]:
    model = Weights(of_shapes)
    originals = cast_parameters([model], torch.bfloat16)
    keep_gradients_float32(model.parameters())
    part = ShadowedWeights(AdamW(model.parameters(), lr=1e-4, **options), update, originals, seed=0)
    model.give_gradients(torch.float32)

    def step() -> None:
        with optimizers_own_step(not is_one_pass):
            part.open()
            part.step()
            part.close(stepped=True)

    return step


def hand_written_step(of_shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Return the loop that people write: gradients to float32 masters, a step, masters to bfloat16 weights."""
    model = Weights(of_shapes)
    stored = [parameter.detach().bfloat16() for parameter in model.all]
    grads = [torch.randn_like(weight) for weight in stored]
    masters = list(model.parameters())
    optimizer = AdamW(masters, lr=1e-4, fused=True)

    @torch.no_grad()
    def step() -> None:
        for grad, master in zip(grads, masters, strict=True):
            master.grad = grad.float()
        optimizer.step()
        for weight, master in zip(stored, masters, strict=True):
            weight.copy_(master)

    return step


def peer_steps(of_shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], object]]:
    def bfloat16_parameters() -> list[nn.Parameter]:
        model = Weights(of_shapes).bfloat16()
        model.give_gradients(torch.bfloat16)
        return list(model.parameters())

    found: dict[str, Callable[[], object]] = {}
    with peers.optional("torchao"):
        from torchao.optim import _AdamW

        found["torchao, stochastic"] = _AdamW(bfloat16_parameters(), lr=1e-4, bf16_stochastic_round=True).step
    with peers.optional("optimi"):
        import optimi

        kahan: Optimizer = optimi.AdamW(bfloat16_parameters(), lr=1e-4, weight_decay=1e-2, kahan_sum=True)
        found["optimi, Kahan"] = kahan.step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=15)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=13)
    parser.add_argument("--vocabulary", type=int, default=16_384)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    facts = harness.machine() | peers.versions()
    chosen = list(shapes(args.width, args.layers, args.vocabulary))
    count = sum(Tensor.numel(torch.empty(shape, device="meta")) for shape in chosen)
    contestants = {
        "torch, float32, fused": float32_step(chosen, fused=True),
        "torch, float32": float32_step(chosen),
    }
    for name, update in UPDATES.items():
        for how, options in (("fused", {"fused": True}), ("default", {})):
            contestants[f"one pass, {name}, {how}"] = engine_step(chosen, update, is_one_pass=True, **options)
            contestants[f"optimizer's own, {name}, {how}"] = engine_step(chosen, update, is_one_pass=False, **options)
    contestants["hand-written, float32 masters, fused"] = hand_written_step(chosen)
    contestants |= peer_steps(chosen)
    timings = harness.interleave(contestants, rounds=args.rounds)
    rows = [[t.name, f"{t.ratio:.2f} ± {t.ratio_spread:.2g}", f"{t.median_seconds * 1e3:.1f}"] for t in timings]
    title = f"{count:,} weights in {len(chosen)} tensors, {args.threads} threads"
    table = harness.markdown_table(["update", "in torch's fused float32 steps", "ms"], rows)
    print(f"\n{title}\n{table}")
    if args.record:
        print(harness.write_record(args.record, "update", {title: table}, timings, facts))


if __name__ == "__main__":
    main()
