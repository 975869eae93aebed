"""Claims on speed: of this machine where they are run, of recorded ones else; of GPUs what others have published."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from mezzotint.claims.claim import Answer, Basis, Claim, Family, Figures, Verdict
from mezzotint.hardware.devices import device_specs
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.efficiency import product_time

_CARDS = ("V100", "A100", "H100")


def _products(*formats: str) -> dict[str, Any]:
    """Return times of products relative to float32's on this CPU, over the layouts of a linear layer."""
    from mezzotint.hardware.measure import measure_matmul

    timings = measure_matmul("cpu", formats)
    return {"machine": _machine(), **{name: sorted(timings.ratios(name).values()) for name in formats}}


def _machine() -> str:
    import torch

    from mezzotint.hardware.probe import probe

    return f"{probe('cpu').name}, torch {torch.__version__}"


def _step_ratio(policy: str, rounds: int = 8) -> float:
    """Return the time of a training step under a policy over float32's, of a model of 1M parameters, in turns."""
    import torch

    from mezzotint.engine.engine import Engine
    from mezzotint.models.gpt import GPT
    from mezzotint.models.gpt_config import GPTConfig

    config = GPTConfig(num_layers=4, num_heads=4, dim=144, ffn_dim=384, block_size=128)
    engines = []
    for name in ("float32", policy):
        torch.manual_seed(0)
        model = GPT(config)
        engines.append((model, Engine(model, torch.optim.AdamW(model.parameters()), policy=name)))
    ids = torch.randint(0, config.vocab_size, (4, 129))
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds + 2):
        for (model, engine), taken in zip(engines, seconds, strict=True):
            start = time.perf_counter()
            with engine.forward():
                _, loss = model(ids[:, :-1], ids[:, 1:])
            engine.backward(loss)
            engine.update()
            taken.append(time.perf_counter() - start)
    return float(statistics.median(ours / theirs for theirs, ours in zip(*(one[2:] for one in seconds), strict=True)))


def _twice() -> Figures:
    return _products("bfloat16") | {"step": _step_ratio("bf16-mixed"), "model": "a 1M-parameter model"}


def _judge_twice(found: Figures) -> Answer:
    """Twice as fast is true where both products and steps are, on every processor that was measured."""
    products, step = 1 / statistics.median(found["bfloat16"]), 1 / found["step"]
    without = found.get("step_avx2")  # a processor without units for it
    conditions = [] if without is None or without < 1 else ["the processor computes it natively"]
    if step < 1.8:
        conditions.append("products are meant, not whole steps")
    verdict = Verdict.FALSE if products < 1.8 else Verdict.CONDITIONAL if conditions else Verdict.TRUE
    figure = (
        f"{found['machine']}: products in bfloat16 are {products:.1f} times as fast as in float32, a whole training "
        f"step of {found['model']} {step:.1f} times"
    )
    if without is not None:
        figure += f"; limited to AVX2, as most laptops are, torch's step takes {without:.0f} times float32's time"
    return Answer(
        verdict=verdict, condition=" and ".join(conditions) if verdict is Verdict.CONDITIONAL else "", figure=figure
    )


def _judge_twice_on_gpus(found: Figures) -> Answer:
    wide, tf32 = found["over_float32"], found["over_tf32"]
    is_twice = statistics.median(wide) >= 1.8
    is_all = is_twice and statistics.median(tf32) >= 1.8
    return Answer(
        verdict=Verdict.TRUE if is_all else Verdict.CONDITIONAL if is_twice else Verdict.FALSE,
        condition="it is compared with float32 without TF32" if is_twice and not is_all else "",
        figure=f"whole training steps, mixed against float32: {_spread(wide, found['float32_cards'])}; against TF32: "
        f"{_spread(tf32, found['tf32_cards'])}",
    )


def _spread(ratios: Sequence[float], cards: Mapping[str, int]) -> str:
    return (
        f"{statistics.median(ratios):.1f} times as fast in the median of {len(ratios)} published pairs, "
        f"{min(ratios):.2f} to {max(ratios):.1f} ({', '.join(f'{count} on {card}' for card, count in cards.items())})"
    )


