"""Loss scaling as a value: torch's own scaler and Megatron's rule are the oracles."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import UNHURRIED, scalings

from mezzotint.errors import PolicyError
from mezzotint.policy.scaling import LossScale, Scaling, ScalingKind

DYNAMIC, STATIC, NONE = ScalingKind.DYNAMIC, ScalingKind.STATIC, ScalingKind.NONE


class Torch:
    """torch.amp.GradScaler around one parameter whose gradient is finite or infinite as told."""

    def __init__(self, **scaler_settings):
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.0)
        self.scaler = torch.amp.GradScaler("cpu", **scaler_settings)
        self.scaler.scale(torch.zeros(()))  # the scale tensor is made at the first use

    def after(self, gradients_finite):
        self.weight.grad = torch.full((2,), 1.0 if gradients_finite else math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale()


@UNHURRIED
@given(
    outcomes=st.lists(st.booleans(), max_size=60),
    initial=st.floats(2.0**-10, 2.0**30),
    growth_factor=st.sampled_from([2.0, 1.5, 1.1, 4.0]) | st.floats(1.001, 8.0),
    backoff_factor=st.sampled_from([0.5, 0.7, 0.25]) | st.floats(0.01, 0.99),
    growth_interval=st.integers(1, 9),
)
def test_the_scale_is_torchs_until_the_floor(outcomes, initial, growth_factor, backoff_factor, growth_interval):
    mine = {"growth_factor": growth_factor, "backoff_factor": backoff_factor, "growth_interval": growth_interval}
    theirs = Torch(init_scale=initial, **mine)
    floor, ceiling = 2.0**-40, 2.0**100
    ours = LossScale.start(Scaling(kind=DYNAMIC, initial=initial, floor=floor, ceiling=ceiling, **mine))
    assert ours.scale == theirs.scaler.get_scale()
    for gradients_finite in outcomes:
        expected = theirs.after(gradients_finite)
        ours = ours.after(gradients_finite)
        if not floor < expected < ceiling:
            assert floor <= ours.scale <= ceiling
            return
        assert ours.scale == expected
        assert ours.growth_tracker == theirs.scaler.state_dict()["_growth_tracker"]


def test_where_torch_reaches_zero_the_floor_holds():
    theirs, ours = Torch(init_scale=4.0), LossScale.start(Scaling(kind=DYNAMIC, initial=4.0, floor=0.5))
    seen = []
    for _ in range(200):
        expected, ours = theirs.after(False), ours.after(False)
        seen.append(ours.scale)
    assert expected == 0.0
    assert seen[:4] == [2.0, 1.0, 0.5, 0.5]
    assert ours.scale == 0.5
    assert ours.skips_in_a_row == 200


def test_the_ceiling_holds():
    scale = LossScale.start(Scaling(kind=DYNAMIC, initial=4.0, ceiling=32.0, growth_interval=1))
    seen = []
    for _ in range(5):
        scale = scale.after(True)
        seen.append(scale.scale)
    assert seen == [8.0, 16.0, 32.0, 32.0, 32.0]


class Megatron:
    """The rule of Megatron-LM's DynamicGradScaler.update, megatron/core/optimizer/grad_scaler.py."""

    def __init__(self, given):
        self.given = given
        self.scale = given.initial
        self.growth, self.hysteresis = 0, given.hysteresis

    def after(self, gradients_finite):
        if gradients_finite:
            self.growth += 1
            if self.growth == self.given.growth_interval:
                self.growth, self.hysteresis = 0, self.given.hysteresis
                self.scale *= self.given.growth_factor
        else:
            self.growth = 0
            self.hysteresis -= 1
            if self.hysteresis <= 0:
                self.scale = max(self.scale * self.given.backoff_factor, self.given.floor)
        return self.scale


@UNHURRIED
@given(st.lists(st.booleans(), max_size=80), st.integers(1, 4), st.integers(1, 5))
def test_hysteresis_is_megatrons(outcomes, hysteresis, growth_interval):
    given_settings = Scaling(
        kind=DYNAMIC, hysteresis=hysteresis, growth_interval=growth_interval, initial=256.0, ceiling=2.0**100
    )
    theirs, ours = Megatron(given_settings), LossScale.start(given_settings)
    for gradients_finite in outcomes:
        ours = ours.after(gradients_finite)
        assert ours.scale == theirs.after(gradients_finite)


