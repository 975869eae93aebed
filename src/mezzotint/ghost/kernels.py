"""What a CUDA build does that a build for the CPU does otherwise: attention, RMS norm, recurrent layers, CTC.

The overrides stand where autograd's kernels of CUDA would, choose as PyTorch chooses on the ghost's card, and call the
same ATen operations, whose gradients are PyTorch's own. The fake kernels give shapes to those that have none.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import GhostError
from mezzotint.hardware.devices import DeviceSpec
from mezzotint.torch_internals import dispatch
from mezzotint.torch_internals.fake import memory_format_of
from mezzotint.torch_internals.operators import aten as _aten

_LOW = (torch.float16, torch.bfloat16)
_AMPERE = (8, 0)
_CUDNN_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
_GATES = {0: 1, 1: 1, 2: 4, 3: 3}


def _fused_rms_norm(_func: Any, args: Any, _kwargs: Any) -> tuple[Tensor, Tensor]:
    """Output, and the reciprocal root in float32, one for each row."""
    x, normalized_shape = args[0], args[1]
    kept = x.shape[: x.dim() - len(normalized_shape)]
    return torch.empty_like(x), torch.empty((*kept, *[1] * len(normalized_shape)), dtype=torch.float32, device=x.device)


def _fused_rms_norm_backward(_func: Any, args: Any, _kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
    x, weight, mask = args[1], args[4], args[5]
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] and weight is not None else None,
    )


def _cudnn_rnn(_func: Any, args: Any, _kwargs: Any) -> tuple[Tensor, ...]:
    x, weights, _, _, hx, cx, mode, hidden, proj, layers, batch_first, _, train, bidirectional, batch_sizes, _ = args
    directions = 2 if bidirectional else 1
    size = proj or hidden
    if batch_sizes:
        steps, rows = x.shape[0], int(batch_sizes[0])
        out = x.new_empty((steps, size * directions))
    else:
        steps = x.shape[0] * x.shape[1]
        rows = x.shape[0] if batch_first else x.shape[1]
        out = x.new_empty((*x.shape[:2], size * directions))
    hy = hx.new_empty((layers * directions, rows, size))
    cy = x.new_empty((layers * directions, rows, hidden)) if cx is not None else x.new_empty((0,))
    # cuDNN does not say what it reserves; gates, cell and output of every time step is what backward needs
    kept = (_GATES[mode] + 2) * hidden * steps * layers * directions * x.itemsize if train else 0
    reserve = torch.empty((kept,), dtype=torch.uint8, device=x.device)
    buffer = x.new_empty((sum(one.numel() for one in weights),))
    return out, hy, cy, reserve, buffer


def _cudnn_rnn_backward(_func: Any, args: Any, _kwargs: Any) -> tuple[Any, ...]:
    x, weights, hx, cx, mask = args[0], args[1], args[4], args[5], args[-1]
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(hx) if mask[1] else None,
        torch.empty_like(cx) if mask[2] and cx is not None else None,
        [torch.empty_like(one) for one in weights] if mask[3] else [],
    )


def _ctc_loss(_func: Any, args: Any, _kwargs: Any) -> tuple[Tensor, Tensor]:
    """Loss of each sequence, and log alpha of (batch, time, 2 x longest target + 1)."""
    log_probs, targets = args[0], args[1]
    batch = log_probs.shape[1] if log_probs.dim() == 3 else 1
    longest = targets.shape[-1] if targets.dim() == 2 else -(-targets.numel() // max(1, batch))
    return log_probs.new_empty((batch,)), log_probs.new_empty((batch, log_probs.shape[0], 2 * longest + 1))


def _gru_cell(_func: Any, args: Any, _kwargs: Any) -> tuple[Tensor, Tensor]:
    hx = args[2]
    return torch.empty_like(hx), hx.new_empty((hx.shape[0], hx.shape[1] * 5))


def _gru_cell_backward(_func: Any, args: Any, _kwargs: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the gates of input and hidden state, of the state, and of two biases."""
    gradient, workspace, has_bias = args
    gates = workspace.new_empty((gradient.shape[0], 3 * gradient.shape[1]))
    bias = workspace.new_empty((gates.shape[1],)) if has_bias else None
    return gates, torch.empty_like(gates), torch.empty_like(gradient), bias, bias


