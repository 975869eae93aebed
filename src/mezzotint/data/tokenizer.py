"""Text to token ids and back: bytes as they are, or byte-pair encoding trained on the data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mezzotint.data.config import DataConfig
from mezzotint.data.sources import Text
from mezzotint.errors import DataError


class Tokenizer(Protocol):
    """Turns text into token ids below `vocab_size`, and back."""

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; what is no UTF-8 becomes a replacement character."""


class ByteTokenizer:
    """Each UTF-8 byte is a token."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text whose UTF-8 bytes are `ids`."""
        return bytes(ids).decode(errors="replace")


class BpeTokenizer:
    """Byte-level byte-pair encoding by the `tokenizers` library; every text can be encoded."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @property
    def vocab_size(self) -> int:
        """How many tokens there are; fewer than asked for where the data were short."""
        return int(self._inner.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return list(self._inner.encode(text).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`."""
        return str(self._inner.decode(list(ids)))

    @classmethod
    def train(cls, texts: Sequence[Text], vocab_size: int) -> "BpeTokenizer":
        """Return a tokenizer of at most `vocab_size` tokens, the same for the same texts."""
        library = _library()
        inner = library.Tokenizer(library.models.BPE())
        inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            show_progress=False,
            initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        )
        inner.train_from_iterator((text.content.decode() for text in texts), trainer)
        return cls(inner)

    @classmethod
    def load(cls, path: Path) -> "BpeTokenizer":
        """Return the tokenizer that `save` wrote."""
        # read and written here: the library's own reading and writing raise no OSError
        return cls(_library().Tokenizer.from_str(path.read_text(encoding="utf-8")))

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON."""
        path.write_text(self._inner.to_str(pretty=True), encoding="utf-8")


def encode_all(texts: Sequence[Text], tokenizer: Tokenizer) -> np.ndarray[Any, np.dtype[Any]]:
    """Return the ids of all texts in a row, uint8, uint16 or uint32 as the vocabulary needs."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(b"".join(text.content for text in texts), dtype=np.uint8)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    parts = [np.asarray(tokenizer.encode(text.content.decode()), dtype=dtype) for text in texts]
    return np.concatenate(parts)


def check_tokenizer(config: DataConfig) -> None:
    """Raise DataError where the configured tokenizer needs a library that is missing."""
    if config.tokenizer == "bpe":
        _library()


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError:
        raise DataError("data.tokenizer=bpe needs a package: pip install 'mezzotint[bpe]'") from None
    return tokenizers
