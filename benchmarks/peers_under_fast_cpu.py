"""Programs of Fabric, Lightning, Accelerate and the Hugging Face Trainer, unchanged, inside and outside `fast_cpu`.

    python benchmarks/peers_under_fast_cpu.py --simulate-avx2 --record benchmarks/records

Each trains a few steps in its own bfloat16 mode on the CPU. Peers that are not installed are left out and named.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import harness
import mezzotint as mz
from cpu_lowprec import AVX2
from mezzotint.lowprec.calls import call_counts

STEPS = 4
X = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 10, (512,), generator=torch.Generator().manual_seed(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 10))


def fabric() -> float:
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", precision="bf16-mixed", devices=1)
    network = model()
    network, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters()))
    for _ in range(STEPS):
        loss = F.cross_entropy(network(X), Y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def accelerate() -> float:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    network = model()
    network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    for _ in range(STEPS):
        loss = F.cross_entropy(network(X), Y)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def lightning() -> float:
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = model()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            self.last = F.cross_entropy(self.network(batch[0]), batch[1])
            return self.last

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(X.repeat(STEPS, 1), Y.repeat(STEPS)), 512))
    return module.last.item()


def hugging_face() -> float:
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = BertConfig(vocab_size=200, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=256, num_labels=4)  # fmt: skip
    network = BertForSequenceClassification(config)
    ids = torch.randint(0, 200, (32 * STEPS, 64), generator=torch.Generator().manual_seed(2))
    data = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": index % 4} for index, row in enumerate(ids)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, bf16=True, use_cpu=True, max_steps=STEPS, per_device_train_batch_size=32,
                                      report_to=[], save_strategy="no", disable_tqdm=True)  # fmt: skip
        return float(Trainer(network, arguments, train_dataset=data).train().training_loss)


PROGRAMS: dict[str, Callable[[], float]] = {
    "Lightning Fabric": fabric,
    "Lightning Trainer": lightning,
    "Accelerate": accelerate,
    "Hugging Face Trainer": hugging_face,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    harness.add_options(parser, rounds=3)
    parser.add_argument("--simulate-avx2", action="store_true")
    options = parser.parse_args()
    if options.simulate_avx2 and os.environ.get("DNNL_MAX_CPU_ISA") != "AVX2":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2})
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows, results = [], {}
    for name, program in PROGRAMS.items():
        losses: dict[str, float] = {}

        def quiet(kind: str, program: Callable[[], float] = program, losses: dict[str, float] = losses) -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                losses[kind] = program()

        def ours(quiet: Callable[[str], None] = quiet) -> None:
            with mz.fast_cpu():
                quiet("ours")

        try:
            before = call_counts()
            inside, outside = harness.interleave(
                {"ours": ours, "torch": lambda quiet=quiet: quiet("torch")}, rounds=options.rounds, warmup=1
            )
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        used = sum(number - before.get(key, 0) for key, number in call_counts().items())
        results[name] = (inside, outside, losses)
        rows.append([name, f"{outside.ratio:.1f} ± {outside.ratio_spread:.1f}", f"{losses['torch']:.6f}",
                     f"{losses['ours']:.6f}", str(used)])  # fmt: skip
    table = harness.markdown_table(
        ["program", "time outside / inside fast_cpu", "last loss outside", "inside", "operations served"], rows
    )
    print(table)
    if options.record:
        facts = {**harness.machine(), "limited_to": "AVX2" if options.simulate_avx2 else None}
        name = "peers_under_fast_cpu_avx2" if options.simulate_avx2 else "peers_under_fast_cpu"
        print(harness.write_record(options.record, name, {"bfloat16 programs": table}, results, facts))


if __name__ == "__main__":
    main()