def _least_squares(_func: Any, args: Any, _kwargs: Any) -> tuple[Tensor, ...]:
    """The solution; residuals of an overdetermined system, and nothing of rank and singular values (driver gels)."""
    a, b = args[0], args[1]
    rows, columns = a.shape[-2:]
    solution = b.new_empty((*b.shape[:-2], columns, b.shape[-1]))
    residuals = b.new_empty((*b.shape[:-2], b.shape[-1]) if rows > columns else (0,))
    return solution, residuals, b.new_empty((0,), dtype=torch.int64), b.new_empty((0,))


def _in_place(_func: Any, _args: Any, _kwargs: Any) -> None:
    """An update in place, as the optimizers' fused kernels are."""


def _grouped_mm(_func: Any, args: Any, kwargs: Any) -> Tensor:
    """Products of groups of rows: the fake kernel refuses all but bfloat16, CUDA's takes single products."""
    a, b = args[0], args[1]
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    dtype = (args[4] if len(args) > 4 else kwargs.get("out_dtype")) or a.dtype
    if a.dtype != b.dtype:
        raise GhostError(f"_grouped_mm takes two matrices of one dtype, got {a.dtype} and {b.dtype}; cast one of them")
    if a.dim() == 2 and b.dim() == 2:
        shape: tuple[int, ...] = (offsets.shape[0], a.shape[0], b.shape[1])
    elif a.dim() == 2 or b.dim() == 2:
        shape = (a.shape[-2], b.shape[-1])
    else:
        shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.empty(shape, dtype=dtype, device=a.device)


def _convolution_backward(_func: Any, args: Any, _kwargs: Any) -> tuple[Tensor | None, ...]:
    """Gradients in the layouts of what they belong to: PyTorch's fake kernel forgets channels last for weights."""
    gradient, x, weight, mask = args[0], args[1], args[2], args[-1]
    return (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(weight) if mask[1] else None,
        gradient.new_empty((gradient.shape[1],)) if mask[2] else None,
    )


KERNELS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    _aten._grouped_mm.default: _grouped_mm,
    _aten.convolution_backward.default: _convolution_backward,
    _aten._fused_rms_norm.default: _fused_rms_norm,
    _aten._fused_rms_norm_backward.default: _fused_rms_norm_backward,
    _aten._cudnn_rnn.default: _cudnn_rnn,
    _aten._cudnn_rnn_backward.default: _cudnn_rnn_backward,
    _aten._use_cudnn_ctc_loss.default: lambda *_: False,
    _aten._use_cudnn_ctc_loss.Tensor: lambda *_: False,
    _aten._ctc_loss.default: _ctc_loss,
    _aten._ctc_loss.Tensor: _ctc_loss,
    _aten._ctc_loss_backward.default: lambda _f, args, _k: torch.empty_like(args[1]),
    _aten._ctc_loss_backward.Tensor: lambda _f, args, _k: torch.empty_like(args[1]),
    _aten._thnn_fused_gru_cell.default: _gru_cell,
    _aten._thnn_fused_gru_cell_backward.default: _gru_cell_backward,
    _aten.linalg_lstsq.default: _least_squares,
    **{
        overload: _in_place
        for packet in (_aten._fused_sgd_, _aten._fused_adagrad_)
        for overload in (packet.default, packet.tensor_lr)
    },
}
"""Fake kernels by operation: called with (operation, args, kwargs) under the fake mode."""


