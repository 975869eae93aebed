"""A training run that is watched ends with the same bits, and its metrics say what the watch saw."""

import json
from pathlib import Path

import pytest
import torch

from mezzotint.recipes.catalog import find_recipe
from mezzotint.training.config import to_toml, with_settings
from mezzotint.training.loop import run_training
from mezzotint.training.rundir import RunDirectory
from mezzotint.training.tracker import NoTracker
from mezzotint.training.trainer import Trainer


class Notes:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def status(self, status) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


def train(folder: Path, policy: str, watch_every: int) -> tuple[list[dict], list[torch.Tensor], list[str]]:
    from mezzotint.data.tokens import open_corpus

    config = with_settings(
        find_recipe("tiny-1m"),
        [
            "train.steps=6", "train.batch_size=2", "model.block_size=32", "model.num_layers=1", "model.dim=32",
            "model.ffn_dim=64", "model.num_heads=2", "train.evaluate_every=100", "train.evaluate_batches=1",
            "train.sample_tokens=0", f'policy="{policy}"', f"train.watch_every={watch_every}", 'device="cpu"',
        ],
    )  # fmt: skip
    trainer = Trainer(config, open_corpus(config.data, block_size=config.model.block_size))
    reporter = Notes()
    with RunDirectory.create(folder, to_toml(config)) as run:
        run_training(trainer, run, reporter, resume=False, tracker=NoTracker())
        lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return lines, [weight.detach().clone() for weight in trainer.model.parameters()], reporter.notes


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["bf16-mixed", "fp16-mixed", "bf16-master", "bf16-stochastic", "bf16-pure"])
def test_watching_changes_nothing(tmp_path: Path, policy: str):
    plain, weights, _ = train(tmp_path / "plain", policy, 0)
    watched, same_weights, notes = train(tmp_path / "watched", policy, 2)
    for one, two in zip(weights, same_weights, strict=True):
        assert torch.equal(one, two)
    assert [line["step"] for line in watched if "watch" in line] == [2, 4, 6]
    for one, two in zip(plain, watched, strict=True):
        changing = ("seconds", "watch", "crc32")
        assert {k: v for k, v in one.items() if k not in changing} == {
            k: v for k, v in two.items() if k not in changing
        }
    figures = watched[-1]["watch"]["modules"]
    assert any(name.endswith("attention.qkv") for name in figures)
    assert len(json.dumps(watched[-1])) < 50_000
    assert any("rounded away" in note for note in notes) == (policy == "bf16-pure")
