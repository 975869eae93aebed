"""The learning rate: rises over the warm-up, reaches its peak once, ends at its final share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.training.config import ScheduleConfig
from mezzotint.training.schedule import learning_rate_share


@given(
    decay=st.sampled_from(["cosine", "linear", "constant"]),
    warmup=st.integers(0, 50),
    final=st.floats(0, 1),
    num_steps=st.integers(1, 200),
)
def test_shape(decay: str, warmup: int, final: float, num_steps: int) -> None:
    share = learning_rate_share(ScheduleConfig(decay=decay, warmup_steps=warmup, final_share=final), num_steps)
    values = [share(step) for step in range(num_steps)]
    assert all(0 <= value <= 1 + 1e-12 for value in values)
    assert all(value > 0 for value in values[:warmup])
    rising, falling = values[: warmup + 1], values[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if num_steps > warmup + 1:
        assert values[warmup] == pytest.approx(1.0)
        assert values[-1] == pytest.approx(1.0 if decay == "constant" else final)


def test_cosine_is_half_way_in_the_middle() -> None:
    share = learning_rate_share(ScheduleConfig(decay="cosine", warmup_steps=0, final_share=0.2), 11)
    assert share(5) == pytest.approx(0.6)
