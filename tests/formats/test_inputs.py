"""How inputs of products are rounded, as a value and as text."""

import pytest

from mezzotint.errors import FormatError, PolicyError
from mezzotint.formats.inputs import InputRounding, ScaleGroup
from mezzotint.policy.grammar import parse_products


def test_names_are_spelt_in_full_and_gradients_follow_inputs() -> None:
    how = InputRounding(inputs="e4m3")
    assert (how.inputs, how.gradients, how.scale) == ("float8_e4m3fn", "float8_e4m3fn", ScaleGroup.NONE)
    assert str(InputRounding(inputs="mxfp8")) == "mxfp8_e4m3"
    assert how.format_of(is_gradient=True).name == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"inputs": "float32"}, "at most 16 bits"),
        ({"inputs": "e8m0"}, "at most 16 bits"),
        ({"inputs": "e4m4"}, "e4m4"),
        ({"inputs": "e4m3", "gradients": "float64"}, "at most 16 bits"),
        ({"inputs": "mxfp8", "scale": "tensor"}, "its blocks have scales"),
        ({"inputs": "e4m3", "scale": "column"}, "tensor, row, block"),
        ({"inputs": "e4m3", "scale": "row", "history": 3}, "scale=tensor or history=0"),
        ({"inputs": "e4m3", "scale": "tensor", "history": -1}, "0 to 1024"),
        ({"inputs": "e4m3", "scale": "tensor", "history": 1025}, "0 to 1024"),
    ],
)
def test_refusals(fields: dict, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        InputRounding(**fields)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "unknown products"),
        ("e4m3(scale)", "settings are gradients, scale, history, stochastic"),
        ("e4m3(scale=row, scale=row)", "twice"),
        ("e4m3(history=-2)", "no whole number"),
        ("e4m3(stochastic=yes)", "true or false"),
        ("e4m3(speed=2)", "unknown setting"),
        ("none(scale=row)", "none"),
    ],
)
def test_texts_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        parse_products(text)


def test_none_is_a_text_too() -> None:
    assert parse_products("none") is None
