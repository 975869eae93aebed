"""Hostile files and settings: recipes, designs, configs, snapshots, results of bench, and text to train on."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hostile import WorkBegins, check, contents, damaged, empty_folder, examples, numbers, run, texts, work_begins
from hypothesis import given
from hypothesis import strategies as st

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"
SMALL = """recipe = "small"
policy = "float32"
seed = 1
[model]
dim = 16
num_layers = 1
num_heads = 2
ffn_dim = 16
block_size = 8
[data]
source = ["text.txt"]
[train]
steps = 1
batch_size = 2
"""
CONFIG = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 1, "n_head": 2,
    "vocab_size": 100, "n_positions": 64, "resid_pdrop": 0.1, "torch_dtype": "float32",
}  # fmt: skip
KEYS = (
    *("model.dim", "model.num_layers", "model.num_heads", "model.ffn_dim", "model.block_size", "model"),
    *("data.source", "data.tokenizer", "data.vocab_size", "data.validation_share", "data.max_bytes"),
    *("train.steps", "train.batch_size", "train.accumulate", "train.sample_prompt", "schedule.decay", "policy"),
    *("optimizer.name", "optimizer.learning_rate", "optimizer.eps", "seed", "device", "recipe", "", "a.b.c"),
)
# sizes between these and the small ones are honest wishes, which cost what they cost
SIZES = ("0", "-1", "1000000000", "1e9", "1" + "0" * 400, "9223372036854775808", "true", "[]", "{}", "nan", "inf")


@cache
def sources() -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Return good files, and the command that reads each (`FILE` stands for its path)."""
    design = """target = "small.toml"\nseeds = 2\nmax_seeds = 0\n"""
    from mezzotint.proving.design_file import design_to_toml
    from mezzotint.proving.targets import experiment_for

    with empty_folder() as folder:
        (folder / "small.toml").write_text(SMALL)
        (folder / "text.txt").write_text("some words to train on, " * 200)
        design = design_to_toml(experiment_for("small.toml", arms=["float32", "bf16-mixed"], seeds=2, settings=[]))
    bench = json.loads((RECORDS / "bench_cpu-2026-11-24.json").read_text())
    bench["cases"] = bench["cases"][:2]
    snapshot = (RECORDS / "autocast-2.13.0.json").read_bytes()
    return {
        "recipe.toml": (SMALL.encode(), ("train", "FILE", "--out", "run")),
        "design.toml": (design.encode(), ("prove", "FILE", "--out", "proof")),
        "bench.json": (json.dumps(bench).encode(), ("bench", "--compare", "FILE", "FILE")),
        "snapshot.json": (snapshot, ("policy", "--diff", "FILE", "--against", "FILE")),
        "config.json": (json.dumps(CONFIG).encode(), ("plan", "--no-report", "--from-config", "FILE")),
        "text.txt": (
            "ein Text, 文字, text. ".encode() * 300,
            ("train", "small.toml", "--data", "FILE", "--out", "run"),
        ),
    }


def values() -> st.SearchStrategy[Any]:
    """Values of JSON, hostile ones among them."""
    plain = st.one_of(
        st.none(), st.booleans(), st.integers(-2, 2), st.floats(), st.sampled_from([10**9, 10**12, 2**63, 10**399]),
        st.sampled_from(["", "Ж" * 5000, "float32", "inf", "a\nb", "\0"]),
    )  # fmt: skip
    return st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=2))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values of a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def replaced(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a JSON tree with another value at a place."""
    if not path:
        return value
    items = dict(tree) if isinstance(tree, dict) else list(tree)
    items[path[0]] = replaced(items[path[0]], path[1:], value)
    return items


@st.composite
def hostile_files(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file that a command reads, with bytes or with values that nobody would write."""
    name = draw(st.sampled_from(sorted(sources())))
    content = sources()[name][0]
    kind = draw(st.sampled_from(["damaged", "encoding", "deep", "value", "value", "value"]))
    if kind == "encoding":
        encoding = draw(st.sampled_from(["utf-16", "utf-8-sig", "utf-32"]))
        return name, content.decode().encode(encoding)
    if kind == "deep":
        return name, b"x = " * name.endswith("toml") + b"[" * 3000 + b"]" * 3000
    if kind == "value" and name.endswith("json"):
        tree = json.loads(content)
        path = draw(st.sampled_from(places(tree)))
        return name, json.dumps(replaced(tree, path, draw(values()))).encode("utf-8", "surrogatepass")
    if kind == "value" and name.endswith("toml"):
        lines = content.decode().splitlines()
        number = draw(st.integers(0, len(lines) - 1))
        key = lines[number].split("=")[0]
        lines[number] = f"{key}= {draw(st.sampled_from(SIZES) | numbers() | texts().map(json.dumps))}"
        return name, "\n".join(lines).encode("utf-8", "surrogatepass")
    return name, draw(damaged(content))


@examples(30)
@given(hostile_files(), st.booleans())
def test_hostile_files_are_refused_by_a_sentence(file: tuple[str, bytes], is_json: bool) -> None:
    name, content = file
    arguments = tuple(name if word == "FILE" else word for word in sources()[name][1])
    arguments = (arguments[0], *(["--json"] if is_json else []), *arguments[1:])
    with empty_folder() as folder, work_begins():
        for known, (good, _) in sources().items():
            (folder / known).write_bytes(good)
        (folder / "small.toml").write_text(SMALL)
        (folder / name).write_bytes(content)
        before = contents(folder)
        ended = run(*arguments)
        check(ended, arguments)
        if ended.code == 2:
            assert contents(folder) == before, f"{ended} wrote {set(contents(folder)) ^ set(before)}"


@st.composite
def hostile_settings(draw: st.DrawFn) -> str:
    key = draw(st.sampled_from(KEYS) | texts())
    return f"{key}={draw(st.sampled_from(SIZES) | numbers() | texts())}"


@examples(20)
@given(st.lists(hostile_settings(), min_size=1, max_size=3))
def test_hostile_settings_are_refused_by_a_sentence(settings: list[str]) -> None:
    arguments = ("train", "small.toml", "--out", "run", *(word for one in settings for word in ("--set", one)))
    with empty_folder() as folder, work_begins():
        (folder / "small.toml").write_text(SMALL)
        (folder / "text.txt").write_text("some words to train on, " * 200)
        before = contents(folder)
        ended = run(*arguments)
        check(ended, arguments)
        if ended.code == 2:
            assert contents(folder) == before, f"{ended} wrote {set(contents(folder)) ^ set(before)}"


def test_the_good_files_are_good() -> None:
    for name, (content, words) in sources().items():
        arguments = tuple(name if word == "FILE" else word for word in words)
        with empty_folder() as folder, work_begins():
            (folder / "text.txt").write_text("some words to train on, " * 200)
            (folder / "small.toml").write_text(SMALL)
            (folder / name).write_bytes(content)
            ended = run(*arguments)
            assert ended.begun or ended.code in (0, 1), (name, ended)
    assert WorkBegins
