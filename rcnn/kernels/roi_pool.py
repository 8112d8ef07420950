"""RoI pooling: the largest map value in each bin of a region.

The CPU body visits the cells of a bin one after the other, for many regions of about the same size at once, and
remembers which cell gave each maximum. The gradient goes to that cell.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.kernels.roi_align import as_map, as_rois, as_table, channels_last, check_pool

#: Output values of one slice of the regions: 256 KB of float32, so that they stay in the cache over all cells.
SLICE = 1 << 16


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
    return _RoIPool.apply(input, rois, size, float(spatial_scale))


class _RoIPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float) -> Tensor:
        ctx.shape, ctx.dtype, ctx.layout = input.shape, input.dtype, channels_last(input)
        output, cell = _forward_cpu(input, rois.detach(), size, spatial_scale, ctx.needs_input_grad[0])
        ctx.save_for_backward(cell)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cell,) = ctx.saved_tensors
        return _backward_cpu(grad, cell, ctx.shape, ctx.dtype, ctx.layout), None, None, None


def _forward_cpu(
    input: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Maxima ``(R, C, oh, ow)`` and, if a gradient is needed, their cells: rows of the table ``(R * oh * ow, C)``
    int32, -1 for none."""
    batch, channels, height, width = input.shape
    if not bool(((rois[:, 0] >= 0) & (rois[:, 0] < batch)).all()):
        raise ValueError(f"boxes must name images 0..{batch - 1}, got {rois[:, 0].min()}..{rois[:, 0].max()}")
    rois = rois.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    finite = torch.isfinite(rois).all(dim=1)[:, None]
    top, tall = _axis(rois[:, 2], rois[:, 4], finite, spatial_scale, height, size[0])
    left, wide = _axis(rois[:, 1], rois[:, 3], finite, spatial_scale, width, size[1])
    image = rois[:, 0].long() * (height * width)

    table = as_table(input)
    bins = size[0] * size[1]
    output = table.new_empty((len(rois), bins, channels))
    cells = torch.empty((len(rois), bins, channels), dtype=torch.int32, device=table.device) if needs_grad else None
    lowest = torch.finfo(input.dtype).min
    for region in _slices(tall, wide, bins * channels):
        row_of, column_of = top[region][:, :, None], left[region][:, None, :]
        rows, columns = tall[region][:, :, None], wide[region][:, None, :]
        best = table.new_full((len(region) * bins, channels), lowest)
        cell = torch.full_like(best, -1, dtype=torch.int32) if needs_grad else None
        for i in range(int(rows.max())):
            start = image[region][:, None, None] + (row_of + torch.minimum(rows - 1, rows.new_tensor(i))) * width
            for j in range(int(columns.max())):
                index = start + column_of + torch.minimum(columns - 1, columns.new_tensor(j))
                index = index.clamp_(0, len(table) - 1).view(-1)
                value = table.index_select(0, index)
                if cell is None:
                    torch.fmax(best, value, out=best)
                else:
                    better = value > best
                    torch.where(better, value, best, out=best)
                    torch.where(better, index.int()[:, None], cell, out=cell)
        empty = ((rows < 1) | (columns < 1)).reshape(-1, 1)
        output[region] = best.masked_fill_(empty, 0).view(-1, bins, channels)
        if cell is not None and cells is not None:
            cells[region] = cell.masked_fill_(empty, -1).view(-1, bins, channels)
    return as_map(output.view(-1, channels), (len(rois), channels, *size), input.dtype, channels_last(input)), cells


def _backward_cpu(grad: Tensor, cells: Tensor, shape: Sequence[int], dtype: torch.dtype, last: bool) -> Tensor:
    channels = shape[1]
    rows = as_table(grad)
    table = rows.new_zeros((shape[0] * shape[2] * shape[3] + 1) * channels)
    channel = torch.arange(channels, device=grad.device)
    for values, cell in zip(rows.split(4096), cells.view(-1, channels).split(4096), strict=True):
        # The cell -1 of a bin that passes nothing on is a spare row in front of the map.
        index = (cell.long() + 1).mul_(channels).add_(channel)
        table.scatter_add_(0, index.view(-1), values.reshape(-1))
    return as_map(table[channels:].view(-1, channels), shape, dtype, last)


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


def _slices(tall: Tensor, wide: Tensor, values: int) -> Iterator[Tensor]:
    """Indices of regions with bins of about the same height and width, few enough for their output to stay cached."""
    tallest, widest = tall.amax(dim=1), wide.amax(dim=1)
    order = torch.argsort(tallest * 65536 + widest)
    if len(order):
        yield from order.split(max(1, SLICE // max(1, values)))
