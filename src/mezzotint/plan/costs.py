"""What an operation asks of a card: a product, a convolution, fused attention, or bytes; from shapes alone.

What has no formula is counted as the bytes it reads and writes, which is a lower bound, and named as uncovered; so are
recurrent layers, whose speed is a guess.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod

from mezzotint.trace.record import Call, Kind, TensorMeta


class Work(StrEnum):
    """What limits an operation in principle."""

    NOTHING = "nothing"  # views, and memory that is only reserved
    PRODUCT = "product"
    CONVOLUTION = "convolution"
    ATTENTION = "attention"
    RECURRENT = "recurrent"
    BYTES = "bytes"
    TRANSFER = "transfer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """`batch` products of (m, k) and (k, n)."""

    m: int
    n: int
    k: int
    batch: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """An operation's work. `format` is torch's dtype of the operands; `kernels` how many are launched.

    `is_winograd`: a dense convolution of 3 x 3 windows one apart. `has_formula` is False where only bytes are known.
    """

    work: Work
    format: str
    nbytes: int
    flops: int = 0
    products: tuple[Product, ...] = ()
    groups: int = 1
    head_size: int = 0
    is_winograd: bool = False
    kernels: int = 1
    has_formula: bool = True


_VIEWS = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense", "as_strided_",
     "unsqueeze_", "squeeze_", "transpose_", "t_", "detach_"}
)  # fmt: skip
_COMPLEX = {"complex32": "float16", "complex64": "float32", "complex128": "float64"}
_NO_PRODUCTS = ("int", "uint", "bool")
# without autograd (torch.inference_mode) composite operations arrive whole: linear, matmul, conv2d
_PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "addmm_", "baddbmm_", "_grouped_mm", "linear", "matmul"}
)
_CONVOLUTIONS = frozenset({"convolution", "convolution_backward", "cudnn_convolution", "conv1d", "conv2d", "conv3d"})
_RECURRENT = frozenset({"_cudnn_rnn", "_cudnn_rnn_backward"})
# a kernel of the foreach family takes up to so many tensors (4 KiB of arguments, ATen/native/cuda/MultiTensorApply.cuh)
_TENSORS_PER_KERNEL = 64
_KNOWN_BYTES = frozenset(
    {
        "embedding", "embedding_dense_backward", "index", "index_put", "index_put_", "_index_put_impl_", "gather",
        "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_select", "cat", "stack",
        "native_layer_norm", "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward",
        "_fused_rms_norm", "_fused_rms_norm_backward", "native_batch_norm", "native_batch_norm_backward",
        "cudnn_batch_norm", "cudnn_batch_norm_backward", "_softmax", "_softmax_backward_data", "_log_softmax",
        "_log_softmax_backward_data", "nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward",
        "nll_loss2d_backward", "native_dropout", "native_dropout_backward", "max_pool2d_with_indices",
        "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d",
        "_adaptive_avg_pool2d_backward", "upsample_nearest2d", "upsample_nearest2d_backward", "upsample_bilinear2d",
        "upsample_bilinear2d_backward", "constant_pad_nd", "topk", "sort", "cumsum", "argmax", "repeat", "flip", "roll",
        "tril", "triu", "clone", "copy_", "_to_copy", "fill_", "zero_", "select_backward", "slice_backward",
        "masked_fill", "masked_fill_", "where", "logsumexp", "linalg_vector_norm", "one_hot", "bernoulli_",
        "_safe_softmax",
        "mse_loss_backward", "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_", "max", "min", "unfold",
        "unfold_backward", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "im2col", "col2im", "glu",
        "glu_backward", "elu_backward", "hardtanh_backward", "softplus_backward", "std", "var_mean", "var", "nonzero",
        "masked_select", "masked_scatter", "new_zeros", "new_ones", "new_full", "normal_", "uniform_",
        "as_strided_scatter", "mse_loss", "smooth_l1_loss", "smooth_l1_loss_backward", "huber_loss",
        "huber_loss_backward", "binary_cross_entropy", "binary_cross_entropy_backward",
        "binary_cross_entropy_with_logits", "leaky_relu_backward", "hardswish_", "hardswish_backward",
        "hardsigmoid_backward", "mish_backward", "log_sigmoid_forward", "log_sigmoid_backward", "_prelu_kernel",
        "_prelu_kernel_backward", "_is_all_true", "_is_any_true", "_weight_norm_interface",
        "_weight_norm_interface_backward", "bincount", "histc", "scatter_reduce", "scatter_reduce_", "searchsorted",
        "cumprod", "floor_divide", "diag_embed", "vdot", "max_pool3d_with_indices", "max_pool3d_with_indices_backward",
        "upsample_linear1d", "upsample_linear1d_backward", "upsample_trilinear3d", "upsample_trilinear3d_backward",
        "grid_sampler_2d", "grid_sampler_2d_backward", "reflection_pad1d_backward", "_pack_padded_sequence",
        "_thnn_fused_gru_cell", "_thnn_fused_gru_cell_backward", "_thnn_fused_lstm_cell",
        "_thnn_fused_lstm_cell_backward_impl",
    }
)  # fmt: skip


# of the operations above, those that torch computes with its kernel for all elementwise operations
_ELEMENTWISE = frozenset({"where", "masked_fill", "masked_fill_", "clone", "copy_", "_to_copy", "mse_loss_backward"})


def is_scattered(call: Call, *, has_gaps: bool) -> bool:
    """Whether an elementwise kernel computes the place of each element: operands are broadcast or `has_gaps`."""
    if not call.outputs or (call.name in _KNOWN_BYTES and call.name not in _ELEMENTWISE):
        return False
    shape = call.outputs[0].shape
    shapes = {meta.shape for meta in call.inputs if meta.numel > 1}
    is_elementwise = len(call.outputs) == 1 and _broadcast(shapes) == shape
    return is_elementwise and (has_gaps or shapes != {shape})


def _broadcast(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape that shapes are broadcast to."""
    sizes: list[int] = []
    for shape in shapes:
        sizes += [1] * (len(shape) - len(sizes))
        for place, size in enumerate(reversed(shape)):
            sizes[place] = max(sizes[place], size)
    return tuple(reversed(sizes))


