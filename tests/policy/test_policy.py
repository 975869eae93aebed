"""The policy value: what it spells in full, what it refuses, and that text and object are twins."""

import dataclasses

import pytest
from hypothesis import given
from strategies import UNHURRIED, policies

from mezzotint.errors import PolicyError
from mezzotint.formats.catalog import FORMATS
from mezzotint.formats.inputs import InputRounding
from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.policy import FORMAT_AXES, POLICY_FIELDS, Policy, Update
from mezzotint.policy.scaling import Scaling, ScalingKind


@UNHURRIED
@given(policies())
def test_print_then_parse_is_identity(policy):
    assert parse_policy(str(policy)) == policy
    assert Policy.parse(str(policy)) == policy
    assert str(parse_policy(str(policy))) == str(policy)


@UNHURRIED
@given(policies())
def test_a_policy_is_a_value(policy):
    assert parse_policy(policy) is policy
    assert dataclasses.replace(policy) == policy
    assert hash(parse_policy(str(policy))) == hash(policy)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.compute = "float16"


def test_the_default_is_float32_throughout():
    text = "params=float32, compute=float32, loss=float32, reduce=float32, state=float32, scaling=none"
    assert str(Policy()) == text
    assert not Policy().is_mixed
    assert Policy(compute="bf16").is_mixed


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_aliases_are_spelled_in_full(fmt):
    for word in (fmt.name, *fmt.aliases):
        assert Policy(compute=word.upper()).compute == fmt.name


def test_every_field_is_printed_where_it_differs():
    other = {
        "params": "bfloat16",
        "compute": "float16",
        "loss": "float64",
        "reduce": "bfloat16",
        "state": "float32",
        "scaling": Scaling(kind=ScalingKind.STATIC, initial=8),
        "update": Update.MASTER,
        "products": InputRounding(inputs="e4m3", gradients="e5m2", scale="tensor", history=7, is_stochastic=True),
        "saved": "bfloat16",
        "keep": ("head", "blocks.*.norm"),
    }
    assert set(other) == set(POLICY_FIELDS)
    policy = Policy(**other)
    assert parse_policy(str(policy)) == policy
    other["keep"] = "head|blocks.*.norm"
    assert all(f"{name}={value}" in str(policy) for name, value in other.items())


@pytest.mark.parametrize("value", [("a b",), ("a,b",), ("",), "head", ("head", "head"), (3,)])
def test_modules_to_keep_are_paths(value):
    with pytest.raises(PolicyError, match="policy field keep="):
        Policy(compute="bf16", keep=value)


@pytest.mark.parametrize("axis", FORMAT_AXES)
@pytest.mark.parametrize("value", ["bf17", "", "int8", None, 16])
def test_an_unknown_format_is_refused_with_its_field(axis, value):
    with pytest.raises(PolicyError, match=f"policy field {axis}="):
        Policy(**{axis: value})


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"params": "bf16"}, ["state=float32", "params=bfloat16", "pass state=bfloat16 or update=master"]),
        ({"update": "master"}, ["update=master", "params=float32", "pass params=bfloat16 or update=plain"]),
        ({"params": "bf16", "state": "bf16", "update": "kahan"}, ["state=bfloat16", "kahan", "pass state=float32"]),
        ({"update": "often"}, ["update='often'", "plain, master, stochastic, kahan"]),
        ({"scaling": "dynamic"}, ["scaling", "'dynamic'", "parse_policy"]),
    ],
)
def test_a_contradiction_is_refused_with_value_limit_and_fix(fields, named):
    with pytest.raises(PolicyError) as caught:
        Policy(**fields)
    assert all(words in str(caught.value) for words in named)
    assert isinstance(caught.value, ValueError)
