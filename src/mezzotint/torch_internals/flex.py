"""The functions inside FlexAttention that go through a compiler or through `vmap`."""

from typing import Any

from mezzotint.patches import Patches
from mezzotint.torch_internals.registry import Feature, Internal, declare, exists, find

_MODULE = "torch.nn.attention.flex_attention"
_REPLACED = {
    "flex_attention_hop": "the operator of FlexAttention",
    "_vmap_for_bhqkv": "calling a mask for every position",
    "_ordered_to_dense": "writing out a block mask",
    "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG": "running FlexAttention without compiling it",
}
for _name, _purpose in _REPLACED.items():
    declare(
        Internal(
            f"{_MODULE}.{_name}",
            _purpose,
            noted_in=(Feature.GHOST,),
            lost="FlexAttention could not be simulated",
            unknown="a program that calls it stops with an error of torch",
        )
    )


def replace_in_flex(patches: Patches, hop: Any, vmap: Any, dense: Any) -> None:
    """Replace what FlexAttention is made of, where torch has all of it."""
    if not all(exists(f"{_MODULE}.{name}") for name in _REPLACED):
        return
    module = find(_MODULE)
    for name, value in zip(_REPLACED, (hop, vmap, dense, True), strict=True):
        patches.replace(module, name, value)
