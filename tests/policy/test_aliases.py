"""Names that other libraries use for policies, and torch dtypes in their fields."""

import pytest
import torch

import mezzotint as mz
from mezzotint.errors import PolicyError
from mezzotint.policy.grammar import parse_policy


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_short_names_are_the_mixed_policies(name):
    assert parse_policy(name) == parse_policy(f"{name}-mixed")


@pytest.mark.parametrize("name", ["bf16-true", "16-mixed", "bf16-pur", "b16"])
def test_no_suggestion_loses_small_updates(name):
    with pytest.raises(PolicyError) as caught:
        parse_policy(name)
    assert "bf16-pure" not in str(caught.value)


def test_dtypes_of_torch_are_taken():
    assert mz.Policy(compute=torch.bfloat16) == mz.Policy(compute="bfloat16")
    with pytest.raises(PolicyError, match="no number format"):
        mz.Policy(compute=16)


@pytest.mark.parametrize("given", ["bf16", torch.float16])
def test_fast_cpu_takes_short_names_and_dtypes(given):
    with mz.fast_cpu(given):
        pass
