"""Batches: a pure function of seed and index, each epoch a permutation of blocks, validation fixed and apart."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.data.batches import Batches
from mezzotint.data.tokenizer import ByteTokenizer
from mezzotint.data.tokens import Corpus


def corpus(num_train: int, num_validation: int = 100) -> Corpus:
    """Return a corpus whose every token is its position, so that a batch tells where it came from."""
    ids = np.arange(num_train + num_validation, dtype=np.uint32)
    return Corpus(
        train_ids=ids[:num_train], validation_ids=ids[num_train:], tokenizer=ByteTokenizer(), digest="positions"
    )


def batches(num_train: int = 1000, block: int = 10, batch: int = 3, seed: int = 0) -> Batches:
    return Batches(corpus(num_train), block_size=block, batch_size=batch, seed=seed)


def test_targets_are_the_inputs_one_token_on() -> None:
    inputs, targets = batches()[0]
    assert inputs.shape == targets.shape == (3, 10)
    assert inputs.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)


def test_any_order_of_asking_gives_the_same() -> None:
    forwards, backwards = batches(), batches()
    expected = [forwards[i] for i in range(80)]
    for index in reversed(range(80)):
        assert torch.equal(backwards[index][0], expected[index][0])
    assert not torch.equal(batches(seed=1)[0][0], expected[0][0])


@settings(max_examples=60, deadline=None)
@given(
    num_train=st.integers(22, 400), block=st.integers(1, 20), batch=st.integers(1, 5), seed=st.integers(0, 2**32 - 1)
)
def test_an_epoch_takes_each_block_once_and_stays_inside(num_train: int, block: int, batch: int, seed: int) -> None:
    source = batches(num_train, block, batch, seed)
    per_epoch = source.blocks_per_epoch
    fit = (num_train - 1) // block
    assert max(fit - 1, 1) == per_epoch  # one less than fit, so that the offset can differ from epoch to epoch
    num_batches = -(-2 * per_epoch // batch)
    rows = torch.cat([source[index][0] for index in range(num_batches)])
    last = torch.cat([source[index][1] for index in range(num_batches)]).max()
    assert int(last) < num_train
    for epoch in (rows[:per_epoch], rows[per_epoch : 2 * per_epoch]):
        starts = epoch[:, 0].sort().values
        assert torch.equal(starts, starts[0] + block * torch.arange(per_epoch))
        assert torch.equal(epoch, epoch[:, :1] + torch.arange(block))


def test_epochs_differ_in_order_and_offset() -> None:
    source = batches(batch=1)
    first = [int(source[i][0][0, 0]) for i in range(source.blocks_per_epoch)]
    second = [int(source[source.blocks_per_epoch + i][0][0, 0]) for i in range(source.blocks_per_epoch)]
    assert first != second
    assert sorted(first) != first
    offsets = [int(source[epoch * source.blocks_per_epoch][0][0, 0]) % 10 for epoch in range(10)]
    assert len(set(offsets)) > 3


def test_validation_is_fixed_and_apart_from_training() -> None:
    source = batches()
    first, second = list(source.validation(2)), list(source.validation(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert [tuple(inputs.shape) for inputs, _ in first] == [(3, 10), (3, 10)]
    assert all(int(inputs.min()) >= 1000 for inputs, _ in first)
    assert all(int(targets.max()) < 1100 for _, targets in first)


def test_validation_is_the_same_for_every_seed_and_spread_to_the_end() -> None:
    firsts = [int(inputs[0, 0]) for inputs, _ in batches(batch=1, seed=7).validation(3)]
    assert firsts == [1000, 1040, 1080]
    assert firsts == [int(inputs[0, 0]) for inputs, _ in batches(batch=1, seed=8).validation(3)]


def test_the_shortest_corpus_that_is_allowed_has_one_block() -> None:
    source = Batches(corpus(11, 11), block_size=10, batch_size=4, seed=0)
    assert source.blocks_per_epoch == 1
    assert torch.equal(source[5][1], torch.arange(1, 11).expand(4, 10))
    ((_, targets),) = source.validation(9)
    assert torch.equal(targets, torch.arange(12, 22)[None])


@pytest.mark.parametrize(("asked", "blocks"), [(1, 3), (3, 9), (100, 9)])
def test_validation_holds_no_more_than_there_is(asked: int, blocks: int) -> None:
    assert sum(len(inputs) for inputs, _ in batches().validation(asked)) == blocks
