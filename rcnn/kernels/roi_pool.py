"""RoI pooling: the largest map value in each bin of a region.

The CPU body takes the bins of one height and width together: it gathers their cells from the channels-last map and
lets ``max_pool2d`` find each maximum and the cell that gave it. The gradient goes to that cell.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.kernels.roi_align import as_map, as_rois, as_table, channels_last, check_pool

#: Map values gathered at once: 2 MB of float32, about what the caches near the cores hold.
GATHERED = 1 << 19


def roi_pool(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """Largest value of a map in each bin of each region.

    The corners of a region are scaled and rounded (halves away from zero) to whole cells, both of which belong to
    it, so it is at least one cell wide and high. Bin i of n holds the cells from ``floor(i * extent / n)`` to
    ``ceil((i + 1) * extent / n) - 1`` of the region that lie on the map. A bin without a cell gives 0 and passes no
    gradient on. At equal values the first cell in row-major order takes the gradient. NaN values are passed over; a
    bin of nothing else gives the lowest finite number and passes no gradient on. So does a region with a NaN or
    infinite coordinate give zeros.

    Args:
        input: ``(B, C, H, W)`` float, map; channels-last is the fast layout and the output's layout follows it.
        boxes: ``(R, 5)`` float, image index, x1, y1, x2, y2 in image pixels; or B tensors ``(n, 4)``.
        output_size: bins in y and x, or one number for both.
        spatial_scale: map cells per image pixel.

    Returns:
        ``(R, C, oh, ow)`` of the input's dtype.

    Raises:
        ValueError: a shape, dtype or image index is wrong.

    Source:
        Girshick, Fast R-CNN (2015), section 2.1; ``torchvision.ops.roi_pool``.
    """
    rois = as_rois(boxes)
    size = check_pool([input], rois, output_size, [spatial_scale], "input")
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    return _RoIPool.apply(input, rois, size, float(spatial_scale), needs_grad)


class _RoIPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, needs_grad: bool
    ) -> Tensor:
        ctx.shape, ctx.dtype, ctx.layout = input.shape, input.dtype, channels_last(input)
        output, cell = _forward_cpu(input, rois.detach(), size, spatial_scale, needs_grad)
        ctx.save_for_backward(cell)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cell,) = ctx.saved_tensors
        return _backward_cpu(grad, cell, ctx.shape, ctx.dtype, ctx.layout), None, None, None, None


def _forward_cpu(
    input: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Maxima ``(R, C, oh, ow)`` and, if a gradient is needed, where each lies among the values of the channels-last
    map, ``(R * oh * ow, C)`` integers; one past the last value for none."""
    batch, channels, height, width = input.shape
    if not bool(((rois[:, 0] >= 0) & (rois[:, 0] < batch)).all()):
        raise ValueError(f"boxes must name images 0..{batch - 1}, got {rois[:, 0].min()}..{rois[:, 0].max()}")
    rois = rois.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    finite = torch.isfinite(rois).all(dim=1)[:, None]
    top, tall = _axis(rois[:, 2], rois[:, 4], finite, spatial_scale, height, size[0])
    left, wide = _axis(rois[:, 1], rois[:, 3], finite, spatial_scale, width, size[1])
    image = rois[:, 0].long() * (height * width)
    first = ((image[:, None] + top * width)[:, :, None] + left[:, None, :]).flatten()

    table = as_table(input)
    lowest = torch.finfo(input.dtype).min
    # Then every maximum is a number, and every bin with a cell has one that gives it.
    plain = channels == 0 or bool(table.amin() > lowest)
    if not plain:
        table = table.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    output = table.new_empty((len(first), channels))
    cells = None
    if needs_grad:
        # More than 2 ** 31 values need int64, which takes twice as long.
        cells = torch.empty_like(output, dtype=torch.int32 if table.numel() < 2**31 else torch.int64)
        channel = torch.arange(channels, device=table.device, dtype=cells.dtype)
    for rows, columns, bins in _groups(tall, wide, channels):
        if rows * columns == 0:
            output.index_fill_(0, bins, 0)
            if cells is not None:
                cells.index_fill_(0, bins, table.numel())
            continue
        start = first[bins]
        step = torch.arange(columns, device=table.device)
        step = (torch.arange(0, rows * width, width, device=table.device)[:, None] + step).flatten()
        read = table.index_select(0, (start[:, None] + step).flatten()).view(len(bins), rows, columns, channels)
        value, place = F.max_pool2d(read.permute(0, 3, 1, 2), (rows, columns), return_indices=True)
        value = value.view(len(bins), channels)
        output.index_copy_(0, bins, value if plain else value.clamp(min=lowest))
        if cells is not None:
            found = (step * channels).to(cells.dtype).index_select(0, place.flatten()).view(len(bins), channels)
            found.add_((start * channels).to(cells.dtype)[:, None]).add_(channel)
            cells.index_copy_(0, bins, found if plain else found.masked_fill_(value <= lowest, table.numel()))
    return as_map(output, (len(rois), channels, *size), input.dtype, channels_last(input)), cells


def _backward_cpu(grad: Tensor, cells: Tensor, shape: Sequence[int], dtype: torch.dtype, last: bool) -> Tensor:
    values = as_table(grad)
    table = values.new_zeros(math.prod(shape) + 1).index_add_(0, cells.view(-1), values.view(-1))
    return as_map(table[:-1], shape, dtype, last)


def _axis(low: Tensor, high: Tensor, finite: Tensor, scale: float, size: int, bins: int) -> tuple[Tensor, Tensor]:
    """First cell and number of cells on the map, both ``(R, bins)`` int64, of each bin along one axis."""
    first, last = _round(low * scale)[:, None], _round(high * scale)[:, None]
    step = (last - first + 1).clamp(min=1) / bins
    number = torch.arange(bins, dtype=low.dtype, device=low.device)
    start = (torch.floor(number * step) + first).clamp(0, size)
    end = (torch.ceil((number + 1) * step) + first).clamp(0, size)
    return torch.where(finite, start, 0).long(), torch.where(finite, end - start, 0).clamp(min=0).long()


def _round(x: Tensor) -> Tensor:
    """Nearest whole number, halves away from zero as in C."""
    whole = torch.trunc(x)
    return whole + torch.sign(x) * ((x - whole).abs() >= 0.5).to(x.dtype)


def _groups(tall: Tensor, wide: Tensor, channels: int) -> Iterator[tuple[int, int, Tensor]]:
    """Rows, columns and indices ``(n,)`` of bins of one size, few enough for what they read to stay in the cache."""
    rows, columns = torch.broadcast_tensors(tall[:, :, None], wide[:, None, :])
    key, order = ((rows << 32) + columns).flatten().sort(stable=True)
    sizes, counts = key.unique_consecutive(return_counts=True)
    for size, bins in zip(sizes.tolist(), order.split(counts.tolist()), strict=True):
        height, width = size >> 32, size & 0xFFFFFFFF
        for part in bins.split(max(1, GATHERED // max(1, height * width * channels))):
            yield height, width, part
