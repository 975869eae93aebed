"""The decision on measured times, without a clock."""

import pytest
from machines import timings

from mezzotint.hardware.timings import Speed, matmul_speed, spell_ratio, spell_ratios


@pytest.mark.parametrize(
    ("ratio", "speed"),
    [
        (0.5, Speed.FASTER),
        (0.9, Speed.FASTER),
        (0.95, Speed.EVEN),
        (1.3, Speed.EVEN),
        (1.31, Speed.SLOWER),
        ((0.4, 0.4, 0.95), Speed.EVEN),  # one layout without a fast kernel is enough
        ((0.4, 70.0, 0.4), Speed.SLOWER),
    ],
)
def test_the_slowest_layout_decides(ratio, speed):
    assert matmul_speed(timings(bfloat16=ratio), "bfloat16") is speed


def test_what_was_not_timed_has_no_speed():
    assert matmul_speed(timings(), "bfloat16") is None
    assert timings().worst_ratio("bfloat16") is None
    assert timings().flops_per_second("bfloat16") is None
    assert timings().ratios("bfloat16") == {}


def test_flops_are_those_of_the_slowest_layout():
    taken = timings(bfloat16=(0.5, 0.25, 1.0))
    assert taken.flops_per_second("bfloat16") == pytest.approx(2 * 256 * 384 * 384 / 1e-3)
    assert taken.formats == ("float32", "bfloat16")


def test_ratios_are_spelled_with_two_digits():
    assert [spell_ratio(r) for r in (0.456, 1.04, 1.96, 9.94, 9.96, 53.4)] == ["0.46", "1.04", "2.0", "9.9", "10", "53"]
    assert spell_ratios({}) == "not measured"
    assert spell_ratios({"NT": 0.461, "NN": 35.2}) == "0.46 times float32's in NT, 35 in NN"
