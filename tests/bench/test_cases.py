"""Cases: counts of operations and bytes against torch's own counter, and what users may ask for."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mezzotint.bench.cases import FORMATS, GROUPS, Case, Op, chosen_ops, parse_shape, suite
from mezzotint.errors import ConfigError


def test_a_products_operations_are_torchs_count() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.mm(torch.zeros(6, 10), torch.zeros(10, 7))
    assert Case(op=Op.MATMUL, shape=(6, 7, 10)).flops == counter.get_total_flops()


def test_causal_attention_is_half_of_torchs_count_of_the_full_one() -> None:
    q = torch.zeros(2, 3, 16, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        scores = (q @ q.transpose(-1, -2)).softmax(-1)
        scores @ q
    assert Case(op=Op.ATTENTION, shape=(2, 3, 16, 8)).flops == counter.get_total_flops() / 2


def test_bytes_are_those_of_the_tensors() -> None:
    product = Case(op=Op.MATMUL, shape=(6, 7, 10))
    assert product.bytes_moved("float32") == 4 * (60 + 70 + 42)
    assert product.bytes_moved("bfloat16") == 2 * (60 + 70 + 42)
    assert product.bytes_moved("float8_e4m3fn") == 60 + 70 + 2 * 42
    assert Case(op=Op.ADD, shape=(100,)).bytes_moved("float16") == 600
    assert Case(op=Op.UPDATE, shape=(100,)).bytes_moved("float32") == 2800
    assert Case(op=Op.SOFTMAX, shape=(3, 5)).bytes_moved("float32") == 2 * 4 * 15
    q = torch.zeros(2, 3, 16, 8)
    sizes = sum(t.numel() * 4 for t in (q, q, q, F.scaled_dot_product_attention(q, q, q)))
    assert Case(op=Op.ATTENTION, shape=(2, 3, 16, 8)).bytes_moved("float32") == sizes


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_suite_has_every_operation_and_all_three_products_of_each_shape(kind: str) -> None:
    cases = suite(kind)
    assert {case.op for case in cases} == set(Op)
    assert len(set(cases)) == len(cases)
    shapes = [{case.shape for case in cases if case.op is op} for op in GROUPS["matmul"]]
    assert shapes[0] == shapes[1] == shapes[2]


def test_what_users_choose() -> None:
    cases = suite("cpu", ops=["matmul-dx", "norm"], sizes=[8], shapes=[(1, 2, 3)])
    assert [str(case) for case in cases] == [
        "matmul-dx 8x8x8",
        "matmul-dx 1x2x3",
        "layer-norm 4096x1024",
        "rms-norm 4096x1024",
        "softmax 4096x1024",
    ]
    assert chosen_ops(["update"]) == {Op.UPDATE}
    assert parse_shape(" 2048X768x3 ") == (2048, 768, 3)
    assert Case(op=Op.ADD, shape=(1,)).formats == ("float32", "bfloat16", "float16")
    assert Case(op=Op.MATMUL, shape=(1, 1, 1)).formats == FORMATS


@pytest.mark.parametrize("text", ["", "12", "1x2", "1x2x3x4", "axbxc", "1.5x2x3", "-1x2x3"])
def test_bad_shapes_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="is no shape of a product; write MxNxK"):
        parse_shape(text)


def test_bad_choices_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown operation 'convolve'"):
        suite("cpu", ops=["convolve"])
    with pytest.raises(ConfigError, match="at least one row"):
        suite("cpu", shapes=[(0, 1, 1)])
