"""Bytes that strides add to what operations move."""

import torch

from mezzotint.ghost.access import extra_bytes


def test_dense_operands_move_their_elements():
    x = torch.ones(8, 16)
    assert extra_bytes((x, x), x) == 0


def test_every_second_element_moves_the_others_too():
    x = torch.ones(8, 32)[:, ::2]
    assert extra_bytes((x,), torch.ones(8, 16)) == 8 * 16 * 4


def test_far_elements_move_a_sector_each():
    x = torch.ones(8, 1024)[:, ::64]
    assert extra_bytes((x,), torch.ones(8, 16)) == 8 * 16 * (32 - 4)


def test_an_expanded_operand_is_read_once():
    x = torch.ones(1, 16).expand(8, 16)
    assert extra_bytes((x,), torch.ones(8, 16)) == -7 * 16 * 4


def test_a_transposed_operand_is_read_across():
    x = torch.ones(16, 8).t()
    assert extra_bytes((x,), torch.ones(8, 16)) == 2 * 8 * 16 * 4
    assert extra_bytes((x,), torch.empty_like(x)) == 0  # the result keeps the order


def test_rows_that_are_padded_cost_nothing():
    x = torch.ones(8, 20)[:, :16]
    assert extra_bytes((x,), torch.ones(8, 16)) == 0


def test_lists_of_tensors():
    x = torch.ones(8, 32)[:, ::2]
    assert extra_bytes(([x, x],), [torch.ones(8, 16)] * 2) == 2 * 8 * 16 * 4
