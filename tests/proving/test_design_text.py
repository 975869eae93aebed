"""Designs survive the way through TOML; arms and metrics are read as they are spelled."""

import pytest
from proofs import small_recipe

from mezzotint.errors import ProofError
from mezzotint.parity.design import Arm, Better, Experiment, Metric, Source
from mezzotint.proving.design_file import design_from_toml, design_to_toml
from mezzotint.proving.design_text import parse_arm, parse_metric


def test_a_design_is_the_same_after_toml() -> None:
    strange = Experiment(
        source=Source.SCRIPT,
        target="a folder/träin.py:make_run",
        arms=(
            Arm(name="a.1", policy="float32", settings=('name="x, y"', "lr=1e-3")),
            Arm(name="b_2", policy="bf16-mixed, keep=blocks.*.norm|head"),
        ),
        seeds=(5, 2**32 - 1, 0),
        steps=None,
        metrics=(
            Metric(name="auc", margin=1e-300, is_relative=False, better=Better.HIGHER),
            Metric(name='quote"\\', margin=0.1 + 0.2, better=Better.NEITHER, is_primary=False),
        ),
        max_seeds=9,
        alpha=0.01,
        power=0.95,
        min_learning=-0.5,
        arguments=("--x", "'''", "a\nb\x7f"),
        recipe_toml="x = '''\nnested'''\n",
    )
    for experiment in (strange, small_recipe(max_seeds=4)):
        text = design_to_toml(experiment)
        assert design_from_toml(text, "x") == experiment
        assert design_from_toml(text, "x").digest == experiment.digest


@pytest.mark.parametrize("text", ["arms = [", "x = 3", 'source = "recipe"\narms = []', "arms = 3"])
def test_what_is_no_design_is_refused(text: str) -> None:
    with pytest.raises(ProofError, match=r"config\.toml"):
        design_from_toml(text, "config.toml")


def test_arms() -> None:
    assert parse_arm("bf16-mixed") == Arm(name="bf16-mixed", policy="bf16-mixed")
    assert parse_arm("m=fp8-mixed") == Arm(name="m", policy="fp8-mixed")
    assert parse_arm("x=params=bf16,compute=bf16,update=master, train.compile=true") == Arm(
        name="x", policy="params=bf16,compute=bf16,update=master", settings=("train.compile=true",)
    )
    assert parse_arm("s=fp16-mixed,scaling=dynamic(initial=1024, floor=0.5),lr=3") == Arm(
        name="s", policy="fp16-mixed,scaling=dynamic(initial=1024, floor=0.5)", settings=("lr=3",)
    )


def test_metrics() -> None:
    assert parse_metric("auc") == Metric(name="auc", margin=0.005)
    assert parse_metric("auc:1%:higher") == Metric(name="auc", margin=0.01, better=Better.HIGHER)
    assert parse_metric("auc:neither:0.2abs") == Metric(
        name="auc", margin=0.2, is_relative=False, better=Better.NEITHER
    )
    assert parse_metric("distance:0.1").better is Better.NEITHER
    for text in ("auc:0", "auc:nan", "auc:inf", ":0.1", "a:1:2:3", "auc:best"):
        with pytest.raises(ProofError, match="--metric"):
            parse_metric(text)