@UNHURRIED
@given(scalings(), st.lists(st.booleans(), max_size=40))
def test_the_scale_stays_within_its_bounds_and_the_state_is_a_value(scaling, outcomes):
    scale = LossScale.start(scaling)
    low, high = (scaling.floor, scaling.ceiling) if scaling.kind is DYNAMIC else (scale.scale, scale.scale)
    for gradients_finite in outcomes:
        before = dataclasses.replace(scale)
        after = scale.after(gradients_finite)
        assert scale == before
        assert scale.after(gradients_finite) == after
        assert low <= after.scale <= high
        assert (after.skips_in_a_row == 0) == gradients_finite
        scale = after


@pytest.mark.parametrize("scaling", [Scaling(), Scaling(kind=STATIC, initial=1024.0)])
def test_only_a_dynamic_scale_moves(scaling):
    scale = LossScale.start(scaling)
    assert scale.scale == (1.0 if scaling.kind is NONE else 1024.0)
    for gradients_finite in (True, False) * 50:
        scale = scale.after(gradients_finite)
        assert scale.scale == LossScale.start(scaling).scale


def test_the_skip_budget_ends_the_search():
    scale = LossScale.start(Scaling(kind=DYNAMIC, initial=2.0**20, skip_budget=3))
    assert scale.exhausted_by(True) is None
    for _ in range(2):
        assert scale.exhausted_by(False) is None
        scale = scale.after(False)
    assert scale.exhausted_by(False) == "3 updates in a row were skipped, which is the skip budget"
    assert scale.after(True).exhausted_by(False) is None


def test_at_the_floor_the_search_is_over_at_once():
    scale = LossScale.start(Scaling(kind=DYNAMIC, initial=2.0, floor=1.0)).after(False)
    assert scale.scale == 1.0
    assert "floor, 1" in scale.exhausted_by(False)
    assert scale.exhausted_by(True) is None
    unscaled = LossScale.start(Scaling())
    assert unscaled.exhausted_by(False) is None


STATE = {"scale": 512.0, "growth_tracker": 7, "hysteresis_left": 2, "skips_in_a_row": 3}


def test_every_field_of_the_state_survives_json():
    given_settings = Scaling(kind=DYNAMIC, hysteresis=3)
    state = LossScale(settings=given_settings, **STATE)
    assert set(STATE) == {f.name for f in dataclasses.fields(LossScale)} - {"settings"}
    written = json.loads(json.dumps(state.to_json()))
    assert written == STATE
    assert LossScale.from_json(given_settings, written) == state


@UNHURRIED
@given(st.lists(st.booleans(), max_size=30), st.lists(st.booleans(), max_size=30))
def test_a_resumed_scale_goes_on_as_if_never_stopped(before, after):
    scale = LossScale.start(Scaling(kind=DYNAMIC, growth_interval=3, growth_factor=1.5, backoff_factor=0.7))
    for gradients_finite in before:
        scale = scale.after(gradients_finite)
    resumed = LossScale.from_json(scale.settings, json.loads(json.dumps(scale.to_json())))
    for gradients_finite in after:
        scale, resumed = scale.after(gradients_finite), resumed.after(gradients_finite)
    assert resumed == scale


def test_the_state_of_torchs_scaler_is_accepted():
    theirs = Torch(init_scale=1024.0, growth_interval=5)
    for gradients_finite in (True, False, True, True):
        theirs.after(gradients_finite)
    ours = LossScale.from_json(Scaling(kind=DYNAMIC, growth_interval=5), theirs.scaler.state_dict())
    assert (ours.scale, ours.growth_tracker) == (512.0, 2)
    for gradients_finite in (True, True, True, False):
        expected, ours = theirs.after(gradients_finite), ours.after(gradients_finite)
        assert ours.scale == expected


def test_the_empty_state_of_a_disabled_scaler_starts_afresh():
    given_settings = Scaling(kind=DYNAMIC, initial=64.0)
    empty = torch.amp.GradScaler("cpu", enabled=False).state_dict()
    assert empty == {}
    assert LossScale.from_json(given_settings, empty) == LossScale.start(given_settings)


@pytest.mark.parametrize(
    "data",
    [
        {"scales": 1.0},
        {"scale": 1.0, "epoch": 3},
        {"growth_tracker": 1},
        {"scale": 0.0},
        {"scale": math.nan},
        {"scale": math.inf},
        {"scale": -2.0},
        {"scale": 0.0, "_growth_tracker": 0},
        "state",
    ],
    ids=repr,
)
def test_garbage_is_refused(data):
    with pytest.raises(PolicyError):
        LossScale.from_json(Scaling(kind=DYNAMIC), data)


