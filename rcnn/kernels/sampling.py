"""Sampling: a draw without replacement that every device, batch and number of ranks agrees on.

Each index has a 64-bit key, a hash of (stream, seed, step, data-set id of the image, index), and the smallest keys are
drawn. The arithmetic is integer and wraps; the hash is a bijection of the index, so the keys of an image never tie.
"""

import math
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

_Int64 = TypeVar("_Int64", Tensor, "np.ndarray[Any, np.dtype[np.int64]]")

#: Streams: anchors and proposals of the same image and step get different keys.
ANCHORS, PROPOSALS = int.from_bytes(b"anchors!", "big"), int.from_bytes(b"proposal", "big")

_GOLDEN = 0x9E3779B97F4A7C15


def _signed(value: int) -> int:
    """The int64 with the low 64 bits of ``value``."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def mix(value: _Int64) -> _Int64:
    """The finaliser of splitmix64, a bijection of 64-bit integers.

    Args:
        value: int64 tensor or array, read as unsigned.

    Returns:
        int64 of the same shape.

    Source:
        Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators (2014), with Stafford's mix 13.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def image_keys(stream: int, seed: int, step: Tensor, image_ids: Tensor) -> Tensor:
    """Where the sequence of keys of each image starts: ``mix(mix(mix(seed ^ stream) + step) + image id)``.

    Args:
        stream: ``ANCHORS`` or ``PROPOSALS``.
        seed: any integer; its low 64 bits count.
        step: ``()`` int64, number of the training step, on the CPU.
        image_ids: ``(B,)`` int64, position of each image in its data set, on the CPU.

    Returns:
        ``(B,)`` int64.
    """
    start = mix(np.array([_signed(seed ^ stream)]))
    return torch.from_numpy(mix(mix(start + step.numpy()) + image_ids.numpy()))


def sample(labels: Tensor, keys: Tensor, size: int, positives: int) -> tuple[Tensor, Tensor]:
    """Draw up to ``positives`` rows with label 1, then rows with label 0 until ``size`` are drawn.

    The key of index i is ``mix(start + i * 0x9E3779B97F4A7C15)``, compared as an unsigned number; rows come by rising
    key, positives first.

    Args:
        labels: ``(B, N)`` int64, 1, 0 or -1.
        keys: ``(B,)`` int64, from :func:`image_keys`.
        size: rows S to draw.
        positives: most rows with label 1.

    Returns:
        index: ``(B, S)`` int64, 0 in padding.
        drawn: ``(B, S)`` int64, 1, 0 or -1 for padding.
    """
    images, count = labels.shape
    offset = torch.arange(count, device=labels.device) * _signed(_GOLDEN)
    # Unsigned order is signed order with the top bit flipped.
    key = mix(keys[:, None] + offset) ^ _signed(1 << 63)
    slot = torch.arange(size, device=labels.device)
    index = []
    taken = []
    for label, most in ((1, positives), (0, size)):
        among = labels == label
        last = torch.iinfo(torch.int64).max
        index.append(torch.where(among, key, last).topk(min(most, count), dim=1, largest=False).indices)
        taken.append(among.sum(dim=1, keepdim=True).clamp(max=most))
    positive, total = taken[0], (taken[0] + taken[1]).clamp(max=size)
    joined = torch.cat((*index, index[0].new_zeros(images, 1)), dim=1)
    source = torch.where(slot < positive, slot, index[0].shape[1] + slot - positive)
    source = torch.where(slot < total, source, joined.shape[1] - 1)
    drawn = torch.where(slot < positive, 1, torch.where(slot < total, 0, -1))
    return joined.gather(1, source), drawn


def list_sizes(size: int) -> tuple[int, int]:
    """How the kernels gather candidates of a draw: keys below a limit, into lists of fixed length.

    Of uniform keys the number below a limit scatters by the root of its expectation. The expectation lies eight
    standard deviations above the rows to draw, and the length of a list eight above the expectation.

    Args:
        size: rows S to draw.

    Returns:
        Keys expected below the limit, and places of a list.
    """
    expected = size + math.ceil(8 * math.sqrt(size)) + 32
    return expected, expected + math.ceil(8 * math.sqrt(expected)) + 32
