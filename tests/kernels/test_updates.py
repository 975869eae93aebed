"""One optimizer step over raw memory: the bits of torch's operations, and of `round_to` for random rounding."""

from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import all_sorts, same
from torch import Tensor

from mezzotint.engine import fused_update
from mezzotint.formats.rounding import Rounding
from mezzotint.kernels import updates
from mezzotint.kernels.constants import BFLOAT16, FLOAT32
from mezzotint.kernels.tensors import round_to

pytestmark = pytest.mark.skipif(
    not fused_update._multiplies_and_adds_at_once(),
    reason="torch rounds products before it adds here: built without FMA",
)

KINDS = {"master": updates.MASTER, "random": updates.RANDOM, "kahan": updates.KAHAN}
# one element; less than a vector; a chunk and around it; more than a unit of work
SIZES = (1, 5, 1023, 2048, 2049, 70_001)
SEED, OFFSET = -5, 12345


class Weights:
    """Weights held in one of the three ways, their gradient and two states, with random numbers in all of them."""

    def __init__(self, kind: str, count: int, grad_dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda: torch.randn(count, generator=generator)  # noqa: E731
        self.kind = kind
        self.numbers = draw()
        self.stored = self.numbers.bfloat16()
        self.dropped = (self.numbers - self.stored.float()).bfloat16()
        self.grads = (draw() * 0.1).to(grad_dtype)
        self.first, self.second = draw() * 0.1, draw().square() * 0.01

    def as_float32(self) -> Tensor:
        """Return the numbers that a step starts from."""
        if self.kind == "master":
            return self.numbers.clone()
        return self.stored.float() + self.dropped.float() if self.kind == "kahan" else self.stored.float()

    def row(self, *, place: int = 0, offset: int = OFFSET, has_first: bool = True, is_new: bool = False) -> list[int]:
        held = {"master": self.numbers.data_ptr(), "kahan": self.dropped.data_ptr(), "random": 0}[self.kind]
        kind = BFLOAT16 if self.grads.dtype is torch.bfloat16 else FLOAT32
        states = self.first.data_ptr() if has_first else 0, self.second.data_ptr()
        addresses = [self.stored.data_ptr(), held, self.grads.data_ptr(), kind, *states]
        return [*addresses, self.stored.numel(), 0, place, offset, int(is_new), 0]

    def check(self, expected: Tensor, offset: int = OFFSET) -> None:
        """Assert that the weights are what `expected`, float32, becomes when it is stored."""
        if self.kind == "master":
            assert same(self.numbers, expected)
        if self.kind == "random":
            stored = torch.empty_like(self.stored)
            round_to(expected, "bfloat16", out=stored, rounding=Rounding.STOCHASTIC, seed=SEED, offset=offset)
        else:
            stored = expected.bfloat16()
        assert same(self.stored.float(), stored.float())
        if self.kind == "kahan":
            assert same(self.dropped.float(), (expected - stored.float()).bfloat16().float())


def run(task, weights: list[Weights], numbers: list[float], num_threads: int = 1, **options) -> None:
    rows = array("q", [word for item in weights for word in item.row(**options)])
    kind = KINDS[weights[0].kind]
    updates.step_rows(task, kind, rows, array("f", numbers), seed=SEED, num_threads=num_threads)


def adam_numbers(*, penalty=0.0, decay=0.01, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, step=3) -> list[float]:
    beta1, beta2 = betas
    corrections = 1 - beta1**step, (1 - beta2**step) ** 0.5
    return [penalty, 1 - lr * decay, 1 - beta1, beta2, 1 - beta2, corrections[1], eps, -lr / corrections[0]]


def adam_of_torch(weights: Weights, numbers: list[float]) -> Tensor:
    """Step by torch's operations, in the order of its optimizer; return the weights, with states left in `weights`.

    Roots are rounded to nearest: a float64 root rounded to float32 is, as 53 >= 2 * 24 + 2 (Figueroa 1995).
    """
    penalty, factor, way, kept, added, correction, eps, step = numbers
    values, grads = weights.as_float32(), weights.grads.float()
    if penalty:
        grads = grads.add(values, alpha=penalty)
    if factor != 1:
        values.mul_(factor)
    weights.first.lerp_(grads, way)
    weights.second.mul_(kept).addcmul_(grads, grads, value=added)
    roots = weights.second.double().sqrt().float()
    return values.addcdiv_(weights.first, (roots / correction).add_(eps), value=step)


def sgd_of_torch(weights: Weights, numbers: list[float], *, has_first: bool, is_new: bool) -> Tensor:
    penalty, momentum, added, is_nesterov, step = numbers
    values, grads = weights.as_float32(), weights.grads.float()
    if penalty:
        grads = grads.add(values, alpha=penalty)
    if has_first:
        if is_new:
            weights.first.copy_(grads)
        else:
            weights.first.mul_(momentum).add_(grads, alpha=added)
        grads = grads.add(weights.first, alpha=momentum) if is_nesterov else weights.first
    return values.add_(grads, alpha=step)


def compare_adam(kind: str, count: int, numbers: list[float], grad_dtype=torch.float32, seed: int = 0) -> None:
    ours, theirs = (Weights(kind, count, grad_dtype, seed) for _ in range(2))
    expected = adam_of_torch(theirs, numbers)
    run(updates.adam, [ours], numbers)
    ours.check(expected)
    assert same(ours.first, theirs.first)
    assert same(ours.second, theirs.second)


def compare_sgd(kind: str, count: int, numbers: list[float], *, has_first=True, is_new=False, seed: int = 0) -> None:
    ours, theirs = (Weights(kind, count, seed=seed) for _ in range(2))
    expected = sgd_of_torch(theirs, numbers, has_first=has_first, is_new=is_new)
    run(updates.sgd, [ours], numbers, has_first=has_first, is_new=is_new)
    ours.check(expected)
    assert same(ours.first, theirs.first)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", [{}, {"penalty": 0.1, "decay": 0.0}, {"betas": (0.3, 0.9)}])
def test_adam_has_the_bits_of_torchs_operations(kind, count, grad_dtype, choice):
    compare_adam(kind, count, adam_numbers(**choice), grad_dtype)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("is_nesterov", [0.0, 1.0])
def test_momentum_has_the_bits_of_torchs_operations(kind, count, is_new, is_nesterov):
    compare_sgd(kind, count, [0.1, 0.9, 1.0 if is_nesterov else 0.7, is_nesterov, -0.01], is_new=is_new)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_plain_descent_has_the_bits_of_torchs_operations(kind, count, penalty):
    compare_sgd(kind, count, [penalty, 0.0, 1.0, 0.0, -0.01], has_first=False)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    lr=st.floats(1e-7, 10),
    betas=st.tuples(st.floats(0, 0.9999), st.floats(0, 0.99999)),
    eps=st.floats(1e-12, 1.0),
    decay=st.floats(0, 0.5),
    penalty=st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
    step=st.integers(1, 1_000_000),
    count=st.integers(1, 5000),
    seed=st.integers(0, 100),
)
def test_adam_for_any_hyperparameters(kind, lr, betas, eps, decay, penalty, step, count, seed):
    numbers = adam_numbers(penalty=penalty, decay=decay, lr=lr, betas=betas, eps=eps, step=step)
    compare_adam(kind, count, numbers, seed=seed)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(list(KINDS)),
    penalty=st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
    momentum=st.floats(0, 1),
    dampening=st.floats(0, 1),
    is_nesterov=st.booleans(),
    lr=st.floats(1e-7, 10),
    count=st.integers(1, 5000),
    seed=st.integers(0, 100),
)
def test_sgd_for_any_hyperparameters(kind, penalty, momentum, dampening, is_nesterov, lr, count, seed):
    compare_sgd(kind, count, [penalty, momentum, 1 - dampening, float(is_nesterov), -lr], seed=seed)


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_all_sorts(kind):
    """Infinities, NaN and subnormals come out as from torch's operations, in weights, gradients and states."""
    ours, theirs = Weights(kind, 1 << 16), Weights(kind, 1 << 16)
    for item in (ours, theirs):
        item.numbers.copy_(all_sorts(1))
        item.stored.copy_(all_sorts(2))
        item.dropped.copy_(all_sorts(3))
        item.grads.copy_(all_sorts(4))
        item.first.copy_(all_sorts(5))
        item.second.copy_(all_sorts(6).abs())
    expected = adam_of_torch(theirs, adam_numbers())
    run(updates.adam, [ours], adam_numbers())
    ours.check(expected)
    assert same(ours.first, theirs.first)
    assert same(ours.second, theirs.second)


