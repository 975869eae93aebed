"""Programs behind published rows of other models: Hugging Face's, of the shapes that a row states.

The published programs are others' (litgpt, NVIDIA's examples, pytorch/examples), so differences between the programs
count as errors too; a book's GPT-2 and torchtitan's models are written as they are there. Attention is unfused where
theirs was. A forward pass alone is run as its one source did (stas00/ml-engineering, torch-compile-bench.py): without
gradients, labels and checkpoints, with the cache of keys and values.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
import transformers.masking_utils

from plan_programs import gpt2_by_hand, torchtitan_graph

LLAMA = re.compile(r"L(\d+) d(\d+) h(\d+) kv(\d+) ffn(\d+) vocab(\d+) seq(\d+)")
CARDS = {
    "A100": "A100-SXM-40GB", "H100-96GB(95 GB stated)": "H100", "RTX3090Ti": "RTX3090Ti", "V100": "V100-SXM2-16GB",
}  # fmt: skip
MODES = {"fp32", "tf32", "pure-bf16", "amp-bf16", "amp-fp16"}
SCOPES = {"fwd", "fwd_bwd", "train_step"}
BERT = {
    "vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
    "intermediate_size": 4096,
}  # fmt: skip
GPT2 = {"vocab_size": 50257, "n_positions": 1024}


@dataclass(frozen=True)
class Program:
    """What a row ran: `kind` of model, its configuration as sorted pairs, and how it was trained."""

    kind: str
    config: tuple[tuple[str, object], ...]
    card: str
    batch: int
    accumulation: int
    length: int
    mode: str
    scope: str
    is_checkpointed: bool
    is_compiled: bool
    is_fused: bool

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.batch * self.accumulation


def program_of(row: dict[str, str], scope: str) -> Program | None:
    """Return the program of a row; None where there is none here."""
    model, batch = row["model"], re.match(r"(\d+)(?: x accum (\d+))?", row["batch_per_gpu"])
    compiled, checkpointed = row["torch_compile"], row["activation_checkpointing"]
    if (
        batch is None or row["gpus"] != "1" or row["dtype_mode"] not in MODES or scope not in SCOPES
        or compiled not in ("no", "yes", "yes (graph trainer)") or checkpointed not in ("no", "full")
    ):  # fmt: skip
        return None
    shape = LLAMA.match(row["architecture_details"])
    length, config = 0, {}
    if shape is not None:
        layers, d, heads, kv, ffn, vocab, length = (int(one) for one in shape.groups())
        kind = "qwen3" if model.startswith("Qwen3") else "llama"
        if row["source"].startswith("pytorch/torchtitan"):
            kind = f"torchtitan-{kind}"
        config = {
            "num_hidden_layers": layers, "hidden_size": d, "num_attention_heads": heads, "num_key_value_heads": kv,
            "intermediate_size": ffn, "vocab_size": vocab, "max_position_embeddings": length,
            # Llama 3.2 1B and Qwen3 1.7B share embedding and head
            "tie_word_embeddings": model in ("Llama-3.2-1B", "Qwen3-1.7B"),
        }  # fmt: skip
    elif model.startswith("ResNet-50"):
        kind = "resnet"
    elif model.startswith(("BERT-large", "HF BERT-large")):
        length = int(re.search(r"seq(\d+)", row["architecture_details"])[1]) if "SQuAD" not in model else 384
        kind = "bert-squad" if "SQuAD" in model else "bert-mlm"
        config = BERT | {"attn_implementation": "eager"}  # before 2023 there was no other
    elif model.startswith("GPT-2 small"):
        kind, length, config = "gpt2-by-hand", 1024, {"vocab_size": 50257}
    elif model.startswith("GPT-2 124M"):
        kind, length = "gpt2", 1024
        config = GPT2 | {"attn_implementation": "eager"}
    elif model == "HF GPT2-medium":
        kind, length = "gpt2", 512
        config = GPT2 | {"n_layer": 24, "n_embd": 1024, "n_head": 16, "attn_implementation": "eager"}
    else:
        return None
    return Program(
        kind=kind, config=tuple(sorted(config.items())), card=CARDS.get(row["gpu"], row["gpu"]), batch=int(batch[1]),
        accumulation=int(batch[2] or 1), length=length, mode=row["dtype_mode"], scope=scope,
        is_checkpointed=checkpointed == "full", is_compiled=compiled != "no",
        is_fused="used" in row["optimizer"],
    )  # fmt: skip


def make_step(program: Program) -> Callable[[], None]:
    """Return a function that makes one step on `cuda`."""
    config = dict(program.config)
    if program.kind.startswith("torchtitan"):
        return torchtitan_graph.make_step(program.kind, config, program.batch, program.scope)
    is_forward = program.scope == "fwd"
    make = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**config, use_cache=is_forward)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**config, head_dim=128, use_cache=is_forward)),
        "gpt2-by-hand": gpt2_by_hand.GPT,
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**config, use_cache=False)),
        "bert-mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**config)),
        "bert-squad": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**config)),
        "resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000)),
    }[program.kind]
    is_last_axis = program.kind == "resnet" and program.mode.startswith("amp")
    with torch.device("cuda"):
        model = make()
    if program.mode == "pure-bf16":
        model.to(torch.bfloat16)
    if is_last_axis:
        model.to(memory_format=torch.channels_last)
    model.train(not is_forward)
    if program.is_checkpointed and not is_forward:
        model.activation_checkpointing_enable()
    called = torch.compile(model) if program.is_compiled else model
    if program.kind == "resnet":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=program.is_fused or None)
    low = {"amp-bf16": torch.bfloat16, "amp-fp16": torch.float16}.get(program.mode)
    scaler = torch.amp.GradScaler("cuda", enabled=low is torch.float16)

    def forward() -> None:
        with torch.no_grad():
            called(input_ids=_inputs(program, config, is_last_axis)["input_ids"])

    def step() -> None:
        for _ in range(program.accumulation):
            with torch.autocast("cuda", dtype=low or torch.bfloat16, enabled=low is not None):
                found = called(**_inputs(program, config, is_last_axis))
            loss = found if isinstance(found, torch.Tensor) else found.loss
            scaler.scale(loss / program.accumulation if program.accumulation > 1 else loss).backward()
        if program.scope == "train_step":
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()

    return forward if is_forward else step


def _inputs(program: Program, config: dict[str, object], is_last_axis: bool) -> dict[str, torch.Tensor]:
    batch = program.batch
    if program.kind == "resnet":
        images = torch.randn(batch, 3, 224, 224, device="cuda")
        if is_last_axis:
            images = images.contiguous(memory_format=torch.channels_last)
        return {"pixel_values": images, "labels": torch.zeros(batch, dtype=torch.long, device="cuda")}
    tokens = torch.randint(0, int(config["vocab_size"]), (batch, program.length), device="cuda")
    if program.kind == "bert-squad":
        place = torch.zeros(batch, dtype=torch.long, device="cuda")
        return {"input_ids": tokens, "start_positions": place, "end_positions": place}
    return {"input_ids": tokens, "labels": tokens}
