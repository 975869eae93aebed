"""The policy grammar: what is read, and that what is not gets one sentence with the way out."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import UNHURRIED, scalings

from mezzotint.errors import PolicyError
from mezzotint.policy.grammar import parse_policy, parse_scaling
from mezzotint.policy.policy import Policy
from mezzotint.policy.scaling import Scaling, ScalingKind

OTHER_SETTINGS = {
    "initial": 1024.5,
    "growth_factor": 1.5,
    "backoff_factor": 0.7,
    "growth_interval": 17,
    "floor": 0.25,
    "ceiling": 4096.0,
    "hysteresis": 3,
    "skip_budget": 9,
}


@UNHURRIED
@given(scalings())
def test_scaling_text_and_object_are_twins(scaling):
    assert parse_scaling(str(scaling)) == scaling


@pytest.mark.parametrize("kind", [ScalingKind.STATIC, ScalingKind.DYNAMIC])
@pytest.mark.parametrize(("name", "value"), OTHER_SETTINGS.items())
def test_every_setting_survives_text(kind, name, value):
    scaling = Scaling(kind=kind, **{"initial": 2048.0, name: value})
    assert getattr(parse_scaling(str(scaling)), name) == value
    assert parse_scaling(str(scaling)) == scaling


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("float32", Policy()),
        ("bf16-mixed", Policy(compute="bfloat16")),
        (" BF16-Mixed , loss=bf16 ", Policy(compute="bfloat16", loss="bfloat16")),
        ("compute=fp16", Policy(compute="float16")),
        ("fp16-mixed, scaling=static(1024)", Policy(compute="float16", scaling=Scaling(kind="static", initial=1024.0))),
        ("compute = bf16 , params = float32", Policy(compute="bfloat16")),
        ("bf16-master, update=kahan", Policy(params="bf16", compute="bf16", update="kahan")),
    ],
)
def test_presets_fields_and_changes_are_read(text, policy):
    assert parse_policy(text) == policy


def test_a_static_scale_may_be_given_in_two_ways():
    assert parse_scaling("static(8)") == parse_scaling("static(initial=8)") == parse_scaling(" static( 8 ) ")
    assert parse_scaling("dynamic()") == parse_scaling("dynamic")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty part"),
        ("compute=bf16,", "empty part"),
        ("bf16-mixd", "did you mean bf16-mixed"),
        ("zzz", "did you mean"),
        ("precision=bf16", "the fields are params, compute, loss, reduce, state, scaling, update"),
        ("compute=bf16, bf16-mixed", "unknown policy field 'bf16-mixed'"),
        ("compute=", "policy field compute=''"),
        ("compute=bf17", "did you mean"),
        ("scaling=magic", "write none, static(1024) or dynamic"),
        ("scaling=dynamic(", "unknown scaling"),
        ("scaling=static", "write static(1024)"),
        ("scaling=static(much)", "'much' is not a number"),
        ("scaling=dynamic(16)", "unknown scaling setting '16'"),
        ("scaling=dynamic(speed=2)", "the settings are initial, growth_factor"),
        ("scaling=none(initial=3)", "takes no settings"),
        ("scaling=static(nan)", "initial=nan is refused"),
        ("scaling=static(0)", "initial=0.0 is refused"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(text, named):
    with pytest.raises(PolicyError) as caught:
        parse_policy(text)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@UNHURRIED
@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(PolicyError):
        assert isinstance(parse_policy(text), Policy)


@UNHURRIED
@given(
    st.sampled_from(["scaling=dynamic(%s)", "scaling=static(%s)", "compute=%s", "bf16-mixed,%s"]), st.text(max_size=40)
)
def test_any_value_is_read_or_refused(frame, text):
    with contextlib.suppress(PolicyError):
        assert isinstance(parse_policy(frame % text), Policy)


def test_a_field_given_twice_is_refused():
    with pytest.raises(PolicyError, match="compute"):
        parse_policy("compute=bf16, compute=fp16")
    with pytest.raises(PolicyError, match="initial"):
        parse_scaling("dynamic(initial=1, initial=2)")
    # but a preset may be changed
    assert parse_policy("bf16-mixed, compute=fp16").compute == "float16"


@pytest.mark.parametrize("thing", [3, None, b"float32"])
def test_what_is_not_text_is_refused(thing):
    with pytest.raises(PolicyError):
        parse_policy(thing)
