"""The configuration: TOML there and back, single settings, and one sentence for everything that is wrong."""

import math
from dataclasses import fields, is_dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mezzotint.data.config import DataConfig
from mezzotint.errors import ConfigError
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.recipes.catalog import RECIPES
from mezzotint.training.config import (
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    from_toml,
    to_toml,
    with_settings,
)

SEEDS = st.integers(0, 2**32 - 1)
OTHER = RunConfig(
    recipe='with "quotes" and ä',
    policy="fp16-mixed, scaling=dynamic(initial=1024)",
    seed=7,
    device="cpu",
    model=GPTConfig(
        block_size=32, num_layers=3, num_heads=6, dim=24, ffn_dim=11, dropout=0.25, is_head_tied=False,
        rope_base=5e5, loss_chunk_rows=9, is_residual_compact=True,
    ),
    data=DataConfig(source=("a b.txt", "c"), tokenizer="bpe", vocab_size=999, validation_share=0.2, max_bytes=12),
    optimizer=OptimizerConfig(
        name="sgd", learning_rate=0.5, weight_decay=0.0, beta1=0.8, beta2=0.99, eps=1e-6, momentum=0.5,
        max_grad_norm=0.0,
    ),
    schedule=ScheduleConfig(warmup_steps=3, decay="linear", final_share=0.0),
    train=TrainConfig(
        steps=5, batch_size=2, accumulate=3, evaluate_every=4, evaluate_batches=6, save_every=7, keep_checkpoints=9,
        watch_every=3,
        sample_tokens=0, sample_prompt="x\n\\", compile=True, has_fused_modules=True,
    ),
)  # fmt: skip


def leaves(config) -> dict:
    return {
        f.name: leaves(getattr(config, f.name)) if is_dataclass(getattr(config, f.name)) else getattr(config, f.name)
        for f in fields(config)
    }


def test_every_field_of_the_example_differs_from_its_default() -> None:
    """Otherwise the identity below could hold for a field that is never written."""
    plain, other = leaves(RunConfig(recipe="")), leaves(OTHER)
    same = [
        f"{section}.{name}"
        for section, part in other.items()
        for name, value in (part.items() if isinstance(part, dict) else [("", part)])
        if value == (plain[section][name] if isinstance(part, dict) else plain[section])
    ]
    assert same == ["model.vocab_size"]


@pytest.mark.parametrize("config", [OTHER, *(make() for make in RECIPES.values())], ids=lambda config: config.recipe)
def test_print_then_parse_is_identity(config: RunConfig) -> None:
    assert from_toml(to_toml(config), "config.toml") == config


@settings(deadline=None)
@given(text=st.text(min_size=1), paths=st.lists(st.text(min_size=1), min_size=1))
@example(text="\x7f", paths=["\x00\x1f\x7f\x85\u2028"])
def test_any_text_survives_the_file(text: str, paths: list[str]) -> None:
    config = RunConfig(
        recipe=text, data=DataConfig(source=tuple(paths)), train=replace(TrainConfig(), sample_prompt=text)
    )
    assert from_toml(to_toml(config), "config.toml") == config


NUMBERS = st.floats(0, allow_infinity=False, exclude_min=True)


@settings(deadline=None)
@given(rate=NUMBERS, eps=NUMBERS, decay=st.floats(0, allow_infinity=False), steps=st.integers(1, 10**12), seed=SEEDS)
@example(rate=5e-324, eps=1e300, decay=-0.0, steps=10**12, seed=2**32 - 1)
def test_any_number_survives_the_file(rate: float, eps: float, decay: float, steps: int, seed: int) -> None:
    config = RunConfig(
        recipe="r",
        seed=seed,
        optimizer=OptimizerConfig(learning_rate=rate, eps=eps, weight_decay=decay, max_grad_norm=math.inf),
        train=TrainConfig(steps=steps),
    )
    assert from_toml(to_toml(config), "config.toml") == config


def test_what_a_file_leaves_out_has_its_default_and_its_name() -> None:
    assert from_toml("[train]\nsteps = 3\n", "runs/mine.toml") == RunConfig(
        recipe="mine", train=replace(TrainConfig(), steps=3)
    )


