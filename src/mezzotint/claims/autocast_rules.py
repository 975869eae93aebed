"""Claims on what autocast does: asked of the installed torch, of its CUDA rules on a simulated GPU."""

import warnings
from collections import Counter
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from mezzotint.claims.claim import Answer, Basis, Claim, Family, Figures, Verdict
from mezzotint.engine.engine import Engine
from mezzotint.ghost.autocast import autocast_snapshot
from mezzotint.ghost.session import ghost_gpu
from mezzotint.policy.autocast import Rule, Snapshot
from mezzotint.torch_internals import flags
from mezzotint.trace.record import Kind, Phase, Trace
from mezzotint.trace.recorder import Recorder

_REFERENCE = "https://docs.pytorch.org/docs/stable/amp.html"
_PROTECTED = (Rule.FLOAT32, Rule.OUTPUT)
_PRODUCTS = ("mm", "addmm", "bmm")


@cache
def _snapshot() -> Snapshot:
    return autocast_snapshot(torch.bfloat16)


def _transformer_step() -> Trace:
    """One step of a small transformer under CUDA's autocast to bfloat16, on a simulated H100."""
    with ghost_gpu("H100"):
        model = nn.Sequential(
            nn.Embedding(512, 64),
            nn.TransformerEncoderLayer(64, 4, 256, batch_first=True),
            nn.Linear(64, 512),
        ).to("cuda")
        optimizer = torch.optim.AdamW(model.parameters())
        with Recorder(has_ranges=False) as recorder:
            ids = torch.randint(0, 512, (2, 33), device="cuda")
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return recorder.trace()


def _two_formats() -> Figures:
    trace, flops, wide = _transformer_step(), Counter[str](), set[str]()
    counts = trace.counts()
    for call in trace.calls:
        if call.kind is Kind.COMPUTE and call.format and call.phase in (Phase.FORWARD, Phase.BACKWARD):
            flops[call.format] += counts[call.index] * (call.flops or 0)
            if call.format == "float32":
                wide.add(call.name)
    return {"share_of_flops": flops["bfloat16"] / sum(flops.values()), "float32": sorted(wide)}


def _judge_two_formats(found: Figures) -> Answer:
    is_true = found["share_of_flops"] > 0.9 and "native_layer_norm" in found["float32"]
    return Answer(
        verdict=Verdict.TRUE if is_true else Verdict.FALSE,
        figure=f"a transformer's step by CUDA's rules: {found['share_of_flops']:.2%} of the arithmetic in "
        f"bfloat16; in "
        f"float32 {', '.join(name for name in found['float32'] if 'backward' not in name)}",
    )


def _three_parts() -> Figures:
    torch_state = torch.get_rng_state()
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    engine = Engine(model, torch.optim.AdamW(model.parameters()), policy="bf16-mixed")
    with Recorder(has_ranges=False) as recorder:
        with engine.forward():
            loss = model(torch.randn(4, 8)).float().square().mean()
        engine.backward(loss)
        engine.update()
    torch.set_rng_state(torch_state)
    trace = recorder.trace()
    formats = {
        str(phase): sorted(
            {call.format or "" for call in trace.calls if call.phase is phase and call.name in _PRODUCTS}
        )
        for phase in (Phase.FORWARD, Phase.BACKWARD)
    }
    update = {call.format for call in trace.calls if call.phase is Phase.OPTIMIZER and call.kind is Kind.COMPUTE}
    return {
        **formats,
        "loss": str(loss.dtype).removeprefix("torch."),
        "gradients": sorted({one.grad_dtype or "" for one in trace.parameters}),
        "update": sorted(filter(None, update)),
    }


def _judge_three_parts(found: Figures) -> Answer:
    is_true = found["forward"] == found["backward"] == ["bfloat16"]
    is_true = is_true and found["loss"] == "float32" and found["gradients"] == found["update"] == ["float32"]
    return Answer(
        verdict=Verdict.TRUE if is_true else Verdict.FALSE,
        figure=f"a recorded step: products of forward in {', '.join(found['forward'])}, the loss in "
        f"{found['loss']}, products "
        f"of backward in {', '.join(found['backward'])}, gradients and update in {', '.join(found['update'])}",
    )


