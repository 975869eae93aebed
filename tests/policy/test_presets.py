"""Every preset parses, prints, reads back, is described, and differs from all others."""

import pytest

from mezzotint.policy.grammar import parse_policy
from mezzotint.policy.presets import PRESET_NOTES, PRESETS
from mezzotint.policy.scaling import ScalingKind


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_round_trips(name):
    policy = parse_policy(name)
    assert parse_policy(str(policy)) == policy
    assert parse_policy(PRESETS[name]) == policy
    assert parse_policy(name.upper()) == policy


def test_presets_are_described_and_distinct():
    assert list(PRESET_NOTES) == list(PRESETS)
    assert all(PRESET_NOTES.values())
    assert len({parse_policy(name) for name in PRESETS}) == len(PRESETS)


def test_what_the_names_promise():
    assert not parse_policy("float32").is_mixed
    assert parse_policy("fp16-mixed").scaling.kind is ScalingKind.DYNAMIC
    for name in PRESETS:
        policy = parse_policy(name)
        if name == "bf16-saved":
            assert not policy.is_mixed
        elif name.startswith("bf16"):
            assert policy.compute == "bfloat16"
            assert policy.scaling.kind is ScalingKind.NONE
