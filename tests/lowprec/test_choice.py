"""The decision for a format follows from the measured ratios, or from the user's wish."""

import pytest

from mezzotint.lowprec.choice import Path, decide

NATIVE = {"NT": 0.44, "NN": 0.41, "TN": 0.47}
NEUTRAL = {"NT": 1.0, "NN": 1.3, "TN": 1.1}
ONE_SLOW_LAYOUT = {"NT": 0.9, "NN": 40.0, "TN": 4.0}


@pytest.mark.parametrize(
    ("ratios", "path"), [(NATIVE, Path.STOCK), (NEUTRAL, Path.STOCK), (ONE_SLOW_LAYOUT, Path.UPCAST), ({}, Path.STOCK)]
)
def test_measured(ratios: dict[str, float], path: Path) -> None:
    choice = decide("bfloat16", ratios, "auto")
    assert choice.path is path
    assert dict(choice.ratios) == ratios
    assert "bfloat16" in choice.reason


@pytest.mark.parametrize(("wish", "path"), [("off", Path.STOCK), ("upcast", Path.UPCAST)])
def test_a_wish_is_granted_whatever_was_measured(wish: str, path: Path) -> None:
    for ratios in (NATIVE, ONE_SLOW_LAYOUT):
        assert decide("float16", ratios, wish).path is path