def _safe_operations() -> Figures:
    snapshot = _snapshot()
    protected = {device: {n for n in snapshot.names(device) if snapshot.rule_of(device, n) in _PROTECTED}
                 for device in ("cuda", "cpu")}  # fmt: skip
    return {
        "cuda": len(protected["cuda"]),
        "not_on_cpu": len(protected["cuda"] - protected["cpu"]),
        "softmax_on_cpu": snapshot.parts["cpu"]["softmax"],
        "mean_on_cuda": snapshot.parts["cuda"]["mean"],
        "sum_on_cuda": snapshot.parts["cuda"]["sum"],
    }


def _judge_safe_operations(found: Figures) -> Answer:
    is_partial = found["not_on_cpu"] > 0 or not found["mean_on_cuda"].endswith("float32")
    return Answer(
        verdict=Verdict.CONDITIONAL if is_partial else Verdict.TRUE,
        condition="the device is a GPU, and only by a list of names" if is_partial else "",
        figure=f"CUDA's list has {found['cuda']} operations that run in or give float32; {found['not_on_cpu']} of "
        f"them the CPU's "
        f"autocast leaves as they are ({found['softmax_on_cpu'].strip('_')}); and on CUDA `x.sum()` is float32 "
        f"and `x.mean()` bfloat16",
    )


def _default_dtype() -> Figures:
    return {device: str(torch.get_autocast_dtype(device)).removeprefix("torch.") for device in ("cuda", "cpu")}


def _judge_default_dtype(found: Figures) -> Answer:
    return Answer(
        verdict=Verdict.TRUE if found["cuda"] == "bfloat16" else Verdict.FALSE,
        figure=f"without dtype=, torch.autocast takes {found['cuda']} on CUDA and {found['cpu']} on the CPU",
    )


def _cross_entropy() -> Figures:
    parts = _snapshot().parts
    return {device: parts[device]["cross_entropy"] for device in ("cuda", "cpu")}


def _judge_cross_entropy(found: Figures) -> Answer:
    is_low = found["cuda"].startswith("_log_softmax bfloat16")
    return Answer(
        verdict=Verdict.FALSE if is_low else Verdict.TRUE,
        figure=f"for bfloat16 logits CUDA's rules give: {found['cuda']}"
        + ("; an explicit dtype inside exempts it. Pass logits.float()" if is_low else ""),
    )


def _half() -> Figures:
    """The dtypes of one layer with a norm under `model.half()` and under autocast, on a simulated GPU."""
    found: dict[str, str] = {}
    with ghost_gpu("V100"):
        for name in ("half", "autocast"):
            linear, norm = nn.Linear(64, 64).to("cuda"), nn.LayerNorm(64).to("cuda")
            x = torch.randn(4, 64, device="cuda")
            if name == "half":
                linear, norm, x = linear.half(), norm.half(), x.half()
            with torch.autocast("cuda", dtype=torch.float16, enabled=name == "autocast"):
                hidden = linear(x)
                normed = norm(hidden)
            normed.float().sum().backward()
            assert linear.weight.grad is not None
            for what, tensor in (
                ("weight", linear.weight), ("gradient", linear.weight.grad), ("product", hidden), ("norm", normed)
            ):  # fmt: skip
                found[f"{name}_{what}"] = str(tensor.dtype).removeprefix("torch.")
    return found | {"scaler": _scaler_on_half()}


def _scaler_on_half() -> str:
    """Return what the gradient scaler says of float16 weights."""
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()  # type: ignore[no-untyped-call]
    try:
        scaler.unscale_(optimizer)
    except ValueError as error:
        return str(error)
    return ""


def _judge_half(found: Figures) -> Answer:
    names = ("weight", "gradient", "product", "norm")
    differing = [name for name in names if found[f"half_{name}"] != found[f"autocast_{name}"]]
    refusal = f"; and the scaler refuses: {found['scaler']!r}" if found["scaler"] else ""
    return Answer(
        verdict=Verdict.FALSE if differing else Verdict.TRUE,
        figure=f"under autocast weights and their gradients stay {found['autocast_weight']} and layer norm gives "
        f"{found['autocast_norm']}, under half() all are {found['half_weight']}{refusal}",
    )


