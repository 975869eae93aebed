"""Nested lists, tuples and dictionaries of tensors."""

from collections.abc import Callable
from typing import Any

from mezzotint.torch_internals.registry import Feature, value

_NEEDED = (Feature.GHOST, Feature.ENGINE)

tree_map: Callable[..., Any] = value("torch.utils._pytree.tree_map", "changing nested values", needed_by=_NEEDED)
tree_map_only: Callable[..., Any] = value(
    "torch.utils._pytree.tree_map_only", "changing nested values of one type", needed_by=(Feature.GHOST,)
)
tree_leaves: Callable[..., list[Any]] = value(
    "torch.utils._pytree.tree_leaves", "listing nested values", needed_by=(Feature.GHOST,)
)
