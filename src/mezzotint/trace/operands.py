"""Which tensors a failing call was given: the names in the expression that raised, looked up in its frame.

An exception that torch raises before an operation is reached leaves no operation behind; its wording changes between
versions. What the call was given does not.
"""

import ast
import linecache
import textwrap
from itertools import islice
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor

from mezzotint.torch_internals import tensors
from mezzotint.trace.variables import variables_of


def operands_of(error: BaseException) -> dict[str, Any]:
    """Return `raised_in`, the innermost Python function, and dtypes and kinds of the tensors that its call names.

    `is_inference` says whether one of them was made in inference mode.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return {"raised_in": "", "called": "", "operand_dtypes": [], "is_inference": False}
    expression = _expression(trace)
    tensors = list(_tensors(expression, trace.tb_frame)) if expression is not None else []
    called = expression.func if isinstance(expression, ast.Call) else None
    return {
        "raised_in": trace.tb_frame.f_code.co_name,
        "called": called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", ""),
        "operand_dtypes": sorted({str(one.dtype).removeprefix("torch.") for one in tensors}),
        "is_inference": any(one.is_inference() for one in tensors) and not torch.is_inference_mode_enabled(),
    }


def _expression(trace: TracebackType) -> ast.AST | None:
    """Return the expression of the instruction that raised."""
    code = trace.tb_frame.f_code
    place = next(islice(code.co_positions(), trace.tb_lasti // 2, None), None)
    if place is None or None in place:
        return None
    first, last, start, end = place
    assert first is not None
    assert last is not None
    lines = [linecache.getline(code.co_filename, number) for number in range(first, last + 1)]
    if not all(lines):
        return None
    encoded = [line.encode() for line in lines]
    encoded[-1] = encoded[-1][:end]
    encoded[0] = encoded[0][start:]
    text = b"".join(encoded).decode(errors="replace")
    try:
        return ast.parse(f"({textwrap.dedent(text)}\n)", mode="eval").body
    except (SyntaxError, ValueError):
        try:
            return ast.parse(textwrap.dedent(text)).body[0]
        except (SyntaxError, ValueError, IndexError):
            return None


def _tensors(expression: ast.AST, frame: FrameType) -> "list[Tensor]":
    """Return the tensors that names and attributes in the expression stand for; nothing is called."""
    found: list[Tensor] = []
    for node in ast.walk(expression):
        value = _value(node, frame)
        if isinstance(value, (list, tuple)):
            found.extend(one for one in value if isinstance(one, Tensor))
        elif isinstance(value, Tensor):
            found.append(value)
    return found


def _value(node: ast.AST, frame: FrameType) -> Any:
    if isinstance(node, ast.Name):
        return variables_of(frame).get(node.id, frame.f_globals.get(node.id))
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, frame)
        if isinstance(owner, torch.nn.Module):
            for held in (tensors.parameters_of(owner), tensors.buffers_of(owner), tensors.children_of(owner)):
                if node.attr in held:
                    return held[node.attr]
        return getattr(owner, "__dict__", {}).get(node.attr)
    return None
