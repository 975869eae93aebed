"""Bytes that strides add to what operations move."""

import torch

from mezzotint.ghost.access import NONE, Access, access_of, num_turned


def test_dense_operands_move_their_elements():
    x = torch.ones(8, 16)
    assert access_of((x, x), x) == NONE


def test_every_second_element_moves_the_others_too():
    x = torch.ones(8, 32)[:, ::2]
    assert access_of((x,), torch.ones(8, 16)) == Access(8 * 16 * 4, 0)


def test_far_elements_move_a_sector_each():
    x = torch.ones(8, 1024)[:, ::64]
    assert access_of((x,), torch.ones(8, 16)) == Access(8 * 16 * (32 - 4), 0)


def test_an_expanded_operand_is_read_once():
    x = torch.ones(1, 16).expand(8, 16)
    assert access_of((x,), torch.ones(8, 16)) == Access(-7 * 16 * 4, 0)


def test_a_transposed_operand_is_read_across():
    x = torch.ones(16, 8).t()
    assert access_of((x,), torch.ones(8, 16)) == Access(0, 8 * 16 * 32)  # a sector for each element
    assert access_of((x,), torch.empty_like(x)) == NONE  # the result keeps the order


def test_rows_that_are_padded_cost_nothing():
    x = torch.ones(8, 20)[:, :16]
    assert access_of((x,), torch.ones(8, 16)) == NONE


def test_lists_of_tensors():
    x = torch.ones(8, 32)[:, ::2]
    assert access_of(([x, x],), [torch.ones(8, 16)] * 2) == Access(2 * 8 * 16 * 4, 0)


def test_matrices_that_lie_across_the_sum():
    x, weight, gradient = torch.ones(8, 16), torch.ones(32, 16), torch.ones(8, 32)
    assert num_turned((x, weight.t())) == 0  # a linear layer
    assert num_turned((gradient, weight)) == 1  # the gradient of its input
    assert num_turned((gradient.t(), x)) == 2  # and of its weight
    assert num_turned((torch.ones(32), x, weight.t())) == 0
    assert num_turned((gradient.expand(2, 8, 32).transpose(1, 2), x.expand(2, 8, 16))) == 2


def test_channels_last_convolutions_are_noted():
    from mezzotint.plan.recording import Recording
    from mezzotint.plan.roofline import plan_time
    from mezzotint.trace.recorder import Recorder

    times = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        recording, recorder = Recording("A100"), Recorder(has_ranges=False)
        with recording.within(recorder), recorder:
            layer = torch.nn.Conv2d(64, 128, 3, padding=1).cuda().to(memory_format=memory_format)
            x = torch.randn(32, 64, 56, 56, device="cuda").to(memory_format=memory_format)
            first = recorder.num_operations
            with torch.autocast("cuda", dtype=torch.float16):
                loss = layer(x).float().square().mean()
            loss.backward()
        run = recording.run(recorder.trace())
        assert len(run.channels_last) == (2 if memory_format is torch.channels_last else 0)
        times.append(plan_time(run, first=first).gpu)
    assert times[1] < 0.95 * times[0]
