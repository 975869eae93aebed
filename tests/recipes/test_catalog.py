"""Every recipe builds, and is the size that its name says."""

import re
from dataclasses import replace

import pytest
import torch

from mezzotint.errors import ConfigError
from mezzotint.models.gpt import GPT
from mezzotint.recipes.catalog import RECIPES, find_recipe
from mezzotint.training.config import from_toml, to_toml

SIZES = {"m": 1e6, "b": 1e9}


def size(name: str) -> int:
    config = find_recipe(name)
    vocab_size = 256 if config.data.tokenizer == "bytes" else config.data.vocab_size
    with torch.device("meta"):
        return GPT(replace(config.model, vocab_size=vocab_size)).num_parameters


@pytest.mark.parametrize("name", RECIPES)
def test_is_named_and_described(name: str) -> None:
    config = find_recipe(name)
    assert config.recipe == name
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "demo"])
def test_has_the_size_in_its_name(name: str) -> None:
    number, unit = re.fullmatch(r"\w+-(\d+)([mb])", name).groups()
    assert size(name) == pytest.approx(int(number) * SIZES[unit], rel=0.08)


@pytest.mark.parametrize("name", RECIPES)
def test_has_the_size_in_its_description(name: str) -> None:
    number, unit = re.match(r"([\d.]+)([MB]) parameters", RECIPES[name].__doc__).groups()
    # a last digit may be rounded by a half
    last = 10 ** -len(number.partition(".")[2]) * SIZES[unit.lower()]
    assert size(name) == pytest.approx(float(number) * SIZES[unit.lower()], abs=0.6 * last, rel=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_reads_back_from_its_file(name: str) -> None:
    assert from_toml(to_toml(find_recipe(name)), "config.toml") == find_recipe(name)


def test_an_unknown_name_far_from_all_gets_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe("zzzz\n")
    assert all(name in str(caught.value) for name in RECIPES)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean tiny-1m"):
        find_recipe("tiny1m")
