"""What a run reads: sources, tokenizer, split. Loadable without torch."""

from dataclasses import dataclass

from mezzotint.errors import ConfigError, shortened

STDLIB = "stdlib"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """The text of a run.

    `source` lists files, folders, `hf:NAME` for a Hugging Face dataset, or `stdlib`, the Python source of the running
    interpreter's standard library. `tokenizer` is `bytes`, 256 tokens, or `bpe`, trained on the data to `vocab_size`
    tokens. The last `validation_share` of the tokens is held out. `max_bytes` bounds what is read.
    """

    source: tuple[str, ...] = (STDLIB,)
    tokenizer: str = "bytes"
    vocab_size: int = 4096
    validation_share: float = 0.05
    max_bytes: int = 8_000_000

    def __post_init__(self) -> None:
        """Refuse settings under which nothing could be read."""
        if not self.source or not all(self.source):
            raise ConfigError("data.source is empty; name a file, a folder or stdlib")
        if self.tokenizer not in ("bytes", "bpe"):
            raise ConfigError(f"data.tokenizer must be bytes or bpe, got {shortened(repr(self.tokenizer))}")
        if not 257 <= self.vocab_size <= 2**20:
            raise ConfigError(f"data.vocab_size must be 257 to 1048576, got {shortened(self.vocab_size)}")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"data.validation_share must be between 0 and 1, got {self.validation_share}; use 0.05")
        if self.max_bytes < 1:
            raise ConfigError(f"data.max_bytes must be at least 1, got {shortened(self.max_bytes)}")
