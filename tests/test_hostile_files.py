"""Files that users name, with content that no parser likes: an error of ours names the file, whoever reads it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mezzotint.auditing.programs.config_program import read_config
from mezzotint.cli.train import _load
from mezzotint.errors import MezzotintError, PlanError
from mezzotint.hardware.gpus import find_gpu
from mezzotint.policy.autocast import load_snapshot
from mezzotint.proving.targets import experiment_for

DEEP = "[" * 3000 + "]" * 3000
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "model config": (".json", read_config),
    "snapshot of autocast": (".json", load_snapshot),
    "GPU": (".toml", lambda path: find_gpu(str(path))),
    "recipe of train": (".toml", lambda path: _load(str(path))),
    "design or recipe of prove": (".toml", lambda path: experiment_for(str(path), seeds=2)),
}
CONTENTS = {
    "deep": (f'{{"model_type": {DEEP}}}', f"arms = {DEEP}"),
    "digits": (f'{{"model_type": "gpt2", "n_embd": {"9" * 5000}}}', f"arms = {'9' * 5000}"),
    "not UTF-8": ("\udcff", "\udcff"),
    "long text": (json.dumps({"model_type": "x" * 10_000}), f'arms = "{"x" * 10_000}"'),
    "empty": ("", "policy = 3.5\ndevice = 'x'"),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_odd_content(tmp_path: Path, reader: str, content: str) -> None:
    suffix, read = READERS[reader]
    path = tmp_path / f"odd{suffix}"
    path.write_text(CONTENTS[content][suffix == ".toml"], encoding="utf-8", errors="surrogateescape")
    with pytest.raises(MezzotintError) as caught:
        read(path)
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_is_not_waited_for(tmp_path: Path, reader: str) -> None:
    suffix, read = READERS[reader]
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    with pytest.raises(MezzotintError, match="not a regular file"):
        read(path)


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 10**9, "num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**9},
        {"hidden_size": 100_000, "num_hidden_layers": 50, "intermediate_size": 400_000},
        {"hidden_size": 10**6, "vocab_size": 10**6},
        {"hidden_size": 1e300},
        {"vocab_size": -1},
        {"num_attention_heads": 10**12},
        {"text_config": {"hidden_size": 10**6, "vocab_size": 10**6}},
    ],
)
def test_models_that_nobody_can_build(tmp_path: Path, sizes: dict[str, object]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **sizes}))
    with pytest.raises(PlanError, match=r"config\.json: .*must"):
        read_config(path)
