"""The configuration: TOML there and back, single settings, and one sentence for everything that is wrong."""

from dataclasses import fields, is_dataclass, replace

import pytest

from mezzotint.data.config import DataConfig
from mezzotint.errors import ConfigError
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.recipes.catalog import RECIPES
from mezzotint.training.config import (
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    from_toml,
    to_toml,
    with_settings,
)

OTHER = RunConfig(
    recipe='with "quotes" and ä',
    policy="fp16-mixed, scaling=dynamic(initial=1024)",
    seed=7,
    device="cpu",
    model=GPTConfig(
        block_size=32, num_layers=3, num_heads=6, dim=24, ffn_dim=11, dropout=0.25, is_head_tied=False,
        rope_base=5e5, loss_chunk_rows=9,
    ),
    data=DataConfig(source=("a b.txt", "c"), tokenizer="bpe", vocab_size=999, validation_share=0.2, max_bytes=12),
    optimizer=OptimizerConfig(
        name="sgd", learning_rate=0.5, weight_decay=0.0, beta1=0.8, beta2=0.99, eps=1e-6, momentum=0.5,
        max_grad_norm=0.0,
    ),
    schedule=ScheduleConfig(warmup_steps=3, decay="linear", final_share=0.0),
    train=TrainConfig(
        steps=5, batch_size=2, accumulate=3, evaluate_every=4, evaluate_batches=6, save_every=7, keep_checkpoints=9,
        sample_tokens=0, sample_prompt="x\n\\", compile=True,
    ),
)  # fmt: skip


def leaves(config) -> dict:
    return {
        f.name: leaves(getattr(config, f.name)) if is_dataclass(getattr(config, f.name)) else getattr(config, f.name)
        for f in fields(config)
    }


def test_every_field_of_the_example_differs_from_its_default() -> None:
    """Otherwise the identity below could hold for a field that is never written."""
    plain, other = leaves(RunConfig(recipe="")), leaves(OTHER)
    same = [
        f"{section}.{name}"
        for section, part in other.items()
        for name, value in (part.items() if isinstance(part, dict) else [("", part)])
        if value == (plain[section][name] if isinstance(part, dict) else plain[section])
    ]
    assert same == ["model.vocab_size"]


@pytest.mark.parametrize("config", [OTHER, *(make() for make in RECIPES.values())], ids=lambda config: config.recipe)
def test_print_then_parse_is_identity(config: RunConfig) -> None:
    assert from_toml(to_toml(config), "config.toml") == config


def test_what_a_file_leaves_out_has_its_default_and_its_name() -> None:
    assert from_toml("[train]\nsteps = 3\n", "runs/mine.toml") == RunConfig(
        recipe="mine", train=replace(TrainConfig(), steps=3)
    )


def test_settings_take_the_type_of_their_field() -> None:
    config = with_settings(
        RunConfig(recipe="r"),
        [
            "train.steps=7",
            "optimizer.learning_rate=1",
            "train.compile=true",
            "policy=bf16-mixed",
            'data.source=["a", "b"]',
            "train.sample_prompt=12",
        ],
    )
    assert config.train.steps == 7
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.train.compile is True
    assert config.policy == "bf16-mixed"
    assert config.data.source == ("a", "b")
    assert config.train.sample_prompt == "12"
    assert with_settings(config, ["data.source=one.txt"]).data.source == ("one.txt",)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.steps", ["no '='", "train.steps=100"]),
        ("train.stepz=3", ["train.stepz", "train.steps"]),
        ("learning_rate=3", ["learning_rate", "optimizer.learning_rate"]),
        ("train=3", ["train is a section", "train.steps"]),
        ("train.steps=five", ["train.steps='five'", "whole number"]),
        ("train.steps=1.5", ["train.steps=1.5", "whole number"]),
        ("train.steps=true", ["whole number"]),
        ("train.steps=0", ["train.steps=0", "at least 1"]),
        ("train.compile=1", ["true or false"]),
        ("optimizer.learning_rate=-0.1", ["learning_rate=-0.1", "more than 0"]),
        ("optimizer.learning_rate=nan", ["learning_rate"]),
        ("optimizer.name=adam", ["adamw"]),
        ("optimizer.beta1=1.0", ["beta1=1.0", "below 1"]),
        ("schedule.decay=cosin", ["cosine"]),
        ("model.dim=30", ["dim=30", "num_heads=4"]),
        ("model.vocab_size=3", ["unknown setting model.vocab_size"]),
        ("data.source=[1]", ["data.source", "list of texts"]),
        ("data.tokenizer=words", ["bytes or bpe"]),
        ("policy=fp17", ["fp17"]),
        ("device=gpu", ["device=gpu", "cuda"]),
        ("seed=-1", ["seed=-1"]),
    ],
)
def test_a_wrong_setting_gets_one_sentence(setting: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(RunConfig(recipe="r"), [setting])
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


@pytest.mark.parametrize("text", ["x = = 1", "[train]\nsteps = 1\nsteps = 2", "nothing = 1", "[nowhere]\nx = 1"])
def test_a_wrong_file_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        from_toml(text, "mine.toml")