def _batch_norm() -> Figures:
    x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0)) + 3
    mean, mean_low = torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16)
    weights = torch.ones(8), torch.ones(8, dtype=torch.bfloat16)
    F.batch_norm(x.bfloat16(), mean, torch.ones(8), weights[0], weights[0] * 0, training=True, momentum=0.01)
    F.batch_norm(
        x.bfloat16(), mean_low, torch.ones(8).bfloat16(), weights[1], weights[1] * 0, training=True, momentum=0.01
    )
    exact = x.double().mean(0) * 0.01
    return {
        "cuda": _snapshot().parts["cuda"]["batch_norm"],
        "error_float32_statistics": float(((mean.double() - exact) / exact).abs().max()),
        "error_bfloat16_statistics": float(((mean_low.double() - exact) / exact).abs().max()),
    }


def _judge_batch_norm(found: Figures) -> Answer:
    is_low = found["cuda"].startswith("native_batch_norm bfloat16")
    return Answer(
        verdict=Verdict.CONDITIONAL if is_low else Verdict.TRUE,
        condition="its weights and statistics are meant, not its input" if is_low else "",
        figure="autocast leaves batch norm's input in bfloat16 and its weights and statistics in float32; running "
        "means are "
        f"then right to {found['error_float32_statistics']:.1e}, in bfloat16 to "
        f"{found['error_bfloat16_statistics']:.1e}",
    )


def _hardware_check() -> Figures:
    found = {}
    for card in ("V100", "T4", "A100"):
        with ghost_gpu(card):
            found[card] = [
                torch.cuda.is_bf16_supported(),
                torch.cuda.is_bf16_supported(including_emulation=False),
            ]
    return found


def _judge_hardware_check(found: Figures) -> Answer:
    wrong = [card for card, (said, is_native) in found.items() if said != is_native]
    return Answer(
        verdict=Verdict.CONDITIONAL if wrong else Verdict.TRUE,
        condition="it is asked with including_emulation=False" if wrong else "",
        figure=f"torch.cuda.is_bf16_supported() is true on {' and '.join(wrong)}, which have no bfloat16 units; with "
        "including_emulation=False only on the A100"
        if wrong
        else "torch.cuda.is_bf16_supported() is true only where bfloat16 is native",
    )


