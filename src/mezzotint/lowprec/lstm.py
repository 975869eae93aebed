"""Whole LSTMs of the CPU on 16-bit inputs, a kernel above autograd's: products as all others, gates in float32.

Torch makes such an LSTM of a dozen operations a step, each of which is recorded and keeps its inputs. Here a layer is
one operation: cells stay in float32 from step to step, and gradients of weights are one product over all steps, where
torch adds them up in 16 bits. What waits for backward is gates, cells and outputs in 16 bits, less than a third of what
oneDNN's float32 layer keeps. As in float32, such an LSTM cannot be differentiated twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mezzotint.lowprec.calls import count
from mezzotint.lowprec.choice import Path
from mezzotint.lowprec.gate import is_ours, packs
from mezzotint.torch_internals.dispatch import DispatchKey, call_at_key
from mezzotint.torch_internals.transforms import is_inside_transform

NAME = "lstm.input"
_lstm = torch.ops.aten.lstm.input


def kernels() -> dict[str, Callable[..., Any]]:
    """Return the kernels for the CPU and for autograd on it, by name of the operation."""
    return {NAME: _whole}


def _whole(
    source: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    if not (is_ours(source.dtype) and _suits(source, states, weights)):
        how = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        # torch's own, called in a way that lets go of Python's lock
        return call_at_key(_lstm, DispatchKey.CompositeImplicitAutograd, source, states, weights, *how)
    count(NAME, Path.PACKED if packs(source.dtype) else Path.UPCAST)
    dtype, per_cell = source.dtype, 4 if has_biases else 2
    x = source.transpose(0, 1) if batch_first else source
    hidden, cells = [], []
    for layer in range(num_layers):
        outs = []
        for backwards in (False, True)[: 1 + bidirectional]:
            place = layer * (1 + bidirectional) + backwards
            of_input, of_state, *biases = weights[place * per_cell : (place + 1) * per_cell]
            bias = (biases[0].float() + biases[1].float()).to(dtype) if biases else None
            low = (tensor.to(dtype) for tensor in (states[0][place], states[1][place], of_input, of_state))
            out, last, cell = _Layer.apply(x.flip(0) if backwards else x, *low, bias)  # type: ignore[no-untyped-call]
            outs.append(out.flip(0) if backwards else out)
            hidden.append(last)
            cells.append(cell)
        x = torch.cat(outs, -1) if bidirectional else outs[0]
        if train and dropout > 0 and layer < num_layers - 1:
            x = torch.dropout(x, dropout, train)
    return x.transpose(0, 1) if batch_first else x, torch.stack(hidden), torch.stack(cells)


def _suits(source: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Return whether this LSTM is for us: plain tensors of one dtype, or cast to it by autocast, and no projection."""
    tensors = (source, *states, *weights)
    if torch.is_autocast_enabled("cpu"):
        is_one_dtype = torch.get_autocast_dtype("cpu") is source.dtype
    else:
        is_one_dtype = all(tensor.dtype is source.dtype for tensor in tensors)
    return (
        is_one_dtype
        and source.dim() == 3
        and source.numel() > 0
        and states[0].shape == states[1].shape
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
        and not is_inside_transform()
    )


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, hidden: Tensor, cell: Tensor, of_input: Tensor, of_state: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        T, B, H, dtype = len(x), *hidden.shape, x.dtype
        rows = x.reshape(T * B, -1)
        from_input = torch.mm(rows, of_input.t()) if bias is None else torch.addmm(bias, rows, of_input.t())
        from_input = from_input.view(T, B, 4 * H)
        out, cells, gates = (torch.empty(T, B, width, dtype=dtype) for width in (H, H, 4 * H))
        now, last, sums = cell.float(), hidden, torch.empty(B, 4 * H)
        for t in range(T):
            torch.add(from_input[t], torch.mm(last, of_state.t()), out=sums)
            sums[:, : 2 * H].sigmoid_()
            sums[:, 2 * H : 3 * H].tanh_()
            sums[:, 3 * H :].sigmoid_()
            enter, keep, new, show = sums.chunk(4, 1)
            now = torch.addcmul(now * keep, enter, new)
            last = out[t].copy_(now.tanh().mul_(show))
            gates[t].copy_(sums)
            cells[t].copy_(now)
        ctx.save_for_backward(x, hidden, cell, of_input, of_state, out, cells, gates)
        return out, last.clone(), now.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_last: Tensor, grad_cell: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, cell, of_input, of_state, out, cells, gates = ctx.saved_tensors
        T, B, H = out.shape
        dtype = out.dtype
        grads = torch.empty(T, B, 4 * H, dtype=dtype)  # of the sums that gates are made of
        of_last, of_now, sums = grad_last.float(), grad_cell.float(), torch.empty(B, 4 * H)
        of_enter, of_keep, of_new, of_show = sums.chunk(4, 1)
        for t in reversed(range(T)):
            opened = gates[t].float()
            enter, keep, new, show = opened.chunk(4, 1)
            slopes = opened * (1 - opened)  # of the sigmoids
            shown, before = cells[t].float().tanh_(), (cells[t - 1] if t else cell).float()
            of_out = of_last + grad_out[t]
            of_now = torch.addcmul(of_now, of_out * show, 1 - shown * shown)
            torch.mul(of_now, new, out=of_enter)
            torch.mul(of_now, before, out=of_keep)
            torch.mul(of_now * enter, 1 - new * new, out=of_new)
            torch.mul(of_out, shown, out=of_show)
            sums[:, : 2 * H].mul_(slopes[:, : 2 * H])
            of_show.mul_(slopes[:, 3 * H :])
            of_now = of_now * keep
            of_last = torch.mm(grads[t].copy_(sums), of_state).float()
        rows = grads.view(T * B, 4 * H)
        before_all = torch.cat((hidden[None], out[:-1])).view(T * B, H)
        return (
            torch.mm(rows, of_input).view(x.shape) if ctx.needs_input_grad[0] else None,
            of_last.to(dtype),
            of_now.to(dtype),
            torch.mm(rows.t(), x.reshape(T * B, -1)),
            torch.mm(rows.t(), before_all),
            rows.sum(0, dtype=torch.float32).to(dtype) if ctx.needs_input_grad[5] else None,
        )
