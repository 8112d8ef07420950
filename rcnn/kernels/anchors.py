"""Anchors: the reference boxes of the region proposal network, laid over every cell of every pyramid level."""

from collections import OrderedDict
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from rcnn.kernels import _launch
from rcnn.kernels.checks import check_positive, check_sequence, check_tensors, check_whole

#: Anchor grids kept for re-use; a batch of another size than the last ones makes its own.
_CACHED = 16
#: Threads of a block.
THREADS = 256
SOURCE = _launch.CudaSource("anchors", THREADS=THREADS)

_cache: "OrderedDict[tuple[object, ...], tuple[Tensor, Tensor]]" = OrderedDict()


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """Anchors of one cell, centred on the origin.

    ``height = size * sqrt(ratio)``, ``width = size / sqrt(ratio)``; corners are half of that, rounded to whole pixels
    (half to even). The order is ratio-major: all sizes of the first ratio, then all sizes of the second.

    Args:
        sizes: square root of the anchor area, pixels, each positive.
        aspect_ratios: height / width, each positive.

    Returns:
        ``(len(aspect_ratios) * len(sizes), 4)`` float32, pixels.

    Raises:
        TypeError: an argument is no sequence.
        ValueError: a sequence is empty or holds a number that is not positive.

    Source:
        torchvision, ``AnchorGenerator.generate_anchors``.
    """
    for name, values in (("sizes", sizes), ("aspect_ratios", aspect_ratios)):
        check_sequence(name, values)
        if len(values) == 0 or not all(isinstance(value, Real) and 0 < value < float("inf") for value in values):
            raise ValueError(f"{name} must be one or more positive numbers, got {tuple(values)}")
    scales = torch.tensor(list(sizes), dtype=torch.float32)
    height_ratios = torch.tensor(list(aspect_ratios), dtype=torch.float32).sqrt()
    widths = ((1 / height_ratios)[:, None] * scales[None]).reshape(-1)
    heights = (height_ratios[:, None] * scales[None]).reshape(-1)
    return (torch.stack((-widths, -heights, widths, heights), dim=1) / 2).round()


def anchors(cells: Tensor, shapes: Sequence[tuple[int, int]], strides: Sequence[float]) -> Tensor:
    """Anchors of all levels of an image, ``cell + (x * stride, y * stride)``.

    The order is level, row, column, anchor of the cell: the order of a convolution's output ``(A, H, W)`` permuted to
    ``(H, W, A)``. The last grids are kept: calling again with the same ``cells`` tensor, shapes and strides returns the
    same tensor, which must not be modified.

    Args:
        cells: ``(L, A, 4)`` float32, :func:`cell_anchors` of each level, pixels.
        shapes: height and width of each level's feature map, cells.
        strides: distance between neighbouring cells of each level, pixels.

    Returns:
        ``(N, 4)`` float32, pixels, with ``N = A * sum(height * width)``, on the device of ``cells``.

    Raises:
        TypeError: an argument is no tensor, a side of a shape no integer or a stride no number.
        ValueError: ``cells`` has another shape or type, the number of shapes or strides is not ``L``, or one of
            them is out of range.

    Source:
        torchvision, ``AnchorGenerator.grid_anchors``; here the stride is given and not derived from the image's size.
    """
    check_tensors({"cells": cells})
    if cells.dim() != 3 or cells.shape[0] < 1 or cells.shape[2] != 4 or cells.dtype != torch.float32:
        raise ValueError(
            f"cells must be float32 of shape (L, A, 4) with L at least 1, got {cells.dtype} of {tuple(cells.shape)}"
        )
    check_sequence("shapes", shapes)
    check_sequence("strides", strides)
    if len(shapes) != len(cells) or len(strides) != len(cells):
        raise ValueError(
            f"shapes and strides must have one entry for each of {len(cells)} levels, "
            f"got {len(shapes)} shapes and {len(strides)} strides"
        )
    if cells.is_inference():  # such a tensor does not tell that it was changed
        return _made(cells, shapes, strides)
    try:
        key = id(cells), cells._version, tuple(map(tuple, shapes)), tuple(strides)
        found = _cache.get(key)
    except TypeError:  # not what it should be, which is told in words
        return _made(cells, shapes, strides)
    if found is None:
        # A cached tensor outlives the call, so it must be usable in training too. Holding `cells` keeps its id taken.
        with torch.inference_mode(False), torch.no_grad():
            found = (cells, _made(cells, shapes, strides))
        _cache[key] = found
        while len(_cache) > _CACHED:
            _cache.popitem(last=False)
    else:
        _cache.move_to_end(key)
    return found[1]


def kept() -> list[Tensor]:
    """The grids that are kept now. Whoever records a CUDA graph holds them: it reads their memory at every replay."""
    return [grid for _, grid in _cache.values()]


def _made(cells: Tensor, shapes: Sequence[tuple[int, int]], strides: Sequence[float]) -> Tensor:
    for level, (shape, stride) in enumerate(zip(shapes, strides, strict=True)):
        check_sequence(f"shapes[{level}]", shape)
        if len(shape) != 2:
            raise ValueError(f"shapes[{level}] must be a height and a width, got {shape}")
        for side in shape:
            check_whole(f"shapes[{level}]", side, 0)
        check_positive(f"strides[{level}]", stride)
    return (_cuda if _launch.uses_kernels(cells) else _cpu)(cells, shapes, strides)


def _cpu(cells: Tensor, shapes: Sequence[tuple[int, int]], strides: Sequence[float]) -> Tensor:
    levels = []
    for cell, (height, width), stride in zip(cells, shapes, strides, strict=True):
        x = torch.arange(width, device=cells.device, dtype=torch.float32) * stride
        y = torch.arange(height, device=cells.device, dtype=torch.float32) * stride
        x, y = x.expand(height, width), y[:, None].expand(height, width)
        shifts = torch.stack((x, y, x, y), dim=2)
        levels.append((shifts[:, :, None] + cell).reshape(-1, 4))
    return torch.cat(levels)


def _cuda(cells: Tensor, shapes: Sequence[tuple[int, int]], strides: Sequence[float]) -> Tensor:
    cells = _launch.dense(cells)
    counts = [int(height) * int(width) * cells.shape[1] for height, width in shapes]
    grids = cells.new_empty(sum(counts), 4)
    start = 0
    for cell, count, (_, width), stride in zip(cells, counts, shapes, strides, strict=True):
        numbers = np.int32(count), np.int32(len(cell)), np.int32(width), np.float32(stride)
        grid = grids[start : start + count]
        _launch.launch(SOURCE, "anchor_grid", -(-count // THREADS), THREADS, (cell, grid, *numbers))
        start += count
    return grids
