"""Batches in a fixed order: what batch i holds follows from the seed and i alone, so a position is one number."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mezzotint.data.tokens import Corpus, Ids


class Batches:
    """Training batches by index, and the validation batches.

    An epoch cuts the training tokens into blocks that do not overlap, from an offset of its own, and takes them in a
    random order. Batches cross epochs without a gap.
    """

    def __init__(self, corpus: Corpus, *, block_size: int, batch_size: int, seed: int) -> None:
        self._corpus = corpus
        self._block_size = block_size
        self._batch_size = batch_size
        self._seed = seed
        # one block less than would fit, so that every offset below a block leaves as many
        self._num_blocks = max((corpus.num_train - 1) // block_size - 1, 1)
        self._order = lru_cache(maxsize=2)(self._shuffled)

    @property
    def blocks_per_epoch(self) -> int:
        """How many blocks an epoch holds."""
        return self._num_blocks

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return input and target ids of batch `index`, each int64 (B, T); targets are the inputs one token on."""
        starts = []
        for position in range(index * self._batch_size, (index + 1) * self._batch_size):
            epoch, place = divmod(position, self._num_blocks)
            offset, order = self._order(epoch)
            starts.append(offset + int(order[place]) * self._block_size)
        return self._take(self._corpus.train_ids, starts)

    def validation(self, num_batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield up to `num_batches` batches, always the same, spread evenly over the held-out tokens."""
        ids = self._corpus.validation_ids
        num_blocks = (len(ids) - 1) // self._block_size
        wanted = min(num_batches * self._batch_size, num_blocks)
        places = np.linspace(0, num_blocks - 1, wanted).round().astype(int)
        for first in range(0, wanted, self._batch_size):
            yield self._take(ids, [int(place) * self._block_size for place in places[first : first + self._batch_size]])

    def _shuffled(self, epoch: int) -> tuple[int, np.ndarray[Any, np.dtype[Any]]]:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        slack = self._corpus.num_train - 1 - self._num_blocks * self._block_size
        offset = int(generator.integers(0, min(slack, self._block_size) + 1))
        return offset, generator.permutation(self._num_blocks)

    def _take(self, ids: Ids, starts: list[int]) -> tuple[Tensor, Tensor]:
        rows = np.stack([ids[start : start + self._block_size + 1] for start in starts]).astype(np.int64)
        block = torch.from_numpy(rows)
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()
