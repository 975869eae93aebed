"""Token files: made once, found again, split without overlap; tokenizers there and back."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from mezzotint.data import tokens
from mezzotint.data.config import DataConfig
from mezzotint.data.tokenizer import BpeTokenizer, ByteTokenizer
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
    copy.write_bytes(source.read_bytes()[:-1] + b"!")
    assert open_corpus(config(copy), block_size=16).digest != digest


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


def test_bpe_without_its_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'mezzotint\[bpe\]'"):
        open_corpus(config(source, tokenizer="bpe"), block_size=16)


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("aä€")) == "aä€"
    assert tokenizer.decode([0xE2, 0x82]) == "�"


def test_a_cache_that_cannot_be_written_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEZZOTINT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="set MEZZOTINT_CACHE"):
        open_corpus(config(source), block_size=16)


def test_a_home_that_cannot_be_written_is_passed_over(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.delenv("MEZZOTINT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert open_corpus(config(source), block_size=16).num_train > 0
    assert list(tmp_path.glob("mezzotint-*/tokens/*.npy"))


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
        {"tokenizer": "words"},
        {"vocab_size": 10},
        {"validation_share": 0.0},
        {"validation_share": 1.0},
        {"max_bytes": 0},
    ],
)
def test_settings_under_which_nothing_can_be_read(changes: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        DataConfig(**changes)
