"""The decision for a format follows from the measured ratios, or from the user's wish."""

import pytest

from mezzotint.lowprec.choice import Path, decide

NATIVE = {"NT": 0.44, "NN": 0.41, "TN": 0.47}
NEUTRAL = {"NT": 1.0, "NN": 1.3, "TN": 1.1}
ONE_SLOW_LAYOUT = {"NT": 0.9, "NN": 40.0, "TN": 4.0}


@pytest.mark.parametrize("can_pack", [False, True])
@pytest.mark.parametrize(
    ("ratios", "is_slow"), [(NATIVE, False), (NEUTRAL, False), (ONE_SLOW_LAYOUT, True), ({}, False)]
)
def test_measured(ratios: dict[str, float], is_slow: bool, can_pack: bool) -> None:
    choice = decide("bfloat16", ratios, "auto", can_pack=can_pack)
    fast = Path.PACKED if can_pack else Path.UPCAST
    path = fast if is_slow else Path.STOCK
    assert choice.path is path
    assert dict(choice.ratios) == ratios
    assert "bfloat16" in choice.reason


@pytest.mark.parametrize(("wish", "path"), [("off", Path.STOCK), ("upcast", Path.UPCAST), ("packed", Path.PACKED)])
def test_a_wish_is_granted_whatever_was_measured(wish: str, path: Path) -> None:
    for ratios in (NATIVE, ONE_SLOW_LAYOUT):
        assert decide("float16", ratios, wish, can_pack=True).path is path


def test_without_the_packing_kernel_its_wish_is_the_next_best() -> None:
    assert decide("float16", {}, "packed", can_pack=False).path is Path.UPCAST
