"""Tokenizers: text there and back, the same every time, whatever the characters."""

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.data.config import DataConfig
from mezzotint.data.sources import Text
from mezzotint.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, check_tokenizer, encode_all
from mezzotint.errors import DataError

TEXTS = [Text(origin="a", content=b"def add(left, right):\n    return left + right\n" * 50)]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # a surrogate alone is no text


def trained(vocab_size: int = 270) -> BpeTokenizer:
    return BpeTokenizer.train(TEXTS, vocab_size)


TRAINED = trained()


@settings(deadline=None)
@given(text=ANY_TEXT)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TRAINED], ids=["bytes", "bpe"])
def test_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= number < tokenizer.vocab_size for number in ids)


def test_bytes_are_utf_8() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 256
    assert tokenizer.encode("aä€") == [97, 195, 164, 226, 130, 172]
    assert tokenizer.decode([0xE2, 0x82]) == "\ufffd"


def test_training_again_gives_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    trained().save(first)
    trained().save(second)
    assert first.read_bytes() == second.read_bytes()


def test_what_is_saved_loads_as_the_same(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "t.json")
    loaded = BpeTokenizer.load(tmp_path / "t.json")
    assert loaded.vocab_size == TRAINED.vocab_size == 270
    assert loaded.encode(TEXTS[0].content.decode()) == TRAINED.encode(TEXTS[0].content.decode())


def test_a_folder_that_is_missing_raises_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        TRAINED.save(tmp_path / "missing" / "t.json")
    with pytest.raises(OSError, match="missing"):
        BpeTokenizer.load(tmp_path / "missing" / "t.json")


def test_pairs_are_merged_and_short_data_give_fewer_tokens() -> None:
    text = TEXTS[0].content.decode()
    assert len(TRAINED.encode(text)) < len(text) / 2
    assert 256 < trained(10_000).vocab_size < 400


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_are_as_narrow_as_the_vocabulary_allows(vocab_size: int, dtype: type) -> None:
    class Last:
        """Gives every text its highest id."""

        def __init__(self) -> None:
            self.vocab_size = vocab_size

        def encode(self, text: str) -> list[int]:
            return [vocab_size - 1] * len(text)

        def decode(self, ids: list[int]) -> str:
            return "?" * len(ids)

    ids = encode_all([Text(origin="a", content=b"ab"), Text(origin="b", content=b"c")], Last())
    assert ids.dtype == dtype
    assert ids.tolist() == [vocab_size - 1] * 3


def test_documents_follow_each_other() -> None:
    texts = [Text(origin="a", content="ä".encode()), Text(origin="b", content=b"bc")]
    ids = encode_all(texts, ByteTokenizer())
    assert ids.dtype == np.uint8
    assert ids.tobytes().decode() == "äbc"
    assert TRAINED.decode(encode_all(texts, TRAINED).tolist()) == "äbc"


def test_without_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    check_tokenizer(DataConfig(tokenizer="bpe"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'mezzotint\[bpe\]'"):
        check_tokenizer(DataConfig(tokenizer="bpe"))
    check_tokenizer(DataConfig(tokenizer="bytes"))
