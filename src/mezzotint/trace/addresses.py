"""Where a tensor begins: the number by which the recorder knows a tensor without keeping it."""

from torch import Tensor

from mezzotint.torch_internals.tensors import storage_number


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no numbers, because it stands for one on a simulated device."""
    return type(tensor).__name__ == "FakeTensor"


def address_of(tensor: Tensor) -> int:
    """Return where the tensor's first element is; for a fake tensor, a number that is as good.

    Raises RuntimeError or NotImplementedError for tensors without memory of their own (sparse ones).
    """
    if not is_fake(tensor):
        return tensor.data_ptr()
    return -((storage_number(tensor.untyped_storage()) << 44) + tensor.storage_offset() * tensor.element_size())
