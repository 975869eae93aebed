"""Claims on memory: of a small model on this machine, of recorded ones, and of GPUs what others have published."""

import statistics
from collections.abc import Sequence

from mezzotint.claims.claim import Answer, Basis, Claim, Family, Figures, Verdict


def _small_model() -> Figures:
    """Memory of a step of a 1M-parameter model and of its state under bf16-mixed, relative to float32."""
    import torch

    from mezzotint.engine.engine import Engine
    from mezzotint.models.gpt import GPT
    from mezzotint.models.gpt_config import GPTConfig
    from mezzotint.training.memory import measure_step, state_memory

    found = []
    for policy in ("float32", "bf16-mixed"):
        torch.manual_seed(0)
        config = GPTConfig(num_layers=4, num_heads=4, dim=144, ffn_dim=384, block_size=128)
        model = GPT(config)
        engine = Engine(model, torch.optim.AdamW(model.parameters()), policy=policy)
        ids = torch.randint(0, config.vocab_size, (4, 129))

        def forward(engine: Engine = engine, model: GPT = model, ids: torch.Tensor = ids) -> torch.Tensor:
            with engine.forward():
                loss: torch.Tensor = model(ids[:, :-1], ids[:, 1:])[1]
            return loss

        engine.backward(forward())
        engine.update()
        step = measure_step(forward, engine.backward, torch.device("cpu"))
        engine.update()
        state = state_memory(engine)
        found.append((step, state.weights_bytes + state.masters_bytes + state.optimizer_bytes))
    (plain, plain_state), (mixed, mixed_state) = found
    return {
        "activations": mixed.activations_bytes / plain.activations_bytes,
        "peak": (mixed.peak_bytes + mixed_state) / (plain.peak_bytes + plain_state),
        "state": mixed_state / plain_state,
        "model": "a 1M-parameter model",
    }


def _judge_half(found: Figures) -> Answer:
    is_half = found["peak"] < 0.55
    return Answer(
        verdict=Verdict.TRUE if is_half else Verdict.CONDITIONAL if found["activations"] < 0.55 else Verdict.FALSE,
        condition="" if is_half or found["activations"] >= 0.55 else "activations alone are meant",
        figure=f"{found['model']} under bf16-mixed: what waits for backward {found['activations']:.2f} of "
        f"float32's, weights and "
        f"optimizer states {found['state']:.2f}, the step's peak with them {found['peak']:.2f}",
    )


def _judge_half_on_gpus(found: Figures) -> Answer:
    def spread(ratios: Sequence[float]) -> str:
        middle = f"{statistics.median(ratios):.2f} of float32's peak in the median of {len(ratios)} published pairs"
        return f"{middle}, {min(ratios):.2f} to {max(ratios):.2f}"

    return Answer(
        verdict=Verdict.TRUE if max(found["train_steps"]) < 0.55 else Verdict.FALSE,
        figure=f"whole training steps: {spread(found['train_steps'])}; forward and backward alone: "
        f"{spread(found['without_update'])}",
    )


def _judge_never_more(found: Figures) -> Answer:
    largest, pairs = found["largest"], found["forward_only"]
    num_more = sum(ratio > 1 for ratio in pairs)
    return Answer(
        verdict=Verdict.FALSE if num_more else Verdict.TRUE,
        figure=f"{num_more} of {len(pairs)} published forward passes need more memory under autocast, up to "
        f"{largest['mixed']:.1f} GiB instead of {largest['plain']:.1f} ({largest['model']}, {largest['gpu']}): it "
        f"keeps casts of "
        "the weights beside them",
    )


MEMORY = (
    Claim(
        name="half-the-memory",
        family=Family.TUTORIAL,
        text="Mixed precision halves the memory",
        where="tutorials; https://pytorch.org/blog/what-every-user-should-know-about-mixed-precision-training-in-pytorch/",
        verdict=Verdict.FALSE,
        basis=Basis.MEASURED,
        command="mezzotint demo",
        measure=_small_model,
        judge=_judge_half,
        seconds=5,
    ),
    Claim(
        name="half-the-memory-on-gpus",
        family=Family.TUTORIAL,
        text="Mixed precision halves the memory of a GPU",
        where="tutorials",
        verdict=Verdict.FALSE,
        basis=Basis.PUBLISHED,
        command="mezzotint plan --gpu H100 SCRIPT",
        judge=_judge_half_on_gpus,
    ),
    Claim(
        name="never-more-memory",
        family=Family.INTERNET,
        text="autocast never needs more memory",
        where="https://github.com/pytorch/pytorch/issues/61173, which asks why it does",
        verdict=Verdict.FALSE,
        basis=Basis.PUBLISHED,
        command="mezzotint plan --gpu H100 SCRIPT",
        judge=_judge_never_more,
    ),
)