def cost_of(call: Call) -> Cost:
    """Return the work of one execution of a call."""
    name, dtype = call.name, call.format or "float32"
    if call.kind is Kind.VIEW or name in _VIEWS or call.op.startswith("prim."):
        return Cost(work=Work.NOTHING, format=dtype, nbytes=0)
    if name in _PRODUCTS:
        product = _product(name, call.inputs, call.outputs)
        operands = _operands(name, call.inputs)
        if product is not None and operands in _COMPLEX:  # four real products
            product, operands = replace(product, k=4 * product.k), _COMPLEX[operands]
        if product is not None and not operands.startswith(_NO_PRODUCTS):
            return Cost(
                work=Work.PRODUCT, format=operands, nbytes=call.nbytes, products=(product,),
                flops=2 * product.m * product.n * product.k * product.batch,
            )  # fmt: skip
    if name in _CONVOLUTIONS:
        return _convolution(call)
    if name == "scaled_dot_product_attention" or (name.startswith("_scaled_dot_product_") and "math" not in name):
        return _attention(call)
    if name in _RECURRENT:
        return _recurrent(call)
    if name.startswith(("_foreach_", "_fused_ada", "_fused_sgd", "_amp_foreach")):
        return Cost(
            work=Work.BYTES, format=dtype, nbytes=call.nbytes, flops=call.flops or 0,
            kernels=max(1, -(-len(call.outputs) // _TENSORS_PER_KERNEL)),
        )  # fmt: skip
    nbytes = _bytes(call)
    is_known = call.flops is not None or name in _KNOWN_BYTES or call.kind in (Kind.CAST, Kind.MAKE)
    return Cost(work=Work.BYTES, format=dtype, nbytes=nbytes, flops=call.flops or 0, has_formula=is_known)


def _bytes(call: Call) -> int:
    """Return the bytes moved; a lookup reads only the rows it takes, and its gradient is filled with zeros first."""
    written = sum(meta.nbytes for meta in call.outputs)
    if call.name in ("embedding", "index", "gather", "index_select"):
        return 2 * written + sum(meta.nbytes for meta in call.inputs[1:])
    if call.name == "embedding_dense_backward":
        return written + 3 * call.inputs[0].nbytes
    if call.kind is Kind.MAKE:
        return written
    if call.is_in_place and len(call.inputs) == 1:
        return 2 * written
    return call.nbytes


def _operands(name: str, inputs: Sequence[TensorMeta]) -> str:
    """Return the dtype of a product's operands: the last two matrices, whatever is added to them."""
    return inputs[0 if name in ("_grouped_mm", "linear") else -1].dtype  # offsets or a bias come last


def _product(name: str, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> Product | None:
    if len(inputs) < 2:
        return None
    if name == "_grouped_mm":
        a, b = inputs[0].shape, inputs[1].shape
        m, k, n = a[-2], a[-1], b[-1]
        return Product(m=m, n=n, k=k) if len(a) == 2 else Product(m=m, n=n, k=k, batch=a[0])
    if name == "linear":
        x, weight = inputs[0].shape, inputs[1].shape
        return Product(m=prod(x[:-1]), n=weight[0], k=weight[1])
    a, b = inputs[-2].shape, inputs[-1].shape
    if name == "matmul" and len(b) > 1 and len(a) > 1:
        m = a[-2] if len(b) > 2 else prod(a[:-1])
        return Product(m=m, n=b[-1], k=a[-1], batch=prod(b[:-2]) if len(b) > 2 else 1)
    if len(b) == 1:
        return Product(m=1 if len(a) == 1 else a[0], n=1, k=b[0])
    if len(a) == 1:
        return Product(m=1, n=b[-1], k=a[0])
    if len(b) == 2:
        return Product(m=a[-2], n=b[-1], k=a[-1])
    return Product(m=a[-2], n=b[-1], k=a[-1], batch=a[0])


def _convolution(call: Call) -> Cost:
    """An implicit product: output positions x output channels x (input channels of a group x window)."""
    if call.name == "convolution_backward":
        gradient, x, weight = (meta.shape for meta in call.inputs[:3])
        out = gradient
        parts = sum(1 for meta in call.outputs if len(meta.shape) > 1)
    else:
        x, weight = call.inputs[0].shape, call.inputs[1].shape
        out, parts = call.outputs[0].shape, 1
    is_transposed = weight[0] != out[1]
    if is_transposed:
        groups = max(1, out[1] // weight[1])
        positions, n, k = x[0] * prod(x[2:]), weight[1] * prod(weight[2:]), x[1] // groups
    else:
        groups = max(1, x[1] // weight[1])
        positions, n, k = out[0] * prod(out[2:]), out[1] // groups, weight[1] * prod(weight[2:])
    forward = Product(m=positions, n=n, k=k, batch=groups)
    # the gradient of the input is a product of the same size, that of the weight sums over positions
    products = (forward,) if call.name != "convolution_backward" else (forward,) * parts
    is_dense = not is_transposed and groups == 1 and tuple(weight[2:]) == (3, 3) and tuple(out[2:]) == tuple(x[2:])
    return Cost(
        work=Work.CONVOLUTION, format=call.inputs[1].dtype if call.name != "convolution_backward" else
        call.inputs[2].dtype, nbytes=call.nbytes, products=products, groups=groups, is_winograd=is_dense,
        flops=sum(2 * one.m * one.n * one.k * one.batch for one in products), kernels=len(products),
    )  # fmt: skip


def _attention(call: Call) -> Cost:
    is_backward = call.name.endswith("backward")
    query, key, value = call.inputs[1:4] if is_backward else call.inputs[:3]
    batch, heads, length, size = query.shape
    flops = 2 * batch * heads * length * key.shape[2] * (size + value.shape[3])
    if is_backward:
        flops = flops * 5 // 2  # five products instead of two
    return Cost(work=Work.ATTENTION, format=query.dtype, nbytes=call.nbytes, flops=flops, head_size=size)


def _recurrent(call: Call) -> Cost:
    """The products of all time steps: input and hidden state with the weights of every layer."""
    weights = [meta for meta in call.inputs[1:] if len(meta.shape) == 2]
    x = call.inputs[0]
    steps = x.shape[0] * x.shape[1] if len(x.shape) == 3 else x.shape[0]
    total = sum(meta.numel for meta in weights)
    if not total and call.outputs:  # weights came as a list that the trace keeps flat, or packed in one buffer
        total = max((meta.numel for meta in (*call.inputs, *call.outputs) if len(meta.shape) == 1), default=0)
    factor = 4 if call.name.endswith("backward") else 2
    return Cost(
        work=Work.RECURRENT, format=x.dtype, nbytes=call.nbytes, flops=factor * steps * total,
        kernels=2 * (x.shape[1] if len(x.shape) == 3 else 1), has_formula=False,
    )  # fmt: skip