def _silent_fallback() -> Figures:
    """What `torch.autocast("cuda")` does without a GPU: a process with one is made to look like one without."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autocast("cuda", dtype=torch.float16):
            is_enabled = torch.is_autocast_enabled("cuda")
            dtype = nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    return {"has_gpu": torch.cuda.is_available(), "is_enabled": is_enabled, "dtype": str(dtype).removeprefix("torch."),
            "num_warnings": len(caught)}  # fmt: skip


def _judge_silent_fallback(found: Figures) -> Answer:
    is_true = found["dtype"] == "float32" and found["has_gpu"] == found["is_enabled"]
    return Answer(
        verdict=Verdict.TRUE if is_true else Verdict.FALSE,
        figure=f"a linear layer on the CPU inside torch.autocast('cuda') gives {found['dtype']}, after "
        f"{found['num_warnings']} warning: a dry run on a laptop tests no mixed precision"
        if not found["has_gpu"]
        else "on a machine with a GPU it is enabled",
    )


def _tf32() -> Figures:
    return {
        "products": flags.allows_tf32_matmul(),
        "convolutions": flags.allows_tf32_convolution(),
        "precision": torch.get_float32_matmul_precision(),
    }


def _judge_tf32(found: Figures) -> Answer:
    products, convolutions = found["products"], found["convolutions"]
    is_some = convolutions and not products
    return Answer(
        verdict=Verdict.CONDITIONAL if is_some else Verdict.TRUE if products else Verdict.FALSE,
        condition="convolutions are meant" if is_some else "",
        figure=f"torch.backends.cuda.matmul.allow_tf32 is {products} (since torch 1.12), "
        f"torch.backends.cudnn.allow_tf32 {convolutions}",
    )


AUTOCAST_RULES = (
    Claim(
        name="two-formats",
        family=Family.TUTORIAL,
        text="Most operations run in a compact format, critical ones in float32",
        where=_REFERENCE,
        verdict=Verdict.TRUE,
        basis=Basis.SIMULATED,
        command="mezzotint audit --gpu H100 SCRIPT",
        measure=_two_formats,
        judge=_judge_two_formats,
    ),
    Claim(
        name="three-parts",
        family=Family.TUTORIAL,
        text="The loop has three parts: forward in the compact format, backward from a float32 loss, a float32 update",
        where="https://docs.pytorch.org/tutorials/recipes/recipes/amp_recipe.html",
        verdict=Verdict.TRUE,
        basis=Basis.ASKED,
        command="mezzotint audit --policy bf16-mixed SCRIPT",
        measure=_three_parts,
        judge=_judge_three_parts,
    ),
    Claim(
        name="safe-operations",
        family=Family.TUTORIAL,
        text="autocast picks the safe format for each operation",
        where=_REFERENCE,
        verdict=Verdict.CONDITIONAL,
        basis=Basis.SIMULATED,
        command="mezzotint policy",
        measure=_safe_operations,
        judge=_judge_safe_operations,
    ),
    Claim(
        name="hardware-check",
        family=Family.TUTORIAL,
        text="torch.cuda.is_bf16_supported() says whether to use bfloat16",
        where="https://discuss.pytorch.org/t/bfloat16-on-nvidia-v100-gpu/201629",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.SIMULATED,
        command="mezzotint doctor",
        measure=_hardware_check,
        judge=_judge_hardware_check,
    ),
    Claim(
        name="fallback",
        family=Family.TUTORIAL,
        text="Without a GPU, code for CUDA falls back to float32",
        where="tutorials that choose a device first",
        verdict=Verdict.TRUE,
        basis=Basis.ASKED,
        command="mezzotint audit --gpu A100 SCRIPT",
        measure=_silent_fallback,
        judge=_judge_silent_fallback,
    ),
    Claim(
        name="default-dtype",
        family=Family.INTERNET,
        text="torch.autocast('cuda') takes bfloat16",
        where="https://github.com/pytorch/pytorch/issues/105682",
        verdict=Verdict.FALSE,
        basis=Basis.ASKED,
        command="mezzotint audit SCRIPT",
        measure=_default_dtype,
        judge=_judge_default_dtype,
    ),
    Claim(
        name="cross-entropy",
        family=Family.INTERNET,
        text="Under CUDA's autocast, the cross entropy is computed in float32",
        where=f"{_REFERENCE}, which lists it",
        verdict=Verdict.FALSE,
        basis=Basis.SIMULATED,
        command="mezzotint policy cross_entropy",
        measure=_cross_entropy,
        judge=_judge_cross_entropy,
    ),
    Claim(
        name="half-is-autocast",
        family=Family.INTERNET,
        text="model.half() does what autocast does",
        where="https://discuss.pytorch.org/t/can-i-use-model-half-to-replace-autocast-when-doing-inference/127895",
        verdict=Verdict.FALSE,
        basis=Basis.SIMULATED,
        command="mezzotint audit --gpu V100 SCRIPT",
        measure=_half,
        judge=_judge_half,
    ),
    Claim(
        name="batch-norm",
        family=Family.INTERNET,
        text="Batch norm must stay in float32",
        where="https://discuss.pytorch.org/t/training-with-half-precision/11815",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.SIMULATED,
        command="mezzotint policy batch_norm",
        measure=_batch_norm,
        judge=_judge_batch_norm,
    ),
    Claim(
        name="tf32-default",
        family=Family.INTERNET,
        text="TF32 is on by default",
        where="https://dev-discuss.pytorch.org/t/pytorch-and-tensorfloat32/504, true until torch 1.11",
        verdict=Verdict.CONDITIONAL,
        basis=Basis.ASKED,
        command="mezzotint plan --gpu A100 SCRIPT",
        measure=_tf32,
        judge=_judge_tf32,
    ),
)
