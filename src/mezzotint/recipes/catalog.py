"""The named runs, from a minute on a laptop to a billion parameters. A recipe returns a full configuration."""

from collections.abc import Callable
from difflib import get_close_matches

from mezzotint.data.config import DataConfig
from mezzotint.errors import ConfigError, shortened
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.training.config import OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig


def tiny_1m() -> RunConfig:
    """1M parameters, bytes: a run of about a minute on two cores."""
    return RunConfig(
        recipe="tiny-1m",
        model=GPTConfig(num_layers=4, num_heads=4, dim=144, ffn_dim=384, block_size=128),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        train=TrainConfig(steps=300, batch_size=16, evaluate_every=100, save_every=100),
    )


def demo() -> RunConfig:
    """3M parameters, bytes: what `make demo` trains, seed by seed, in every precision."""
    return RunConfig(
        recipe="demo",
        model=GPTConfig(num_layers=4, num_heads=4, dim=256, ffn_dim=640, block_size=256),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        train=TrainConfig(steps=60, batch_size=8, evaluate_every=30, evaluate_batches=8, save_every=30),
    )


def small_10m() -> RunConfig:
    """10.7M parameters, bytes: an evening's toy on two cores."""
    return RunConfig(
        recipe="small-10m",
        model=GPTConfig(num_layers=6, num_heads=6, dim=384, ffn_dim=1024, block_size=256),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=100),
        data=DataConfig(max_bytes=64_000_000),
        train=TrainConfig(steps=2000, batch_size=8, evaluate_every=200, save_every=200),
    )


def base_124m() -> RunConfig:
    """124M parameters, the shape of GPT-2 small, BPE: for one GPU."""
    return RunConfig(
        recipe="base-124m",
        model=GPTConfig(num_layers=12, num_heads=12, dim=768, ffn_dim=2048, block_size=1024),
        optimizer=OptimizerConfig(learning_rate=6e-4),
        schedule=ScheduleConfig(warmup_steps=700),
        data=DataConfig(tokenizer="bpe", vocab_size=50304, max_bytes=10**12, validation_share=0.01),
        train=TrainConfig(steps=20_000, batch_size=16, accumulate=32, evaluate_every=500, save_every=1000),
    )


def large_350m() -> RunConfig:
    """355M parameters, the shape of GPT-2 medium, BPE: for one large GPU."""
    return RunConfig(
        recipe="large-350m",
        model=GPTConfig(num_layers=24, num_heads=16, dim=1024, ffn_dim=2752, block_size=1024),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        schedule=ScheduleConfig(warmup_steps=1000),
        data=DataConfig(tokenizer="bpe", vocab_size=50304, max_bytes=10**12, validation_share=0.01),
        train=TrainConfig(steps=50_000, batch_size=8, accumulate=64, evaluate_every=500, save_every=1000),
    )


def xl_1b() -> RunConfig:
    """1.0B parameters, BPE: for a GPU of 80 GB."""
    return RunConfig(
        recipe="xl-1b",
        model=GPTConfig(num_layers=18, num_heads=16, dim=2048, ffn_dim=5632, block_size=2048, is_head_tied=True),
        optimizer=OptimizerConfig(learning_rate=2e-4),
        schedule=ScheduleConfig(warmup_steps=2000),
        data=DataConfig(tokenizer="bpe", vocab_size=50304, max_bytes=10**12, validation_share=0.01),
        train=TrainConfig(steps=100_000, batch_size=4, accumulate=64, evaluate_every=1000, save_every=1000),
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny-1m": tiny_1m,
    "demo": demo,
    "small-10m": small_10m,
    "base-124m": base_124m,
    "large-350m": large_350m,
    "xl-1b": xl_1b,
}


def find_recipe(name: str) -> RunConfig:
    """Return the configuration of the recipe called `name`; raise ConfigError with the nearest names."""
    make = RECIPES.get(name)
    if make is None:
        near = get_close_matches(name, RECIPES, n=2, cutoff=0.4) or list(RECIPES)
        raise ConfigError(
            f"unknown recipe {shortened(repr(name))}; did you mean {' or '.join(near)}? (a TOML file ends in .toml)"
        )
    return make()
