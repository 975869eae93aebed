"""The learning rate: rises over the warm-up, reaches its peak once, ends at its final share."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.training.config import ScheduleConfig
from mezzotint.training.schedule import learning_rate_share


@settings(deadline=None)
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


def test_the_line_and_the_constant() -> None:
    line = learning_rate_share(ScheduleConfig(decay="linear", warmup_steps=0, final_share=0.2), 11)
    assert [line(step) for step in (0, 5, 10)] == pytest.approx([1.0, 0.6, 0.2])
    constant = learning_rate_share(ScheduleConfig(decay="constant", warmup_steps=2), 11)
    assert [constant(step) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_steps_after_the_last_stay_at_the_final_share(decay: str) -> None:
    """A scheduler asks once more after the last step."""
    share = learning_rate_share(ScheduleConfig(decay=decay, warmup_steps=3, final_share=0.25), 20)
    assert [share(step) for step in (19, 20, 1000)] == pytest.approx([0.25] * 3)


def test_a_run_shorter_than_its_warm_up_only_rises() -> None:
    share = learning_rate_share(ScheduleConfig(warmup_steps=10), 4)
    assert [share(step) for step in range(4)] == pytest.approx([n / 11 for n in (1, 2, 3, 4)])


def test_a_share_needs_no_history() -> None:
    schedule = ScheduleConfig()
    forwards = [learning_rate_share(schedule, 60)(step) for step in range(60)]
    share = learning_rate_share(schedule, 60)
    assert [share(step) for step in reversed(range(60))] == forwards[::-1]
