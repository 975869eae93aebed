"""Nested values to JSON and tensors, and back: what makes a checkpoint readable without pickle.

A tensor becomes {"$tensor": name} and goes to a table of tensors; tensors that are the same memory share a name and
come back as one. Dicts with other keys than texts, tuples and dtypes have their own marks; everything else that JSON
knows stays as it is, floats exactly (repr round trip, NaN and infinities included).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mezzotint.errors import CheckpointError, shortened

_PLAIN = (str, int, float, bool, type(None))


def flatten(value: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return `value` as a JSON tree and the tensors it refers to, by name; they are contiguous, on the CPU.

    Raises CheckpointError, naming the place, for a type that a checkpoint does not hold.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def walk(item: Any, place: str) -> Any:
        if isinstance(item, Tensor):
            return {"$tensor": _stored(item, place, tensors, names)}
        if isinstance(item, torch.dtype):
            return {"$dtype": str(item).removeprefix("torch.")}
        if isinstance(item, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in item):
                return {key: walk(inner, f"{place}.{key}") for key, inner in item.items()}
            pairs = [[walk(key, place), walk(inner, f"{place}.{key}")] for key, inner in item.items()]
            return {"$dict": pairs}
        if isinstance(item, tuple):
            return {"$tuple": [walk(inner, f"{place}[{index}]") for index, inner in enumerate(item)]}
        if isinstance(item, list):
            return [walk(inner, f"{place}[{index}]") for index, inner in enumerate(item)]
        if type(item) in _PLAIN:
            return item
        raise CheckpointError(
            f"{place or 'the state'} is a {type(item).__name__}, which a checkpoint does not hold; keep to tensors, "
            "numbers, texts, lists, tuples and dicts"
        )

    return walk(value, ""), tensors


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `flatten` took apart. Raises CheckpointError for a tree that it cannot have written."""
    if isinstance(tree, list):
        return [unflatten(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$dtype" in tree:
        dtype = getattr(torch, tree["$dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"the state holds the unknown dtype {shortened(tree['$dtype'])}")
        return dtype
    if "$tuple" in tree:
        return tuple(unflatten(item, tensors) for item in tree["$tuple"])
    if "$dict" in tree:
        return {unflatten(key, tensors): unflatten(item, tensors) for key, item in tree["$dict"]}
    unknown = [key for key in tree if key.startswith("$")]
    if unknown:
        raise CheckpointError(f"the state holds the unknown mark {unknown[0]}; it was written by a newer mezzotint")
    return {key: unflatten(item, tensors) for key, item in tree.items()}


def _stored(tensor: Tensor, place: str, tensors: dict[str, Tensor], names: dict[tuple[Any, ...], str]) -> str:
    """Put `tensor` into the table, unless the same memory is there, and return its name."""
    tensor = tensor.detach()
    same = (tensor.data_ptr(), tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride())
    if tensor.numel() and same in names:
        return names[same]
    name = place.lstrip(".") or "value"
    names[same] = name
    tensors[name] = tensor.cpu().contiguous().clone() if tensor.numel() else tensor.cpu()
    return name
