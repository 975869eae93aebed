"""Every recipe builds, and is the size that its name says."""

import re
from dataclasses import replace

import pytest
import torch

from mezzotint.errors import ConfigError
from mezzotint.models.gpt import GPT
from mezzotint.recipes.catalog import RECIPES, find_recipe

SIZES = {"m": 1e6, "b": 1e9}


@pytest.mark.parametrize("name", RECIPES)
def test_is_named_and_described(name: str) -> None:
    config = find_recipe(name)
    assert config.recipe == name
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "demo"])
def test_has_the_size_in_its_name(name: str) -> None:
    config = find_recipe(name)
    vocab_size = 256 if config.data.tokenizer == "bytes" else config.data.vocab_size
    with torch.device("meta"):
        model = GPT(replace(config.model, vocab_size=vocab_size))
    number, unit = re.fullmatch(r"\w+-(\d+)([mb])", name).groups()
    assert model.num_parameters == pytest.approx(int(number) * SIZES[unit], rel=0.08)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean tiny-1m"):
        find_recipe("tiny1m")
