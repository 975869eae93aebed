"""InputRounding: the formats to which the inputs of a matrix product are rounded, and how they are scaled into them.

A tensor core that multiplies 8-bit numbers reads each operand as codes and scales. What training does with it is said
by which format each operand takes and by what group of numbers shares a scale:

- tensor: one scale for all, largest number over largest magnitude (Micikevicius et al. 2022, FP8 Formats for Deep
  Learning, arXiv 2209.05433); from this very tensor, or delayed: from the magnitudes of the last steps;
- row: one for each row of the left operand and each column of the right one;
- block: one for 128 numbers along the summed axis in activations and gradients, one for 128 x 128 in weights
  (DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2);
- none: the format's own range, or, in MX and NVFP4 formats, the scales that are part of the format.
"""

from dataclasses import dataclass
from enum import StrEnum

from mezzotint.errors import FormatError
from mezzotint.formats.catalog import find_block_format, find_format
from mezzotint.formats.spec import BlockFormat, FloatFormat

BLOCK = 128  # numbers along an axis that share a scale of ScaleGroup.BLOCK
MAX_HISTORY = 1024


class ScaleGroup(StrEnum):
    """Which numbers of an operand share a scale."""

    NONE = "none"
    TENSOR = "tensor"
    ROW = "row"
    BLOCK = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRounding:
    """How products round their inputs.

    `inputs` is the format of activations and weights, `gradients` that of the gradients of outputs (the same where it
    is left out); each names a format or a block format. `scale` is the group that shares a scale. `history` is 0 for
    scales of the tensor at hand, or the number of past steps whose largest magnitude makes a delayed scale.
    `is_stochastic` rounds gradients at random, right on average.

    Raises FormatError for unknown formats and for combinations that mean nothing.
    """

    inputs: str
    gradients: str = ""
    scale: ScaleGroup = ScaleGroup.NONE
    history: int = 0
    is_stochastic: bool = False

    def __post_init__(self) -> None:
        """Spell formats in full and refuse contradictions."""
        object.__setattr__(self, "inputs", _input_format(self.inputs).name)
        object.__setattr__(self, "gradients", _input_format(self.gradients or self.inputs).name)
        try:
            object.__setattr__(self, "scale", ScaleGroup(self.scale))
        except ValueError:
            raise FormatError(f"unknown scale group {self.scale!r}; pass {', '.join(ScaleGroup)}") from None
        for name in (self.inputs, self.gradients):
            if isinstance(_input_format(name), BlockFormat) and self.scale is not ScaleGroup.NONE:
                raise FormatError(f"scale={self.scale} with {name} is refused: its blocks have scales; pass scale=none")
        if not 0 <= self.history <= MAX_HISTORY:
            raise FormatError(f"history={self.history} is refused; pass 0 to {MAX_HISTORY} steps")
        if self.history and self.scale is not ScaleGroup.TENSOR:
            raise FormatError(
                f"history={self.history} with scale={self.scale} is refused: delayed scales are those of whole "
                "tensors; pass scale=tensor or history=0"
            )

    def __str__(self) -> str:
        settings = []
        if self.gradients != self.inputs:
            settings.append(f"gradients={self.gradients}")
        if self.scale is not ScaleGroup.NONE:
            settings.append(f"scale={self.scale}")
        if self.history:
            settings.append(f"history={self.history}")
        if self.is_stochastic:
            settings.append("stochastic=true")
        return f"{self.inputs}({', '.join(settings)})" if settings else self.inputs

    def format_of(self, *, is_gradient: bool) -> FloatFormat | BlockFormat:
        """Return the format of gradients, or that of activations and weights."""
        return _input_format(self.gradients if is_gradient else self.inputs)


def _input_format(name: str) -> FloatFormat | BlockFormat:
    """Return the format, of a block or not, that the inputs of a product may be rounded to."""
    try:
        found: FloatFormat | BlockFormat = find_format(name)
    except FormatError:
        found = find_block_format(name)
    element = found.element if isinstance(found, BlockFormat) else found
    if element.bits > 16 or not element.is_signed:
        raise FormatError(f"products do not round their inputs to {found.name}; pass a format of at most 16 bits")
    return found