class Overrides:
    """The choices of a CUDA build, registered at `AutogradCUDA` while the ghost is on."""

    def __init__(self, spec: DeviceSpec) -> None:
        self._capability = spec.compute_capability or _AMPERE
        self._library: Any = None

    def install(self) -> None:
        """Register them."""
        self._library = dispatch.dispatch_library("IMPL", "aten", "AutogradCUDA")
        made: dict[str, Callable[..., Any]] = {
            "scaled_dot_product_attention": self._attention,
            "rms_norm": _rms_norm,
            "ctc_loss.Tensor": _ctc,
            "_batch_norm_impl_index": _batch_norm,
        }
        for operation in _TAKEN_APART:
            made[dispatch.schema_of(operation).name.partition("::")[2]] = _whole(operation)
        for name, mode in _CUDNN_MODES.items():
            made[f"{name}.input"] = _recurrent(mode, is_packed=False)
            made[f"{name}.data"] = _recurrent(mode, is_packed=True)
        for name, kernel in made.items():
            self._library.impl(name, "AutogradCUDA", kernel, False)

    def remove(self) -> None:
        """Take them back."""
        if self._library is not None:
            self._library.reset()
            self._library = None

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """Choose a kernel as `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` does, and call it."""
        choice = self._choose(query, key, value, attn_mask, dropout_p, enable_gqa)
        if attn_mask is not None and attn_mask.dtype is torch.bool and choice != "math":
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
        if choice == "math":
            out: Tensor = _aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
            )[0]
            return out
        if enable_gqa and choice != "flash":
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        size = query.shape[-1]
        if choice == "flash":
            if size % 8:
                scale = scale if scale is not None else size**-0.5
                query, key, value = (torch.nn.functional.pad(one, (0, 8 - size % 8)) for one in (query, key, value))
            out = _aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )[0]
            return out[..., :size] if size % 8 else out
        needs_grad = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
        if choice == "cudnn":
            return _aten._scaled_dot_product_cudnn_attention(  # type: ignore[no-any-return]
                query, key, value, attn_mask, needs_grad, dropout_p, is_causal, False, scale=scale
            )[0]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        return _aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
        )[0]

    def _choose(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, enable_gqa: bool
    ) -> str:
        backend: Any = torch.backends.cuda
        capability = self._capability
        dtype, size = query.dtype, query.shape[-1]
        if query.dim() != 4 or not query.shape[-2] or not key.shape[-2] or dtype is torch.float64:
            return "math"
        is_low = dtype is torch.float16 or (dtype is torch.bfloat16 and capability >= _AMPERE)
        same_size = size == value.shape[-1] == key.shape[-1]
        has_mask_grad = mask is not None and mask.requires_grad
        can_flash = (
            backend.flash_sdp_enabled() and is_low and capability >= _AMPERE and mask is None and size <= 256
            and same_size
        )  # fmt: skip
        # check_cudnn_tensor_shapes and check_cudnn_deterministic, with the cuDNN 9.10 or newer of torch 2.13's builds
        largest = 256 if capability == (9, 0) else 128
        is_deterministic = (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        can_cudnn = (
            backend.cudnn_sdp_enabled() and is_low and capability in ((9, 0), (10, 0)) and size % 8 == 0
            and size <= largest and same_size and not has_mask_grad and dropout == 0.0 and key.shape[-2] > 1
            and not is_deterministic
        )  # fmt: skip
        if can_cudnn:
            return "cudnn"  # preferred on Hopper and Blackwell servers
        if can_flash:
            return "flash"
        can_efficient = backend.mem_efficient_sdp_enabled() and (is_low or dtype is torch.float32) and not enable_gqa
        return "efficient" if can_efficient else "math"


class FusedRmsNorm(torch.autograd.Function):
    """The fused operation with its gradient: a build without CUDA has the operation, but takes it apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None) -> Tensor:
        """One operation on (..., normalized_shape)."""
        with dispatch.below_autograd():
            out, rstd = _aten._fused_rms_norm(x, normalized_shape, weight, eps)
        ctx.save_for_backward(x, rstd, weight)
        ctx.normalized_shape = normalized_shape
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """One operation, for the gradients of input and weight."""
        x, rstd, weight = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[2]]
        with dispatch.below_autograd():
            for_x, for_weight = _aten._fused_rms_norm_backward(gradient, x, ctx.normalized_shape, rstd, weight, needs)
        return for_x, None, for_weight, None


def _rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """Fused where weight and input are of one dtype, five operations otherwise (ATen/native/layer_norm.cpp)."""
    if not x.is_complex() and (weight is None or weight.dtype == x.dtype):
        return FusedRmsNorm.apply(  # type: ignore[no-untyped-call]
            x, list(normalized_shape), weight, eps
        )
    wide = x.float() if x.dtype in _LOW else x
    dims = list(range(x.dim() - len(normalized_shape), x.dim()))
    small = torch.finfo(wide.dtype).eps if eps is None else eps
    out = wide.mul(wide.pow(2).mean(dims, keepdim=True).add_(small).rsqrt())
    if weight is not None:
        out = out.mul(weight)
    return out.type_as(x)


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
    training: bool, momentum: float, eps: float, cudnn_enabled: bool,
) -> Any:  # fmt: skip
    """Choose cuDNN's kernel as `_select_batch_norm_backend` of ATen/native/Normalization.cpp does."""
    has_statistics = running_mean is not None and running_var is not None
    largest = 880801 if training else 65535
    if (
        cudnn_enabled
        and weight is not None
        and bias is not None
        and torch.bfloat16 not in (x.dtype, weight.dtype)
        and (x.dtype is not torch.float16 or weight.dtype is torch.float32)
        and (has_statistics or (training and running_mean is None and running_var is None))
        and x.dim() >= 3
        and x.shape[0] <= largest
    ):
        return *_aten.cudnn_batch_norm(
            x.contiguous(memory_format=memory_format_of(x)),
            weight,
            bias,
            running_mean,
            running_var,
            training,
            momentum,
            eps,
        ), 1
    reserve = torch.empty(0, dtype=torch.uint8, device=x.device)
    return *_aten.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps), reserve, 0


