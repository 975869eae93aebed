"""A program of its own, as a crash would end it: each kind of tensor in each call; see test_tensor_kinds.py."""

# ruff: noqa: E402, T201
import tempfile
import warnings

warnings.simplefilter("ignore")
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mezzotint.errors import MezzotintError
from mezzotint.kernels import tensors
from mezzotint.kernels.memory import has_numbers, is_plain
from mezzotint.modules.rms_norm import rms_norm
from mezzotint.modules.swiglu import swiglu
from mezzotint.trace.ranges import Ranges, TensorRange, tally_of


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*[a.inner if isinstance(a, Wrapper) else a for a in args], **(kwargs or {}))


class Plain(torch.Tensor):
    pass


def x():
    return torch.linspace(-2, 2, 16).view(4, 4)


def emptied():
    t = x()
    t.untyped_storage().resize_(0)
    return t


def offset_emptied():
    t = torch.linspace(-2, 2, 32)[8:24].view(4, 4)
    t.untyped_storage().resize_(0)
    return t


def shortened():
    t = x()
    t.untyped_storage().resize_(8)
    return t


def transposed_shortened():
    t = x().t()
    t.untyped_storage().resize_(60)
    return t


def emptied_bfloat16():
    t = x().bfloat16()
    t.untyped_storage().resize_(0)
    return t


def inference():
    with torch.inference_mode():
        return x()


def fake():
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.ones(4, 4)


def mapped():
    name = tempfile.mktemp()
    x().numpy().tofile(name)
    return torch.from_file(name, shared=False, size=16).view(4, 4)


KINDS = {
    "plain": x,
    "parameter": lambda: torch.nn.Parameter(x()),
    "transposed": lambda: x().t(),
    "strided": lambda: x()[::2, ::2],
    "expanded": lambda: torch.ones(1, 4).expand(4, 4),
    "no elements": lambda: torch.empty(0, 4),
    "one number": lambda: torch.tensor(2.0),
    "zero tensor": lambda: torch._efficientzerotensor(4, 4),
    "emptied": emptied,
    "offset emptied": offset_emptied,
    "shortened": shortened,
    "transposed shortened": transposed_shortened,
    "meta": lambda: x().to("meta"),
    "fake": fake,
    "negative view": lambda: torch._neg_view(x()),
    "conjugate": lambda: torch.view_as_real(x().to(torch.complex64).conj().resolve_conj())[..., 0],
    "imaginary of conjugate": lambda: x().to(torch.complex64).conj().imag,
    "complex": lambda: x().to(torch.complex64).conj(),
    "sparse": lambda: x().to_sparse(),
    "csr": lambda: x().to_sparse_csr(),
    "mkldnn": lambda: x().to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([x(), x()]),
    "jagged": lambda: torch.nested.nested_tensor([x(), x()], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8),
    "wrapper": lambda: Wrapper(x()),
    "subclass": lambda: x().as_subclass(Plain),
    "inference": inference,
    "mapped": mapped,
    "int": lambda: x().int(),
    "functional": lambda: torch._to_functional_tensor(x()),
    "double": lambda: x().double(),
    "bfloat16": lambda: x().bfloat16(),
    "emptied bfloat16": emptied_bfloat16,
}
CALLS = {
    "round_to": lambda t: tensors.round_to(t, "e4m3"),
    "round_to in place": lambda t: tensors.round_to(t, "e4m3", out=t),
    "round_to out": lambda t: tensors.round_to(x(), "e4m3", out=t),
    "stochastic": lambda t: tensors.round_to(t, "bfloat16", rounding="stochastic"),
    "encode": lambda t: tensors.encode(t, "e4m3"),
    "decode": lambda t: tensors.decode_codes(t, "e2m1"),
    "round_to_blocks": lambda t: tensors.round_to_blocks(t, "mxfp8_e4m3"),
    "quantize_blocks": lambda t: tensors.quantize_blocks(t, "nvfp4"),
    "blocks out": lambda t: tensors.round_to_blocks(x(), "mxfp8_e4m3", out=t),
    "range_stats": tensors.range_stats,
    "add_range_counts": lambda t: tensors.add_range_counts(t, TensorRange("x").counts),
    "Ranges.add": lambda t: Ranges().add(t, TensorRange("x")),
    "tally_of": tally_of,
    "is_plain": is_plain,
    "has_numbers": has_numbers,
    "rms_norm": lambda t: rms_norm(t, None, 1e-6),
    "swiglu": lambda t: swiglu(t, t),
}
# torch's own operations read what is not there (`t + 1` ends the process too): they are not asked for such tensors
SERVED_BY_TORCH = {"rms_norm", "swiglu"}
GONE = {"emptied", "offset emptied", "shortened", "transposed shortened", "emptied bfloat16"}
WATCHERS = {"add_range_counts", "Ranges.add", "tally_of", "is_plain", "has_numbers"}


def attempt(kind, name, call, t):
    if kind in GONE and name in SERVED_BY_TORCH:
        return
    print("at", kind, "|", name, flush=True)
    fault = None
    try:
        call(t)
    except MezzotintError as error:
        is_fine, fault = name not in WATCHERS and len(str(error)) < 500, error
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        is_fine, fault = name not in WATCHERS and kind not in GONE and kind != "zero tensor", error
    if fault is not None and not is_fine:
        raise AssertionError(f"{name} raised on {kind}: {fault!r}")


def inside(kind, name, call):
    def function(t):
        attempt(kind, name, call, t)
        return t.sum()

    return function


for name, call in CALLS.items():
    for kind, make in KINDS.items():
        attempt(kind, name, call, make())
    torch.func.vmap(inside("vmap", name, call))(torch.ones(3, 4, 4))
    torch.func.grad(inside("grad", name, call))(x())
    torch.func.jvp(inside("jvp", name, call), (x(),), (x(),))
    torch.func.vmap(torch.func.grad(inside("vmap of grad", name, call)))(torch.ones(3, 4, 4))
print("end", flush=True)
