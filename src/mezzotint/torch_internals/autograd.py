"""Autograd: which backward pass and node run, the number of the next node, and the call that starts the engine."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mezzotint.patches import Patches
from mezzotint.torch_internals.registry import Feature, Internal, declare, find, value

_RECORDING = (Feature.RECORDING,)
_ENGINE_CALL = "_engine_run_backward"
_UNKNOWN_PHASE = "the phases of operations, and the rules that tell backward from forward, are not judged"

current_graph_task: Callable[[], int] = value(
    "torch._C._current_graph_task_id",
    "whether a backward pass runs",
    noted_in=(Feature.RECORDING, Feature.BISECT, Feature.GHOST),
    lost="backward passes could not be told from the rest of the program",
    unknown=_UNKNOWN_PHASE,
    otherwise=lambda: -1,
)
current_node: Callable[[], Any] = value(
    "torch._C._current_autograd_node",
    "which node of the graph runs",
    noted_in=_RECORDING,
    lost="operations of backward passes could not be traced to their layers",
    unknown="their modules and lines are not known",
    otherwise=lambda: None,
)
next_sequence_number: Callable[[], int] = value(
    "torch._C._autograd._get_sequence_nr",
    "the number of the next node of the graph",
    noted_in=_RECORDING,
    lost="operations of backward passes could not be traced to the operations that they belong to",
    unknown="their modules and lines are not known",
    otherwise=lambda: 0,
)


@cache
def _has_node_numbers() -> bool:
    node = _node_of_a_sum()
    return node is None or hasattr(node, "_sequence_nr")


def _node_of_a_sum() -> Any:
    """Return a node of a tiny graph, None where none can be made here (inside a transform, say)."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            return torch.zeros((), device="cpu", requires_grad=True).sum().grad_fn
    except (RuntimeError, TypeError):
        return None


declare(
    Internal(
        "torch.autograd.graph.Node._sequence_nr",
        "the number of a node of the graph",
        noted_in=_RECORDING,
        lost="operations of backward passes could not be traced to the operations that they belong to",
        unknown="their modules and lines are not known",
        check=_has_node_numbers,
    )
)


def sequence_number_of(node: Any) -> int:
    """Return the number of a node, -1 where torch does not tell."""
    ask = getattr(node, "_sequence_nr", None)
    return -1 if ask is None else int(ask())


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written in place."""
    return tensor._version


declare(
    Internal(
        "torch.Tensor._version",
        "whether a tensor was written in place",
        needed_by=(Feature.RECORDING, Feature.ENGINE),
    )
)


# the calls that start autograd's engine

_checked: dict[Any, bool] = {}


def _starts() -> tuple[Any, ...]:
    autograd = torch.autograd
    return find(f"torch.autograd.{_ENGINE_CALL}"), autograd.backward, autograd.grad, Tensor.backward


def sees_backward() -> bool:
    """Return whether `torch.autograd.backward`, `torch.autograd.grad` and `Tensor.backward` call the hook point.

    Each is run once on a tensor with one element, the first time that these functions are met in this process.
    """
    starts = _starts()
    if starts[0] is None:
        return False
    if any(hasattr(one, "__wrapped__") for one in starts):
        return True  # somebody watches already, and the functions below were looked at then
    if starts not in _checked:
        _checked[starts] = _count_calls() == len(starts) - 1
    return _checked[starts]


def _count_calls() -> int:
    """Return through how many of the three public calls the hook point is reached; 3 where none can be run here."""
    found = [0]

    def count(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found[0] += 1
        return original(*args, **kwargs)

    patches = Patches()
    patches.wrap(torch.autograd, _ENGINE_CALL, count)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            leaf = torch.zeros((), device="cpu", requires_grad=True)
            torch.autograd.backward([leaf * 1])
            torch.autograd.grad([leaf * 1], [leaf])
            (leaf * 1).backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, TypeError, NotImplementedError):
        return 3
    finally:
        patches.undo()
    return found[0]


declare(
    Internal(
        f"torch.autograd.{_ENGINE_CALL}",
        "every call that starts a backward pass",
        needed_by=(Feature.GHOST,),
        noted_in=(Feature.RECORDING, Feature.BISECT),
        lost="backward passes could be watched only through torch.autograd.backward and torch.autograd.grad",
        unknown="passes that a program starts by functions that it imported before are not known, and MZ201 to MZ229 "
        "are not judged for them",
        check=sees_backward,
    )
)


def wrap_backward(patches: Patches, around: Callable[..., Any]) -> None:
    """Make every backward pass go through `around(original, roots, gradients, retain, create_graph, ...)`.

    Where the hook point is missing, the public functions are wrapped, and called with the same arguments.
    """
    if sees_backward():
        patches.wrap(torch.autograd, _ENGINE_CALL, around)
        return
    patches.wrap(torch.autograd, "backward", _as_engine_call(around, _backward_arguments))
    patches.wrap(torch.autograd, "grad", _as_engine_call(around, _grad_arguments))


def wrap_backward_of_checkpoints(patches: Patches, around: Callable[..., Any]) -> None:
    """Make backward passes that `torch.autograd.graph` starts go through `around` too."""
    patches.wrap(torch.autograd.graph, _ENGINE_CALL, around)


declare(
    Internal(
        f"torch.autograd.graph.{_ENGINE_CALL}",
        "backward passes that torch.autograd.graph starts",
        noted_in=(Feature.GHOST,),
        lost="some backward passes could not be prepared for tensors without data",
        unknown="a program that starts them may stop with an error of torch",
    )
)


def _as_engine_call(around: Callable[..., Any], engine_arguments: Callable[..., Any]) -> Callable[..., Any]:
    def outer(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def call(*_args: Any, **_kwargs: Any) -> Any:
            return original(*args, **kwargs)

        given, named = engine_arguments(*args, **kwargs)
        return around(call, *given, **named)

    return outer


def _backward_arguments(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    _grad_variables: Any = None,
    inputs: Any = None,
    **_rest: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    keeps = create_graph if retain_graph is None else retain_graph
    return (_as_tuple(tensors), grad_tensors, keeps, create_graph, inputs), {"accumulate_grad": True}


def _grad_arguments(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    *_rest: Any,
    **_named: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    keeps = create_graph if retain_graph is None else retain_graph
    return (_as_tuple(outputs), grad_outputs, keeps, create_graph, inputs), {"accumulate_grad": False}


def _as_tuple(tensors: Any) -> tuple[Any, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


# what else holds in this thread

_SAVED_HOOKS = "torch._C._autograd._top_saved_tensors_default_hooks"
declare(
    Internal(
        _SAVED_HOOKS,
        "whether hooks on saved tensors are in force",
        noted_in=(Feature.PROOF,),
        lost="hooks on saved tensors could not be asked for",
        unknown="a script that leaves some in force between its runs is not noticed",
    )
)


def has_saved_tensors_hooks() -> bool:
    """Return whether default hooks on saved tensors are in force in this thread."""
    ask = find(_SAVED_HOOKS)
    return ask is not None and ask(False) is not None


_LEVEL = "torch.autograd.forward_ad._current_level"
declare(Internal(_LEVEL, "whether forward-mode differentiation is under way; without it, torch's operations are used"))


def is_forward_mode() -> bool:
    """Return whether forward-mode differentiation is under way; true where torch does not tell."""
    return bool(find(_LEVEL, 0) >= 0)
