"""Sizes that no machine holds, and values of no meaning, are refused by arithmetic, in a sentence."""

from dataclasses import fields, is_dataclass

import pytest

from mezzotint.errors import ConfigError
from mezzotint.models.gpt import GPT
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.recipes.catalog import RECIPES
from mezzotint.training.config import DERIVED, RunConfig, check_resumable, with_settings
from mezzotint.training.sizes import check_size, num_parameters

PLAIN = RunConfig(recipe="r")
KEYS = [
    f"{section.name}.{key.name}"
    for section in fields(PLAIN)
    if is_dataclass(getattr(PLAIN, section.name))
    for key in fields(getattr(PLAIN, section.name))
    if (section.name, key.name) not in DERIVED
] + ["seed", "device", "policy"]
HOSTILE = ["nan", "inf", "-1", "1e30", "true", "'x'", "[1]", "{x=1}", "1" + "0" * 400, "'" + "y" * 5000 + "'", "''"]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_takes_hostile_values_or_refuses_them_in_a_sentence(key: str) -> None:
    for value in HOSTILE:
        try:
            with_settings(PLAIN, [f"{key}={value}"])
        except ConfigError as error:
            text = str(error)
            assert "\n" not in text
            assert len(text) < 800  # 200 of the value, and the names that are known


@pytest.mark.parametrize(
    "settings",
    [
        ["model.dim=1000000000"],
        ["model.num_layers=1000000000"],
        ["model.ffn_dim=1000000000000"],
        ["train.batch_size=1000000000"],
        ["model.block_size=1000000000000"],
    ],
)
def test_more_than_the_machine_has_is_refused_with_both_numbers(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"at least .* GiB of memory, this machine has .* GiB"):
        check_size(with_settings(PLAIN, settings))


def test_the_number_of_parameters_is_that_of_the_model() -> None:
    shape = GPTConfig(num_layers=2, num_heads=2, dim=16, ffn_dim=24, is_head_tied=False)
    matrices = sum(p.numel() for p in GPT(shape).parameters() if p.dim() > 1)
    assert num_parameters(shape, shape.vocab_size) == matrices


@pytest.mark.parametrize("name", ["tiny-1m", "demo", "small-10m"])
def test_small_recipes_fit(name: str) -> None:
    check_size(RECIPES[name]())


@pytest.mark.parametrize(
    "setting",
    ["train.steps=9", "train.batch_size=9", "seed=9", "policy=float32", "model.dim=64", "optimizer.eps=1e-3"],
)
def test_what_decides_the_numbers_may_not_change_before_a_resume(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"c: {setting.partition('=')[0]} is .* and was "):
        check_resumable(PLAIN, with_settings(PLAIN, [setting]), "c")


@pytest.mark.parametrize("setting", ["train.save_every=9", "train.keep_checkpoints=9", "train.sample_prompt=x"])
def test_what_decides_no_number_may_change(setting: str) -> None:
    check_resumable(PLAIN, with_settings(PLAIN, [setting]), "c")
