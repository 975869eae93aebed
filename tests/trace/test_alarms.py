"""Alarms judge rows and scales by their limits, once for each place."""

from mezzotint.trace.alarms import Limits, Raised, ScaleHistory, row_alarms


def row(dtype: str = "float16", headroom: float = 5.0, subnormal: float = 0.0, lost: float = 0.0) -> dict:
    figures = {"dtype": dtype, "amax": 1.0, "headroom_bits": headroom, "subnormal": subnormal}
    return {
        "step": 3,
        "modules": {"net.0": {"backward": figures}},
        "updates": {"worst": [{"name": "w", "role": "weight", "dtype": "bfloat16", "share_lost": lost}]},
        "births": [],
    }


def kinds(found: dict) -> list[str]:
    return [alarm.kind for alarm in row_alarms(found, Limits())]


def test_limits_are_limits():
    assert kinds(row()) == []
    assert kinds(row(headroom=1.9)) == ["range"]
    assert kinds(row(headroom=2.0)) == []
    assert kinds(row("float32", headroom=1.0)) == []
    assert kinds(row(subnormal=0.6)) == ["subnormal-gradients"]
    assert kinds(row(lost=0.51)) == ["lost-updates"]


def test_an_alarm_comes_again_when_it_is_worse():
    raised = Raised(Limits())
    heard = []
    for headroom in (1.9, 1.8, 1.5, 0.8, 0.7):
        (alarm,) = row_alarms(row(headroom=headroom), Limits())
        if raised.is_new(alarm):
            heard.append(headroom)
    assert heard == [1.9, 0.8]  # 2^1.1 times nearer to the limit


def test_a_scale_that_falls_after_the_search_is_an_alarm():
    history = ScaleHistory(Limits(window=20))
    found = []
    scale = 65536.0
    for step in range(60):
        if step < 5 or step >= 40:
            scale /= 2
        found += [alarm.kind for alarm in history.add(step, scale, is_skipped=False)]
        if found:
            break
    assert (found[0], step) == ("falling-scale", 43)


def test_a_scale_below_one_and_skipped_steps():
    history = ScaleHistory(Limits(window=8))
    found = {alarm.kind for step in range(20) for alarm in history.add(step, 0.5, is_skipped=step % 2 == 0)}
    assert found == {"tiny-scale", "skipped-steps"}