def _judge_always_faster(found: Figures) -> Answer:
    slower: list[dict[str, Any]] = found["slower"]
    least = {(one["model"], one["gpu"]): one["speedup"] for one in sorted(slower, key=lambda one: -one["speedup"])}
    figure = f"{len(slower)} of {found['num_pairs']} published pairs of steps on GPUs are slower in mixed precision"
    if least:
        figure += f": {', '.join(f'{model} on {gpu} ({speedup:.2f})' for (model, gpu), speedup in least.items())}"
    return Answer(verdict=Verdict.FALSE if slower else Verdict.TRUE, figure=figure)


def _multiples() -> Figures:
    found = {}
    for card in _CARDS:
        times = [
            product_time(find_gpu(card), "float16", 8192, size, 768, itemsize_in=2, itemsize_out=2).seconds
            for size in (50257, 50304)
        ]
        found[card] = times[0] / times[1]
    return found


def _judge_multiples(found: Figures) -> Answer:
    is_slower = min(found.values()) > 1.1
    ratios = ", ".join(f"{ratio:.2f} on {card}" for card, ratio in found.items())
    return Answer(
        verdict=Verdict.CONDITIONAL if is_slower else Verdict.FALSE,
        condition="speed is meant; they compute other sizes too" if is_slower else "",
        figure=f"a vocabulary of 50257 instead of 50304 multiplies the time of GPT-2's last product by {ratios} "
        "(estimated, the factor fitted on published products)",
    )


def _judge_cpus(found: Figures) -> Answer:
    products, avx2 = statistics.median(found["bfloat16"]), found.get("step_avx2")
    is_native = products < 1
    figure = f"{found['machine']}: products take {products:.2f} of float32's time"
    if avx2 is not None:
        figure += f", and limited to AVX2, as most laptops are, a training step takes {avx2:.0f} times"
    return Answer(
        verdict=Verdict.CONDITIONAL if is_native else Verdict.TRUE,
        condition="they lack AVX512-BF16 or AMX" if is_native else "",
        figure=figure,
    )


def _float16_cpu() -> Figures:
    from mezzotint.lowprec.switch import fast_cpu

    stock = _products("float16")
    with fast_cpu("float16"):
        ours = _products("float16")
    return {"machine": stock["machine"], "torch": stock["float16"], "mezzotint": ours["float16"]}


def _judge_float16_cpu(found: Figures) -> Answer:
    stock, ours = statistics.median(found["torch"]), statistics.median(found["mezzotint"])
    is_slow = stock > 2
    is_repaired = is_slow and ours < 1.3
    return Answer(
        verdict=Verdict.CONDITIONAL if is_repaired else Verdict.TRUE if is_slow else Verdict.FALSE,
        condition="torch's own kernels compute it" if is_repaired else "",
        figure=f"{found['machine']}: torch's float16 products take {stock:.3g} times float32's time "
        f"({min(found['torch']):.3g} to {max(found['torch']):.3g}), mezzotint's {ours:.2f}",
    )


def _judge_every_device(found: Figures) -> Answer:
    stock = statistics.median(found["torch"])
    return Answer(
        verdict=Verdict.FALSE if stock > 1 else Verdict.TRUE,
        figure=f"{found['machine']}: torch's float16 products take {stock:.3g} times float32's time",
    )


def published_peaks() -> Figures:
    """Return the ratios of published peaks to bfloat16's, by card."""

    def ratios(first: str, second: str) -> dict[str, float]:
        return {
            spec.name: above / below
            for spec in device_specs()
            if (above := spec.peak_flops_per_second(first)) and (below := spec.peak_flops_per_second(second))
        }

    return {"float16": ratios("float16", "bfloat16"), "float8": ratios("float8_e4m3fn", "bfloat16")}


def _judge_float16_faster(found: Figures) -> Answer:
    ratios = found["float16"].values()
    return Answer(
        verdict=Verdict.FALSE if max(ratios) <= 1.01 else Verdict.CONDITIONAL,
        condition="" if max(ratios) <= 1.01 else f"the card is {max(found['float16'], key=found['float16'].get)}",
        figure=f"the published peaks are equal on all {len(ratios)} GPUs of our table that have both",
    )


