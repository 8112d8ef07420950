"""Checks that every op makes of its arguments."""

from torch import Tensor


def same_device(tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that do not lie together.

    Args:
        tensors: by the name of the argument; the first one says where.

    Raises:
        ValueError: a tensor is on another device than the first.
    """
    (first, reference), *others = tensors.items()
    for name, tensor in others:
        if tensor.device != reference.device:
            raise ValueError(f"{name} must be on {reference.device}, where {first} is, got {tensor.device}")
