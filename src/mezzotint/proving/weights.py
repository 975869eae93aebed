"""A model's weights as a run keeps them: copies, a digest, the way they went."""

import hashlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


def copies(model: nn.Module) -> list[Tensor]:
    """Return copies of a model's parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


@torch.no_grad()
def distance(model: nn.Module, initial: Sequence[Tensor]) -> float:
    """Return how far the weights went: the 2-norm of their change."""
    squares = [
        (_wide(parameter) - _wide(before)).square().sum().cpu()
        for parameter, before in zip(model.parameters(), initial, strict=True)
    ]
    return float(torch.stack(squares).sum().sqrt())


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors' bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:32]


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