@pytest.mark.parametrize("kind", KINDS)
def test_squares_that_overflow_stop_the_weight(kind):
    """A gradient of 1e25 has an infinite square: torch divides by it, and the weight only decays."""
    ours, theirs = Weights(kind, 100), Weights(kind, 100)
    for item in (ours, theirs):
        item.grads.fill_(1e25)
    expected = adam_of_torch(theirs, adam_numbers())
    run(updates.adam, [ours], adam_numbers())
    assert bool(ours.second.isinf().all())
    assert bool(expected.isfinite().all())
    ours.check(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_many_parameters_and_threads_change_nothing(kind):
    """A table of large and small parameters, some empty, on four threads: each as if alone."""
    counts = [0, 3, 70_001, 1, 0, 200_000, 2048, 65_536, *range(50), 0]
    ours = [Weights(kind, count, seed=i) for i, count in enumerate(counts)]
    theirs = [Weights(kind, count, seed=i) for i, count in enumerate(counts)]
    run(updates.adam, ours, adam_numbers(), num_threads=4)
    for one, other in zip(ours, theirs, strict=True):
        one.check(adam_of_torch(other, adam_numbers()))
        assert same(one.first, other.first)


def test_a_quotient_by_a_constant_is_rounded_to_nearest():
    """All 2^23 mantissas over several corrections, through the weights of a step that is that quotient alone.

    With both betas 0 in effect (averages replaced by what is there) the step is -(1 / (root / correction)).
    """
    roots = torch.arange(1 << 23, dtype=torch.int32).add_(127 << 23).view(torch.float32)
    for correction in (0.03162277660168379, 0.7, 0.9999999403953552, 1.0):
        ours = Weights("master", roots.numel())
        ours.numbers.zero_()
        ours.grads.zero_()
        ours.first.fill_(1.0)
        ours.second.copy_(roots.square())
        squares = ours.second.clone()
        run(updates.adam, [ours], [0.0, 1.0, 0.0, 1.0, 0.0, correction, 0.0, -1.0])
        expected = -(1.0 / (squares.double().sqrt().float() / torch.tensor(correction)))
        assert same(ours.numbers, expected)
