"""Sorting: rows of 64-bit keys on a GPU, of which the device alone knows how many are in use.

Proposals and detections order by (score, lower index). One integer holds both: a float32 score made monotone in the
high half, the complement of the index in the low half. Keys that differ leave the sort no choice, so an order that
began with atomics ends the same on every run.
"""

import numpy as np
import torch
from torch import Tensor

from rcnn.kernels import _launch

#: Threads of a block, keys that each holds at most, and so the keys that a block sorts.
THREADS, EACH = 256, 8
RUN = THREADS * EACH
SOURCE = _launch.CudaSource("sorting", THREADS=THREADS, EACH=EACH)


def sort_rows(keys: Tensor, count: Tensor) -> Tensor:
    """Sort the first ``count[q]`` keys of each row by falling key. For launchers: it has no CPU body.

    Args:
        keys: ``(Q, M)`` int64, contiguous; overwritten.
        count: ``(Q,)`` int64, keys in use, 0..M.

    Returns:
        ``(Q, M)`` int64, sorted as far as they are in use: ``keys`` itself where M is at most ``RUN``, else a new
        tensor.
    """
    rows, capacity = keys.shape
    width = np.int32(capacity)
    _launch.launch(SOURCE, "sort_runs", (rows, -(-capacity // RUN)), THREADS, (keys, count, width))
    if capacity <= RUN:
        return keys
    merged = torch.empty_like(keys)
    grid = (rows, -(-capacity // THREADS))
    _launch.launch(SOURCE, "merge_runs", grid, THREADS, (keys, count, merged, width))
    return merged