def _ctc(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int = 0,
    reduction: int = 1, zero_infinity: bool = False,
) -> Tensor:  # fmt: skip
    """Take CTC's own kernel, which reads the lengths on the card: the composite would copy them to the CPU."""
    loss: Tensor = _aten._ctc_loss.Tensor(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)[0]
    if zero_infinity:
        loss = torch.where(loss == torch.inf, torch.zeros((), dtype=loss.dtype, device=loss.device), loss)
    if reduction == 1:
        return (loss / target_lengths.to(loss.device).clamp_min(1)).mean()
    return loss.sum() if reduction == 2 else loss


# operations with kernels for CPU and CUDA, and a composite that a build without CUDA takes for ghosts instead
_TAKEN_APART = (_aten.silu_backward.default, _aten.mish_backward.default, _aten.native_channel_shuffle.default)


def _whole(operation: Any) -> Callable[..., Any]:
    """Return what keeps an operation whole, unless a gradient of it is wanted, for which the composite serves."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in args):
            return operation.decompose(*args, **kwargs)
        with dispatch.below_autograd():
            return operation(*args, **kwargs)

    return run


def _recurrent(mode: int, *, is_packed: bool) -> Callable[..., Any]:
    """Return the cuDNN path of `lstm`, `gru`, `rnn_tanh` or `rnn_relu`; under autocast its weights are cast."""

    def run(x: Tensor, *rest: Any) -> Any:
        if is_packed:
            batch_sizes, hx, weights, has_biases, layers, dropout, train, bidirectional = rest
            batch_first, sizes = False, [int(one) for one in batch_sizes]
        else:
            hx, weights, has_biases, layers, dropout, train, bidirectional, batch_first = rest
            sizes = []
        hidden, cell = (hx[0], hx[1]) if mode == 2 else (hx, None)
        if torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            x, hidden = x.to(dtype), hidden.to(dtype)
            cell = cell.to(dtype) if cell is not None else None
            weights = [one.to(dtype) for one in weights]
        per_layer = len(weights) // (layers * (2 if bidirectional else 1))
        proj = hidden.shape[2] if mode == 2 and per_layer == (5 if has_biases else 3) else 0
        size = cell.shape[2] if cell is not None else hidden.shape[2]
        with torch.autocast("cuda", enabled=False):  # a CUDA build casts in a kernel that asks cuDNN itself
            out = _aten._cudnn_rnn(
                x, weights, per_layer, None, hidden, cell, mode, size, proj, layers, batch_first, dropout, train,
                bidirectional, sizes, None,
            )  # fmt: skip
        return (out[0], out[1], out[2]) if mode == 2 else (out[0], out[1])

    return run
