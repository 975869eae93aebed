"""Token files: made once from the sources, cached, memory-mapped, split into a part to train on and a part held out.

The cache lies in $MEZZOTINT_CACHE, else in the user's cache folder, else (a home that cannot be written) in a temporary
folder. A file is named by the digest of the sources' content and the tokenizer's settings, so a changed source makes
another file, and two runs with the same digest see the same tokens. A file ends with the SHA-256 of its tokens and its
tokenizer, which is verified whenever it is opened; a file that does not match is made again.
"""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.data.config import DataConfig
from mezzotint.data.sources import Text, read_sources
from mezzotint.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, check_tokenizer, encode_all
from mezzotint.errors import DataError

Ids = np.ndarray[Any, np.dtype[Any]]
_SUM_BYTES = 32
LAYOUT = "tokens/1"  # changes when the files below change their meaning


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Token ids to train on and held out, one-dimensional and memory-mapped; `digest` identifies them."""

    train_ids: Ids
    validation_ids: Ids
    tokenizer: Tokenizer
    digest: str
    tokens_digest: str = ""  # of the token file's content, and of its tokenizer

    @property
    def vocab_size(self) -> int:
        """How many tokens there are."""
        return self.tokenizer.vocab_size

    @property
    def num_train(self) -> int:
        """How many tokens there are to train on."""
        return len(self.train_ids)

    @property
    def num_validation(self) -> int:
        """How many tokens are held out."""
        return len(self.validation_ids)


def open_corpus(config: DataConfig, *, block_size: int) -> Corpus:
    """Return the tokens that `config` describes, from the cache or made now.

    The last `validation_share` of them is held out, at least one block. Raises DataError where there is no text, or
    less than one block for each part.
    """
    check_tokenizer(config)
    texts = read_sources(config.source, config.max_bytes)
    digest = _digest(texts, config)
    ids, tokenizer, tokens_digest = _cached(digest, texts, config)
    needed = block_size + 1  # a block's targets are its inputs, one token on
    num_validation = max(round(len(ids) * config.validation_share), needed)
    if len(ids) < num_validation + needed:
        raise DataError(
            f"the data hold {len(ids)} tokens, less than two blocks of {needed} (one to train on, one held out); pass "
            "more text or a smaller model.block_size"
        )
    split = len(ids) - num_validation
    return Corpus(
        train_ids=ids[:split],
        validation_ids=ids[split:],
        tokenizer=tokenizer,
        digest=digest,
        tokens_digest=tokens_digest,
    )


def _digest(texts: list[Text], config: DataConfig) -> str:
    """Return the digest of content and settings; where the text lies does not count."""
    settings = {"layout": LAYOUT, "tokenizer": config.tokenizer, "validation_share": config.validation_share}
    if config.tokenizer == "bpe":
        settings["vocab_size"] = config.vocab_size
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for text in texts:
        digest.update(len(text.content).to_bytes(8, "little"))
        digest.update(text.content)
    return digest.hexdigest()


def _cached(digest: str, texts: list[Text], config: DataConfig) -> tuple[Ids, Tokenizer, str]:
    refused = []
    for folder in _cache_folders():
        ids_path, tokenizer_path = folder / f"{digest[:32]}.npy", folder / f"{digest[:32]}.json"
        # files that are missing or damaged are made again
        with suppress(Exception):
            return _load(ids_path, tokenizer_path, config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _make(ids_path, tokenizer_path, texts, config)
            return _load(ids_path, tokenizer_path, config)
        except OSError as error:  # a folder that cannot be written, or is full: the next may do
            refused.append(f"{folder} ({error.strerror or error})")
    raise DataError(
        f"the token file cannot be written into {' or '.join(refused) or 'any folder'}; set MEZZOTINT_CACHE to a "
        "folder with space for it"
    )


def _load(ids_path: Path, tokenizer_path: Path, config: DataConfig) -> tuple[Ids, Tokenizer, str]:
    """Return tokens, tokenizer and their digest. Raises where a file is missing or not the one that was written."""
    if not ids_path.is_file() or (config.tokenizer == "bpe" and not tokenizer_path.is_file()):
        raise FileNotFoundError(ids_path)
    found = _sum_of(ids_path, tokenizer_path, config)
    with ids_path.open("rb") as file:
        file.seek(-_SUM_BYTES, os.SEEK_END)
        if file.read() != found:
            raise ValueError(f"{ids_path} does not match its checksum")
    ids = np.load(ids_path, mmap_mode="r")
    tokenizer = BpeTokenizer.load(tokenizer_path) if config.tokenizer == "bpe" else ByteTokenizer()
    return ids, tokenizer, found.hex()


def _sum_of(ids_path: Path, tokenizer_path: Path, config: DataConfig) -> bytes:
    """Return the SHA-256 of a token file up to where its own is, and of its tokenizer."""
    digest = hashlib.sha256(tokenizer_path.read_bytes() if config.tokenizer == "bpe" else b"")
    with ids_path.open("rb") as file:
        room = os.fstat(file.fileno()).st_size - _SUM_BYTES
        while room > 0 and (content := file.read(min(room, 2**20))):
            digest.update(content)
            room -= len(content)
    return digest.digest()


def _make(ids_path: Path, tokenizer_path: Path, texts: list[Text], config: DataConfig) -> None:
    """Write tokenizer and tokens under temporary names and rename them, the tokens last: they mark completeness."""
    tokenizer: Tokenizer = ByteTokenizer()
    unique = f"{os.getpid()}.{os.urandom(4).hex()}.partial"
    if config.tokenizer == "bpe":
        tokenizer = trained = BpeTokenizer.train(texts, config.vocab_size)
        partial = tokenizer_path.with_suffix(f".json.{unique}")
        try:
            trained.save(partial)
            partial.replace(tokenizer_path)
        finally:
            _remove(partial)
    partial = ids_path.with_suffix(f".npy.{unique}")
    try:
        with partial.open("wb") as file:
            np.save(file, encode_all(texts, tokenizer))
            file.write(bytes(_SUM_BYTES))
            file.flush()
        total = _sum_of(partial, tokenizer_path, config)
        with partial.open("r+b") as file:
            file.seek(-_SUM_BYTES, os.SEEK_END)
            file.write(total)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(ids_path)
    finally:
        _remove(partial)


def _remove(partial: Path) -> None:
    with suppress(OSError):  # the error that is on its way matters more
        partial.unlink()


def _cache_folders() -> Iterator[Path]:
    chosen = os.environ.get("MEZZOTINT_CACHE")
    if chosen:
        yield Path(chosen)
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    with suppress(RuntimeError):  # a user without a home, as in some containers
        yield (Path(base) if base else Path.home() / ".cache") / "mezzotint" / "tokens"
    with suppress(OSError):
        yield _private(Path(tempfile.gettempdir()) / f"mezzotint-{_user()}") / "tokens"


def _private(folder: Path) -> Path:
    """Make a folder that only this user can read; raise OSError where another user made it, or a link is there."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid"):
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        folder.chmod(0o700)
    return folder


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
