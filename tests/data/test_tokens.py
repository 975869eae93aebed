"""Token files: made once, found again, made again where they are damaged, split without overlap."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.data import tokens
from mezzotint.data.config import DataConfig
from mezzotint.data.tokenizer import BpeTokenizer
from mezzotint.data.tokens import open_corpus
from mezzotint.errors import ConfigError, DataError


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("def function(argument):\n    return argument + 1  # ä€\n" * 200, encoding="utf-8")
    return path


def config(source: Path, **changes) -> DataConfig:
    return DataConfig(source=(str(source),), **changes)


def test_bytes_are_the_text(source: Path) -> None:
    corpus = open_corpus(config(source, validation_share=0.25), block_size=16)
    everything = np.concatenate([corpus.train_ids, corpus.validation_ids])
    assert everything.tobytes() == source.read_bytes()
    assert corpus.num_validation == round(0.25 * len(everything))
    assert corpus.vocab_size == 256
    assert isinstance(corpus.train_ids, np.memmap)


def test_the_file_is_made_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_corpus(config(source), block_size=16)
    (made,) = (tmp_path / "cache").glob("*.npy")

    def fail(*_args: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(tokens, "_make", fail)
    second = open_corpus(config(source), block_size=16)
    assert second.digest == first.digest
    assert np.array_equal(second.train_ids, first.train_ids)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [made.name]


def test_the_digest_follows_content_and_settings_and_not_the_place(source: Path, tmp_path: Path) -> None:
    digest = open_corpus(config(source), block_size=16).digest
    copy = tmp_path / "copy.txt"
    copy.write_bytes(source.read_bytes())
    assert open_corpus(config(copy), block_size=16).digest == digest
    assert open_corpus(config(source, validation_share=0.1), block_size=16).digest != digest
    assert open_corpus(config(source, tokenizer="bpe", vocab_size=300), block_size=16).digest != digest
    assert open_corpus(config(source, vocab_size=300), block_size=16).digest == digest  # bytes are 256 whatever it says
    assert open_corpus(config(source, max_bytes=5000), block_size=16).digest != digest
    copy.write_bytes(source.read_bytes()[:-1] + b"!")
    assert open_corpus(config(copy), block_size=16).digest != digest


@pytest.mark.parametrize("block_size", [16, 5000])
def test_the_parts_do_not_overlap_and_hold_a_block_each(source: Path, block_size: int) -> None:
    corpus = open_corpus(config(source, validation_share=0.0001), block_size=block_size)
    assert corpus.num_validation == block_size + 1
    assert corpus.num_train + corpus.num_validation == len(source.read_bytes())
    assert corpus.train_ids.tobytes() + corpus.validation_ids.tobytes() == source.read_bytes()


def test_the_limit_is_not_even_one_character(source: Path) -> None:
    source.write_text("ä" * 100, encoding="utf-8")
    with pytest.raises(DataError, match="hold 0 tokens"):
        open_corpus(config(source, max_bytes=1), block_size=16)


def test_too_short(source: Path) -> None:
    source.write_text("short text")
    with pytest.raises(DataError, match=r"10 tokens, less than two blocks of 17 .* smaller model\.block_size"):
        open_corpus(config(source), block_size=16)


def test_bpe_there_and_back_and_the_same_every_time(source: Path) -> None:
    corpus = open_corpus(config(source, tokenizer="bpe", vocab_size=300), block_size=16)
    assert isinstance(corpus.tokenizer, BpeTokenizer)
    assert 256 < corpus.vocab_size <= 300
    text = "def other(x):\n\treturn 'ß🙂'\n"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text)) == text
    ids = np.concatenate([corpus.train_ids, corpus.validation_ids]).tolist()
    assert corpus.tokenizer.decode(ids) == source.read_text(encoding="utf-8")
    assert max(ids) < corpus.vocab_size
    again = open_corpus(config(source, tokenizer="bpe", vocab_size=300), block_size=16)
    assert again.tokenizer.encode(text) == corpus.tokenizer.encode(text)
    cache = Path(os.environ["MEZZOTINT_CACHE"])
    assert sorted(path.name for path in cache.iterdir()) == [f"{corpus.digest[:32]}.{end}" for end in ("json", "npy")]


def test_bpe_without_its_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'mezzotint\[bpe\]'"):
        open_corpus(config(source, tokenizer="bpe"), block_size=16)


def test_a_cache_that_cannot_be_written_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match=r"into .*file/cache \(Not a directory\); set MEZZOTINT_CACHE"):
        open_corpus(config(source), block_size=16)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_read_only_cache_is_said_and_still_serves_what_it_holds(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    settings = config(source, tokenizer=tokenizer, vocab_size=300)
    made = open_corpus(settings, block_size=16)
    opened = Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **settings: Any) -> Any:
        if "w" in mode and "cache" in self.parts:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, mode, *args, **settings)

    monkeypatch.setattr(Path, "open", refuse)
    assert np.array_equal(open_corpus(settings, block_size=16).train_ids, made.train_ids)
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"cache \(Permission denied\); set MEZZOTINT_CACHE"):
        open_corpus(settings, block_size=16)


@pytest.mark.parametrize("damage", ["empty", "cut", "other", "gone"])
@pytest.mark.parametrize("ending", ["npy", "json"])
def test_a_damaged_file_is_made_again(source: Path, tmp_path: Path, damage: str, ending: str) -> None:
    settings = config(source, tokenizer="bpe", vocab_size=300)
    first = open_corpus(settings, block_size=16)
    (path,) = (tmp_path / "cache").glob(f"*.{ending}")
    content = path.read_bytes()
    path.unlink()  # the mapping above keeps the old file
    if damage != "gone":
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "other": b"something else"}[damage])
    second = open_corpus(settings, block_size=16)
    assert np.array_equal(second.train_ids, first.train_ids)
    assert path.read_bytes() == content
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_flipped_bits_in_the_cache_never_change_a_token(source: Path, tmp_path: Path, tokenizer: str) -> None:
    settings = config(source, tokenizer=tokenizer, vocab_size=300)
    first = open_corpus(settings, block_size=16)
    for path in list((tmp_path / "cache").iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), len(content) // 12):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            path.unlink()
            path.write_bytes(damaged)
            second = open_corpus(settings, block_size=16)
            assert np.array_equal(second.train_ids, first.train_ids)
            assert second.tokens_digest == first.tokens_digest
            assert path.read_bytes() == content


def test_a_home_that_cannot_be_written_is_passed_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.delenv("MEZZOTINT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert open_corpus(config(source), block_size=16).num_train > 0
    assert list(tmp_path.glob("mezzotint-*/tokens/*.npy"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "home"))
    with pytest.raises(DataError, match=r"home/\.cache/mezzotint/tokens \(.*\).*; set MEZZOTINT_CACHE"):
        open_corpus(config(source, validation_share=0.1), block_size=16)


def test_a_user_without_a_home(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MEZZOTINT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert open_corpus(config(source), block_size=16).num_train > 0


def test_a_home_is_used_where_nothing_else_is_said(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEZZOTINT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_corpus(config(source), block_size=16)
    assert list((tmp_path / "xdg").glob("mezzotint/tokens/*.npy"))


def test_a_maker_that_dies_leaves_no_token_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError):
        open_corpus(config(source), block_size=16)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"source": ()},
        {"source": ("",)},
        {"tokenizer": "words"},
        {"vocab_size": 10},
        {"validation_share": 0.0},
        {"validation_share": 1.0},
        {"validation_share": float("nan")},
        {"max_bytes": 0},
    ],
)
def test_settings_under_which_nothing_can_be_read(changes: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        DataConfig(**changes)
