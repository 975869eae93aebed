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
