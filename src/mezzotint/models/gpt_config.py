"""The shape of the reference language model, loadable without torch."""

import math
from dataclasses import dataclass

from mezzotint.errors import shortened


@dataclass(frozen=True, slots=True, kw_only=True)
class GPTConfig:
    """A decoder-only language model. Raises ValueError where the numbers do not fit each other.

    `ffn_dim` is the width of the gated feed-forward layer, `loss_chunk_rows` the number of tokens whose float32
    logits are held at a time. `is_residual_compact` casts the embedding's output to the dtype of autocast, so that the
    residual stream, and what norms keep of it for backward, has that dtype too; by autocast's own rules it is float32
    as long as the embedding is, so this rounds every sum of the stream where plain autocast does not.
    """

    vocab_size: int = 256
    block_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    dim: int = 128
    ffn_dim: int = 384
    dropout: float = 0.0
    is_head_tied: bool = True
    rope_base: float = 10000.0
    loss_chunk_rows: int = 512
    is_residual_compact: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        for name in ("vocab_size", "block_size", "num_layers", "num_heads", "dim", "ffn_dim", "loss_chunk_rows"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={shortened(value)} is refused; pass at least 1")
        if self.dim % self.num_heads:
            raise ValueError(
                f"dim={shortened(self.dim)} is not divisible by num_heads={shortened(self.num_heads)}; "
                "change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"dim={self.dim} over num_heads={self.num_heads} gives heads of {self.head_dim}, and rotary positions "
                "need an even number; change one of them"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is refused; pass a share from 0 up to, not including, 1")
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base={self.rope_base} is refused; pass a number above 1, usually 10000")

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.dim // self.num_heads
