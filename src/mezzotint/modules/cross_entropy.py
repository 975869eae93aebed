"""A language model's last layer and its loss in one: the logits exist for a few rows at a time.

For a vocabulary of tens of thousands of tokens, logits, their float32 copy and their log-softmax are the largest
tensors of a training step. How they are avoided is said in `mezzotint.models.loss`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezzotint.errors import echoed, is_count
from mezzotint.models.loss import IGNORED, chunked_loss


class LinearCrossEntropy(nn.Module):
    """The mean cross-entropy, float32, of `hidden @ weight.T` against targets.

    `weight`, (V, D), has the name and the initialisation of a torch.nn.Linear(D, V, bias=False); to tie it to an
    embedding, assign the embedding's weight. Targets equal to `ignore_index` do not count. `chunk_rows` rows of logits
    are held at a time, and computed a second time in backward. Raises ValueError where that is below 1.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        ignore_index: int = IGNORED,
        chunk_rows: int = 512,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not is_count(chunk_rows):
            raise ValueError(f"chunk_rows={echoed(chunk_rows)} is refused; pass a whole number of at least 1")
        self.ignore_index, self.chunk_rows = ignore_index, chunk_rows
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as torch.nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss in nats of hidden states (..., D) against targets (...); NaN where none counts.

        Raises ValueError where the shapes do not fit each other or the weight, or targets are no class numbers.
        """
        if hidden.shape[:-1] != targets.shape or hidden.shape[-1:] != self.weight.shape[1:]:
            raise ValueError(
                f"hidden states {tuple(hidden.shape)}, targets {tuple(targets.shape)} and a weight "
                f"{tuple(self.weight.shape)} do not fit; pass (..., D), (...) and (V, D)"
            )
        if targets.dtype not in (torch.int64, torch.uint8):
            raise ValueError(f"targets of {targets.dtype} are refused; pass class numbers as torch.int64")
        rows = hidden.reshape(-1, hidden.shape[-1])
        return chunked_loss(rows, self.weight, targets.reshape(-1), self.chunk_rows, ignore_index=self.ignore_index)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return all logits at once, (..., V), for sampling and evaluation."""
        return F.linear(hidden, self.weight)

    def extra_repr(self) -> str:
        """Return the sizes and what differs between layers of one size."""
        num_classes, in_features = self.weight.shape
        return f"{in_features}, {num_classes}, ignore_index={self.ignore_index}, chunk_rows={self.chunk_rows}"
