"""Lightning's and Hugging Face's trainers, audited through their callbacks; their losses stay the same bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, about workers, loggers and accelerators


class Pairs(Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(8, generator=generator)
        return {"x": x, "labels": x[:4].argmax()}


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


def lightning_losses(callbacks: list, precision: str, folder: Path) -> list[float]:
    pytorch = pytest.importorskip("lightning.pytorch")
    losses: list[float] = []

    class Module(pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def training_step(self, batch, _index):
            loss = nn.functional.cross_entropy(self.net(batch["x"]).float(), batch["labels"])
            losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    trainer = pytorch.Trainer(
        max_steps=6, accelerator="cpu", devices=1, precision=precision, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(Pairs(), batch_size=4))
    return losses


@pytest.mark.slow
def test_lightning(tmp_path: Path):
    pytest.importorskip("lightning.pytorch")
    from mezzotint.auditing.lightning import AuditCallback

    callback = AuditCallback(steps=2, policy="bf16-mixed", report=tmp_path / "audit.html")
    watched = lightning_losses([callback], "bf16-mixed", tmp_path)
    assert watched == lightning_losses([], "bf16-mixed", tmp_path)
    assert callback.audit.result is not None
    assert len(callback.audit.result.trace.steps) == 2
    assert not [one for one in callback.audit.findings if one.severity != "info"], callback.audit.findings
    assert (tmp_path / "audit.html").stat().st_size > 1000
    modules = {call.module for call in callback.audit.result.trace.calls if call.name == "addmm"}
    assert modules == {"net.0", "net.2"}, modules


@pytest.mark.slow
def test_a_departure_ends_the_training(tmp_path: Path):
    pytest.importorskip("lightning.pytorch")
    from mezzotint.auditing.fitting import AuditFailedError
    from mezzotint.auditing.lightning import AuditCallback

    callback = AuditCallback(steps=1, policy="bf16-mixed", report=None, fail_on="error")
    with pytest.raises(AuditFailedError, match="MZ291"):
        lightning_losses([callback], "32-true", tmp_path)


def hugging_face_losses(callbacks: list, folder: Path) -> list[float]:
    transformers = pytest.importorskip("transformers")
    losses: list[float] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.net(x)
            loss = nn.functional.cross_entropy(logits.float(), labels)
            losses.append(loss.item())
            return {"loss": loss, "logits": logits}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, bf16=True, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=100, learning_rate=1e-2, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model=Model(), args=arguments, train_dataset=Pairs(), callbacks=callbacks)
    trainer.train()
    return losses


@pytest.mark.slow
def test_hugging_face(tmp_path: Path):
    pytest.importorskip("transformers")
    from mezzotint.auditing.transformers import AuditCallback

    callback = AuditCallback(steps=2, policy="bf16-mixed", report=tmp_path / "audit.html")
    watched = hugging_face_losses([callback], tmp_path)
    assert watched == hugging_face_losses([], tmp_path)
    assert callback.audit.result is not None
    assert len(callback.audit.result.trace.steps) == 2
    assert not [one for one in callback.audit.findings if one.severity != "info"], callback.audit.findings