def _judge_float8(found: Figures) -> Answer:
    peaks, products = found["float8"].values(), statistics.median(found["float8_e4m3fn"])
    is_on_gpus, is_on_cpus = min(peaks) > 1.5, products < 1
    return Answer(
        verdict=Verdict.CONDITIONAL if is_on_gpus and not is_on_cpus else Verdict.TRUE if is_on_gpus else Verdict.FALSE,
        condition="the device multiplies it natively" if is_on_gpus and not is_on_cpus else "",
        figure=f"{len(peaks)} GPUs of our table have {statistics.median(peaks):.1f} times bfloat16's peak; on a CPU "
        f"({found['machine']}) products take {products:.1f} times float32's time",
    )


SPEED = (
    Claim(
        name="twice-as-fast",
        family=Family.TUTORIAL,
        text="bfloat16 is about twice as fast",
        where="tutorials; https://pytorch.org/blog/what-every-user-should-know-about-mixed-precision-training-in-pytorch/",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.MEASURED,
        command="mezzotint bench --ops matmul",
        measure=_twice,
        judge=_judge_twice,
        seconds=20,
    ),
    Claim(
        name="twice-as-fast-on-gpus",
        family=Family.TUTORIAL,
        text="Mixed precision trains about twice as fast on a GPU",
        where="https://pytorch.org/blog/what-every-user-should-know-about-mixed-precision-training-in-pytorch/",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.PUBLISHED,
        command="mezzotint plan --gpu V100,A100 SCRIPT",
        judge=_judge_twice_on_gpus,
    ),
    Claim(
        name="always-faster",
        family=Family.INTERNET,
        text="Mixed precision is always faster on a GPU",
        where="https://github.com/pytorch/pytorch/issues/45420, which asks why not",
        verdict=Verdict.FALSE,
        basis=Basis.PUBLISHED,
        command="mezzotint plan --gpu H100 SCRIPT",
        judge=_judge_always_faster,
    ),
    Claim(
        name="multiples-of-8",
        family=Family.INTERNET,
        text="Tensor cores need dimensions that are multiples of 8",
        where="https://developer.nvidia.com/blog/tensor-ops-made-easier-in-cudnn/",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.PLANNED,
        command="mezzotint plan --gpu A100 SCRIPT",
        measure=_multiples,
        judge=_judge_multiples,
    ),
    Claim(
        name="float16-on-cpus",
        family=Family.INTERNET,
        text="float16 is useless on a CPU",
        where="https://discuss.pytorch.org/t/why-is-there-such-a-huge-performance-gap-between-bfloat16-float16-and-float32/219536",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.MEASURED,
        command="mezzotint bench --device cpu --ops matmul --formats float16",
        measure=_float16_cpu,
        judge=_judge_float16_cpu,
        seconds=10,
    ),
    Claim(
        name="float16-everywhere",
        family=Family.FORMATS,
        text="float16 is a fast format on every device",
        where="handbooks and forum answers",
        verdict=Verdict.FALSE,
        basis=Basis.MEASURED,
        command="mezzotint bench --device cpu --ops matmul --formats float16",
        measure=_float16_cpu,
        judge=_judge_every_device,
        seconds=10,
    ),
    Claim(
        name="cpus-have-no-bfloat16",
        family=Family.FORMATS,
        text="CPUs have no bfloat16",
        where="handbooks and forum answers",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.MEASURED,
        command="mezzotint doctor --device cpu",
        measure=lambda: _products("bfloat16"),
        judge=_judge_cpus,
        seconds=2,
    ),
    Claim(
        name="float16-is-faster",
        family=Family.FORMATS,
        text="float16 is faster than bfloat16 on a GPU",
        where="handbooks and forum answers",
        verdict=Verdict.FALSE,
        basis=Basis.TABLES,
        command="mezzotint doctor",
        measure=published_peaks,
        judge=_judge_float16_faster,
    ),
    Claim(
        name="float8-is-faster",
        family=Family.FORMATS,
        text="float8 is faster than bfloat16",
        where="handbooks and forum answers",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.MEASURED,
        command="mezzotint bench --device cpu --ops matmul --formats float8_e4m3fn",
        measure=lambda: _products("float8_e4m3fn") | {"float8": published_peaks()["float8"]},
        judge=_judge_float8,
        seconds=3,
    ),
)