@pytest.mark.parametrize(
    "data",
    [
        {"scale": "abc"},
        {"scale": None},
        {"scale": True},
        {"scale": 1e300},
        {"scale": "abc", "_growth_tracker": 1},
        {"_growth_tracker": 1},
        {"scale": 8.0, "growth_tracker": "x"},
        {"scale": 8.0, "growth_tracker": -3},
        {"scale": 8.0, "growth_tracker": 1.5},
        {"scale": 8.0, "hysteresis_left": -5},
        [1],
        None,
        0,
    ],
    ids=repr,
)
def test_garbage_of_the_wrong_type_or_range_is_refused(data):
    with pytest.raises(PolicyError):
        LossScale.from_json(Scaling(kind=DYNAMIC), data)


def test_a_resumed_scale_outside_the_bounds_does_not_rise_at_an_overflow():
    """torch halves below 1 without end; a floor of 1 must not turn the next overflow into a higher scale."""
    given_settings = Scaling(kind=DYNAMIC, floor=1.0)
    try:
        scale = LossScale.from_json(given_settings, {"scale": 0.25, "_growth_tracker": 0})
    except PolicyError:
        return  # refusing is as good
    assert scale.after(False).scale <= scale.scale
    assert scale.scale >= given_settings.floor


@pytest.mark.parametrize(
    ("name", "value", "fix"),
    [
        ("initial", 0.0, "65536"),
        ("initial", -1.0, "65536"),
        ("initial", math.inf, "65536"),
        ("initial", math.nan, "65536"),
        ("growth_factor", 1.0, "more than 1"),
        ("growth_factor", math.nan, "more than 1"),
        ("backoff_factor", 0.0, "between 0 and 1"),
        ("backoff_factor", 1.0, "between 0 and 1"),
        ("growth_interval", 0, "at least 1"),
        ("floor", 0.0, "more than 0"),
        ("floor", math.nan, "more than 0"),
        ("ceiling", 2.0**127, "below 2**127"),
        ("ceiling", math.nan, "below 2**127"),
        ("hysteresis", 0, "at least 1"),
        ("skip_budget", 0, "at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_value_limit_and_fix(name, value, fix):
    with pytest.raises(PolicyError) as caught:
        Scaling(kind=DYNAMIC, **{name: value})
    assert f"{name}={value}" in str(caught.value)
    assert fix in str(caught.value)


@pytest.mark.parametrize("bounds", [{"floor": 128.0}, {"ceiling": 32.0}, {"floor": 256.0, "ceiling": 32.0}])
def test_an_initial_scale_outside_its_bounds_is_refused(bounds):
    with pytest.raises(PolicyError, match=r"initial=64 lies outside floor=.* and ceiling=.*; move it"):
        Scaling(kind=DYNAMIC, initial=64.0, **bounds)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Scaling) if f.name != "kind"])
def test_no_scaling_takes_no_settings(name):
    with pytest.raises(PolicyError, match="takes no settings"):
        Scaling(**{name: 3})


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_kind_given_as_text_is_that_kind(kind):
    """A kind that only looks right would never move, and would lose its place in text."""
    scaling = Scaling(kind=kind, initial=64.0)
    assert scaling == Scaling(kind=ScalingKind(kind), initial=64.0)
    assert scaling.kind is ScalingKind(kind)
    assert LossScale.start(scaling).after(False).scale == (32.0 if kind == "dynamic" else 64.0)


def test_an_unknown_kind_is_refused():
    with pytest.raises(PolicyError, match="bogus"):
        Scaling(kind="bogus")


@pytest.mark.parametrize(
    "given_settings",
    [
        {"initial": 1e300},  # infinite as float32
        {"initial": 1e-305, "floor": 1e-310, "ceiling": 1e-300},  # zero as float32
        {"growth_factor": math.inf},
        {"growth_interval": 2.5},
        {"skip_budget": 1.5},
        {"initial": "64"},
    ],
    ids=repr,
)
def test_settings_beyond_float32_or_of_the_wrong_type_are_refused(given_settings):
    kind = STATIC if "initial" in given_settings else DYNAMIC
    with pytest.raises(PolicyError):
        Scaling(kind=kind, **given_settings)


def test_bounds_are_kept_in_float32_as_the_scale_is():
    """The engine multiplies by a float32 scale, so the state must be one, at its bounds too."""
    scale = LossScale.start(Scaling(kind=DYNAMIC, initial=0.2, floor=0.1)).after(False).after(False)
    assert scale.scale == float(torch.tensor(scale.scale))