def test_settings_take_the_type_of_their_field() -> None:
    config = with_settings(
        RunConfig(recipe="r"),
        [
            "train.steps=7",
            "optimizer.learning_rate=1",
            "train.compile=true",
            "policy=bf16-mixed",
            'data.source=["a", "b"]',
            "train.sample_prompt=12",
        ],
    )
    assert config.train.steps == 7
    assert config.optimizer.learning_rate == 1.0
    assert isinstance(config.optimizer.learning_rate, float)
    assert config.train.compile is True
    assert config.policy == "bf16-mixed"
    assert config.data.source == ("a", "b")
    assert config.train.sample_prompt == "12"
    assert with_settings(config, ["data.source=one.txt"]).data.source == ("one.txt",)
    assert with_settings(config, [" train.steps = 1_000 "]).train.steps == 1000
    assert with_settings(config, ["train.steps=1", "train.steps=2"]).train.steps == 2
    assert with_settings(config, ["train.sample_prompt='def '"]).train.sample_prompt == "def "
    assert with_settings(config, ["policy=bf16-mixed, loss=float32"]).policy == "bf16-mixed, loss=float32"
    assert with_settings(config, []) == config


def complaint(setting: str) -> str:
    try:
        with_settings(RunConfig(recipe="r"), [setting])
    except ConfigError as error:
        return str(error)
    return ""


@given(key=st.text(), value=st.text())
@settings(deadline=None)
def test_no_setting_raises_anything_else_or_two_lines(key: str, value: str) -> None:
    for setting in (f"{key}={value}", f"{key}", f"train.{key}={value}", f"device={value}", f"policy={value}"):
        assert len(complaint(setting).splitlines()) <= 1


ALL_KEYS = [
    f"{section}.{name}" if isinstance(part, dict) else section
    for section, part in leaves(OTHER).items()
    for name in (part if isinstance(part, dict) else [""])
    if (section, name) != ("model", "vocab_size")
]


