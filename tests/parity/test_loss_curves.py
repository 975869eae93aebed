"""What a curve says by itself: learning, and losses rounded to 16 bits."""

import math

import ml_dtypes
import numpy as np
import pytest

from mezzotint.parity.losses import final_loss, learned_share, mean_loss, rounded_to, spacing


def test_means_of_a_curve() -> None:
    losses = [float(step) for step in range(1, 101)]
    assert final_loss(losses) == np.mean(losses[-10:])
    assert mean_loss(losses) == np.mean(losses)
    assert final_loss([3.0]) == mean_loss([3.0]) == 3.0


@pytest.mark.parametrize(
    ("losses", "share"),
    [
        ([4.0, 3.0, 2.0], 0.5),
        ([4.0] * 100, 0.0),
        ([2.0, 3.0], -0.5),
        ([5.0], 0.0),
        ([-1.0, -2.0], 1.0),  # log-likelihoods of densities fall below 0
        ([0.0, 0.0], 0.0),
        ([0.0, 1.0], -math.inf),
        ([10.0] * 5 + [9.0] * 90 + [6.0] * 10, 0.4),  # first five of 105, last ten
    ],
)
def test_the_share_learned(losses: list[float], share: float) -> None:
    assert learned_share(losses) == pytest.approx(share)


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_losses_that_were_rounded_are_noticed(name: str, dtype: type) -> None:
    losses = np.random.default_rng(0).uniform(0.1, 12, 50).astype(np.float32)
    rounded = losses.astype(dtype)
    fmt = rounded_to(rounded.astype(np.float64).tolist())
    assert fmt is not None
    assert fmt.name == name
    assert rounded_to(losses.tolist()) is None
    assert rounded_to([*rounded.astype(np.float64).tolist(), 1 / 3]) is None  # one finer loss is enough
    for value in (0.7, 1.0, 5.3, 11.9):
        assert spacing(value, fmt) == float(np.spacing(np.array(value, dtype)))


@pytest.mark.parametrize(
    "losses", [[], [1.0], [1.0, 0.5], [2.0] * 100, [1.0, math.nan, 0.5, 0.25], [1.0, 0.5, 0.25, math.inf]]
)
def test_too_few_losses_say_nothing_of_their_format(losses: list[float]) -> None:
    assert rounded_to(losses) is None
