"""The complete configuration of a run: frozen values, TOML in and out, single settings by dotted name.

`config.toml` in a run directory is `to_toml` of it and reproduces the run. The file loads without torch.
"""

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from mezzotint.data.config import DataConfig
from mezzotint.errors import ConfigError, MezzotintError, shortened
from mezzotint.models.gpt_config import GPTConfig
from mezzotint.policy.grammar import parse_policy

Config = TypeVar("Config", bound="DataclassInstance")

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

DERIVED = {("model", "vocab_size")}  # the tokenizer decides it
# between a checkpoint and a resume; none of it changes a loss or a weight
MAY_CHANGE = frozenset(
    {"recipe", "data.source", "train.save_every", "train.keep_checkpoints", "train.evaluate_every",
     "train.sample_tokens", "train.sample_prompt", "train.watch_every"}
)  # fmt: skip
LARGEST_COUNT = 10**12


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer; `beta1`, `beta2` and `eps` are AdamW's, `momentum` is SGD's. `max_grad_norm` 0 does not clip."""

    name: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.9
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Refuse settings that no optimizer takes."""
        _one_of("optimizer.name", self.name, ("adamw", "sgd"))
        _check("optimizer.learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "more than 0")
        _check("optimizer.weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        for name in ("beta1", "beta2", "momentum"):
            _check(f"optimizer.{name}", getattr(self, name), 0 <= getattr(self, name) < 1, "from 0 up to below 1")
        _check("optimizer.eps", self.eps, 0 < self.eps < math.inf, "more than 0")
        _check("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0, "0 (no clipping) or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """The learning rate by step: `warmup_steps` of linear rise, then `decay` to `final_share` of the peak."""

    warmup_steps: int = 20
    decay: str = "cosine"
    final_share: float = 0.1

    def __post_init__(self) -> None:
        """Refuse a schedule without meaning."""
        _one_of("schedule.decay", self.decay, ("cosine", "linear", "constant"))
        _check_count("schedule.warmup_steps", self.warmup_steps, "0 or more", least=0)
        _check("schedule.final_share", self.final_share, 0 <= self.final_share <= 1, "a share from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Length and rhythm of a run. One step is one update: `accumulate` micro-batches of `batch_size` blocks.

    `has_fused_modules` builds the model with the layers of `mezzotint.modules`, which keep less for backward. Every
    `watch_every` steps (0: never) ranges and lost updates are measured, into the metrics; see `mezzotint.trace.watch`.
    """

    steps: int = 200
    batch_size: int = 8
    accumulate: int = 1
    evaluate_every: int = 50
    evaluate_batches: int = 8
    save_every: int = 50
    keep_checkpoints: int = 3
    sample_tokens: int = 200
    sample_prompt: str = "def "
    compile: bool = False
    has_fused_modules: bool = False
    watch_every: int = 100

    def __post_init__(self) -> None:
        """Refuse counts below their least."""
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "evaluate_batches", "save_every"):
            _check_count(f"train.{name}", getattr(self, name), "at least 1")
        _check_count("train.keep_checkpoints", self.keep_checkpoints, "at least 1")
        _check_count("train.watch_every", self.watch_every, "0 (never) or more", least=0)
        _check_count("train.sample_tokens", self.sample_tokens, "0 (no sample) or more", least=0)
        _check("train.sample_prompt", self.sample_prompt, bool(self.sample_prompt), "at least one character")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides a run. `policy` is a policy text or "auto"; `device` is "auto", "cpu", "cuda", ..."""

    recipe: str
    policy: str = "auto"
    seed: int = 0
    device: str = "auto"
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        """Refuse what the parts cannot see: the policy's words, the seed, the devices."""
        if self.policy != "auto":
            parse_policy(self.policy)
        _check("seed", self.seed, 0 <= self.seed < 2**32, "from 0 to 2**32 - 1")
        _check(
            "device",
            self.device,
            self.device.split(":")[0] in ("auto", "cpu", "cuda", "mps", "xpu"),
            "auto, cpu, cuda, mps or xpu",
        )


def to_toml(config: RunConfig) -> str:
    """Return the whole configuration as TOML; `from_toml` reads it back to an equal value."""
    top = [f for f in fields(config) if not is_dataclass(getattr(config, f.name))]
    lines = [f"{f.name} = {_toml(getattr(config, f.name))}" for f in top]
    for section in (f for f in fields(config) if f not in top):
        part = getattr(config, section.name)
        lines += ["", f"[{section.name}]"]
        lines += [
            f"{f.name} = {_toml(getattr(part, f.name))}" for f in fields(part) if (section.name, f.name) not in DERIVED
        ]
    return "\n".join(lines) + "\n"


def from_toml(text: str, origin: str) -> RunConfig:
    """Return the configuration that `text` spells; what it leaves out has its default. Raises ConfigError."""
    try:
        values = tomllib.loads(text.removeprefix("\ufeff"))  # some editors put a mark in front
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond what Python reads
        raise ConfigError(f"{origin} is not TOML: {shortened(error)}") from None
    values.setdefault("recipe", origin.rsplit("/", 1)[-1].removesuffix(".toml"))
    return _build(RunConfig(recipe=values["recipe"]), values, origin)


def check_resumable(then: RunConfig, now: RunConfig, origin: str) -> None:
    """Raise ConfigError where a configuration changed since a checkpoint in what decides the run's numbers.

    What may change is in MAY_CHANGE: rhythm of saving, evaluating and watching, the sample, and names. The data may lie
    elsewhere, since their content is compared.
    """
    before, after = _flat(then), _flat(now)
    for key, value in after.items():
        if key not in MAY_CHANGE and value != before[key]:
            raise ConfigError(
                f"{origin}: {key} is {shortened(value, 90)} and was {shortened(before[key], 90)} when the checkpoint "
                "was saved; put it back, or start a new run with --out"
            )


def _flat(config: RunConfig) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for f in fields(config):
        part = getattr(config, f.name)
        if is_dataclass(part):
            values |= {
                f"{f.name}.{inner.name}": getattr(part, inner.name)
                for inner in fields(part)
                if (f.name, inner.name) not in DERIVED
            }
        else:
            values[f.name] = part
    return values


def with_settings(config: RunConfig, settings: Sequence[str]) -> RunConfig:
    """Return `config` with each `key=value` applied, e.g. `train.steps=100`; values are TOML, or bare text.

    Raises ConfigError for an unknown key (with the nearest), a value of the wrong type, or one out of range.
    """
    tree: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        path = key.strip().split(".")
        if not equals:
            raise ConfigError(f"--set {shortened(repr(setting))} has no '='; write for example train.steps=100")
        place = tree
        for name in path[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ConfigError(f"--set {shortened(repr(setting))}: {name} was given a value before")
        place[path[-1]] = typed_value(value.strip())
    return _build(config, tree, "--set")


def typed_value(text: str) -> Any:
    """Return a value as TOML reads it; what TOML does not know, and more than one line, is itself."""
    try:
        values = tomllib.loads(f"x = {text}")
    except (ValueError, RecursionError):
        return text
    return values["x"] if len(values) == 1 else text


def _build(base: Config, values: Mapping[str, Any], origin: str, prefix: str = "") -> Config:
    """Return `base` with `values` put in, checked against the types of its fields."""
    hints = get_type_hints(type(base))
    known = [f.name for f in fields(base) if (prefix.rstrip("."), f.name) not in DERIVED]
    changes: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if name not in known:
            everything = [prefix + word for word in known] if prefix else _all_keys()
            near = get_close_matches(key, _all_keys(), n=2, cutoff=0.5) or everything
            raise ConfigError(f"{origin}: unknown setting {shortened(key)}; did you mean {' or '.join(near)}?")
        if is_dataclass(getattr(base, name)):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{origin}: {key} is a section; set one of its keys, such as {key}.{_first(base, name)}"
                )
            changes[name] = _build(getattr(base, name), value, origin, f"{key}.")
        else:
            changes[name] = _typed(key, value, hints[name], origin)
    try:
        return replace(base, **changes)
    except MezzotintError as error:
        raise ConfigError(f"{origin}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{origin}: {prefix}{error}") from None


def _all_keys() -> list[str]:
    plain = RunConfig(recipe="")
    keys = []
    for f in fields(plain):
        part = getattr(plain, f.name)
        if is_dataclass(part):
            keys += [f"{f.name}.{inner.name}" for inner in fields(part) if (f.name, inner.name) not in DERIVED]
        else:
            keys.append(f.name)
    return keys


def _first(base: Any, name: str) -> str:
    return fields(getattr(base, name))[0].name


def _typed(key: str, value: Any, hint: Any, origin: str) -> Any:
    """Return `value` as `hint` wants it; a whole number serves as a float, one text as a list of one."""
    if get_origin(hint) is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{origin}: {key}={shortened(repr(value))} is refused; pass a list of texts")
        return tuple(items)
    wanted = next(arg for arg in get_args(hint) if arg is not type(None)) if isinstance(hint, UnionType) else hint
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{origin}: {key} has {len(str(value))} digits, more than a float64 holds") from None
    if wanted is str and not isinstance(value, (str, dict, list)):
        return json.dumps(value) if isinstance(value, bool) else str(value)
    if not isinstance(value, wanted) or (wanted is not bool and isinstance(value, bool)):
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ConfigError(f"{origin}: {key}={shortened(repr(value))} is refused; pass {kinds[wanted]}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # TOML escapes what JSON escapes, and DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return repr(value)


def _check(name: str, value: Any, is_good: bool, limit: str) -> None:
    if not is_good:
        raise ConfigError(f"{name}={shortened(value)} is refused; pass {limit}")


def _check_count(name: str, value: int, limit: str, *, least: int = 1) -> None:
    _check(name, value, value >= least, limit)
    _check(name, value, value <= LARGEST_COUNT, f"at most {LARGEST_COUNT}")


def _one_of(name: str, value: str, words: tuple[str, ...]) -> None:
    if value not in words:
        near = get_close_matches(value, words, n=1)
        raise ConfigError(f"{name}={shortened(repr(value))} is refused; pass {' or '.join(near or words)}")
