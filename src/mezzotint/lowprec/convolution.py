"""Convolutions of the CPU in low precision, of any number of axes, grouped and transposed: torch's float32 on upcast
operands, rounded once.

Kernels of our own for `aten::convolution` and its backward stand before torch's composite ones. What is not for us
goes on to `aten::_convolution`, which is all that the composite does; its backward has no such second name, so float32
gradients of convolutions hold Python's global lock while these kernels are registered.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mezzotint.lowprec.calls import count
from mezzotint.lowprec.choice import Path
from mezzotint.lowprec.gate import is_ours, upcast
from mezzotint.torch_internals.operators import aten

ORIGINALS = ("convolution_backward",)
_plain = aten._convolution.default


def kernels(originals: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Return the kernels that replace torch's for the CPU, by name of the operation."""
    return {
        "convolution": _convolution,
        "convolution_backward": _convolution_backward(originals["convolution_backward"]),
    }


def _convolution(
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    how = (stride, padding, dilation, transposed, output_padding, groups)
    # the flags are cudnn's (benchmark, deterministic, enabled, TF32) and mean nothing on the CPU
    flags = (False, False, True, True)
    dtype = source.dtype
    if not (is_ours(dtype) and weight.dtype is dtype):
        return _plain(source, weight, bias, *how, *flags)
    count("convolution", Path.UPCAST)
    return _plain(source.float(), weight.float(), upcast(bias), *how, *flags).to(dtype)


def _convolution_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(grad_out: Tensor, source: Tensor, weight: Tensor, *how: Any) -> Any:
        dtype = source.dtype
        if not (is_ours(dtype) and weight.dtype is dtype and grad_out.dtype is dtype):
            return original(grad_out, source, weight, *how)
        count("convolution_backward", Path.UPCAST)
        grads = original(grad_out.float(), source.float(), weight.float(), *how)
        return tuple(None if grad is None else grad.to(dtype) for grad in grads)

    return backward