@pytest.mark.parametrize("key", ALL_KEYS)
def test_a_key_with_a_wrong_letter_is_recognised(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(RunConfig(recipe="r"), [f"{key}x=1"])
    assert f"unknown setting {key}x; did you mean " in str(caught.value)
    assert key in str(caught.value).partition("did you mean ")[2].rstrip("?").split(" or ")


@pytest.mark.parametrize("key", [key for key in ALL_KEYS if key.partition(".")[0] != "recipe"])
def test_every_setting_refuses_what_no_field_takes(key: str) -> None:
    for value in ("{x = 1}", "[[1]]"):
        with pytest.raises(ConfigError, match=rf"^--set: {key}=.* is refused; pass "):
            with_settings(RunConfig(recipe="r"), [f"{key}={value}"])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.steps", ["no '='", "train.steps=100"]),
        ("train.stepz=3", ["train.stepz", "train.steps"]),
        ("learning_rate=3", ["learning_rate", "optimizer.learning_rate"]),
        ("train.learning_rate=3", ["train.learning_rate", "optimizer.learning_rate"]),
        ("trian.steps=3", ["unknown setting trian", "train."]),
        ("=3", ["unknown setting", "did you mean"]),
        ("train.=3", ["unknown setting train."]),
        ("train.steps.more=3", ["train.steps={'more': 3}", "whole number"]),
        ("tra\nin=3", ["unknown setting 'tra\\nin'"]),
        ("train=3", ["train is a section", "train.steps"]),
        ("train.steps=five", ["train.steps='five'", "whole number"]),
        ("train.steps=1.5", ["train.steps=1.5", "whole number"]),
        ("train.steps=true", ["whole number"]),
        ("train.steps=", ["train.steps=''", "whole number"]),
        ("train.steps=5\nsteps=6", ["train.steps='5\\nsteps=6'", "whole number"]),
        pytest.param(f"train.steps={'[' * 5000}", ["whole number"], id="nested too deep"),
        pytest.param(f"train.steps={'9' * 5000}", ["whole number"], id="too long an integer"),
        pytest.param(f"optimizer.learning_rate=1{'0' * 400}", ["learning_rate", "401 digits"], id="too large a float"),
        ("optimizer.learning_rate=true", ["a number"]),
        ("optimizer.learning_rate=inf", ["learning_rate=inf", "more than 0"]),
        ("optimizer.weight_decay=inf", ["weight_decay=inf"]),
        ("optimizer.eps=0", ["eps=0", "more than 0"]),
        ("optimizer.eps=inf", ["eps=inf"]),
        ("optimizer.max_grad_norm=-1", ["max_grad_norm=-1", "no clipping"]),
        ("schedule.final_share=1.1", ["final_share=1.1", "0 to 1"]),
        ("schedule.warmup_steps=-1", ["warmup_steps=-1"]),
        ("train.sample_tokens=-1", ["sample_tokens=-1"]),
        ("train.sample_prompt=", ["sample_prompt", "one character"]),
        ("train.keep_checkpoints=0", ["keep_checkpoints=0"]),
        ("model.rope_base=nan", ["model.rope_base=nan"]),
        ("data.source=", ["data.source is empty"]),
        ("data.source=3", ["data.source=3", "list of texts"]),
        ("train.steps=0", ["train.steps=0", "at least 1"]),
        ("train.compile=1", ["true or false"]),
        ("optimizer.learning_rate=-0.1", ["learning_rate=-0.1", "more than 0"]),
        ("optimizer.learning_rate=nan", ["learning_rate"]),
        ("optimizer.name=adam", ["adamw"]),
        ("optimizer.beta1=1.0", ["beta1=1.0", "below 1"]),
        ("schedule.decay=cosin", ["cosine"]),
        ("model.dim=30", ["dim=30", "num_heads=4"]),
        ("model.vocab_size=3", ["unknown setting model.vocab_size"]),
        ("data.source=[1]", ["data.source", "list of texts"]),
        ("data.tokenizer=words", ["bytes or bpe"]),
        ("policy=fp17", ["fp17"]),
        ("device=gpu", ["device=gpu", "cuda"]),
        ("device=cu\nda", [r"device='cu\nda'", "cuda"]),
        ("policy=bf\n17", [r"bf\n17"]),
        ("seed=4294967296", ["seed=4294967296", "2**32 - 1"]),
        ("seed=-1", ["seed=-1"]),
    ],
)
def test_a_wrong_setting_gets_one_sentence(setting: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(RunConfig(recipe="r"), [setting])
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert all(word in text for word in words), text


def test_a_key_that_is_derived_is_not_proposed() -> None:
    with pytest.raises(ConfigError) as caught:
        with_settings(RunConfig(recipe="r"), ["vocab_size=300"])
    assert "data.vocab_size" in str(caught.value)
    assert "model.vocab_size" not in str(caught.value)


def test_two_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="train was given a value before"):
        with_settings(RunConfig(recipe="r"), ["train=3", "train.steps=3"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = = 1", "is not TOML"),
        ("[train]\nsteps = 1\nsteps = 2", "is not TOML"),
        pytest.param(f"x = {'[' * 5000}", "is not TOML", id="nested too deep"),
        pytest.param(f"seed = {'9' * 5000}", "is not TOML", id="too long an integer"),
        ("nothing = 1", "unknown setting nothing"),
        ('"a\\nb" = 1', r"unknown setting 'a\\nb'"),
        ("[nowhere]\nx = 1", "unknown setting nowhere"),
        ("[model]\nvocab_size = 300", r"unknown setting model\.vocab_size"),
        ("[train]\nsteps = 0", r"train\.steps=0 is refused"),
        ("[train]\nsteps = '5'", r"train\.steps='5' is refused"),
        ("train = 5", "train is a section"),
        ("recipe = [1]", r"recipe=\[1\] is refused"),
        ("[recipe]\nx = 1", "recipe={'x': 1} is refused"),
        ("seed = 2024-01-01", "seed=.* a whole number"),
        ("policy = 'bf17'", "unknown policy"),
    ],
)
def test_a_wrong_file_is_named(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^mine\.toml:? .*{words}") as caught:
        from_toml(text, "mine.toml")
    assert len(str(caught.value).splitlines()) == 1
