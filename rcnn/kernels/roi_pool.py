"""RoI pooling: the largest map value in each bin of a region.

The CPU body visits the cells of a bin one after the other, for many regions of about the same size at once, and
remembers which cell gave each maximum. The gradient goes to that cell.
"""

import math
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
    if bool(table.sum().isnan()):
        table = table.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    bins = size[0] * size[1]
    last = channels_last(input)
    output = input.new_empty((len(rois), bins, channels) if last else (len(rois), channels, bins))
    cells = torch.empty((len(rois), bins, channels), dtype=torch.int32, device=table.device) if needs_grad else None
    lowest = torch.finfo(input.dtype).min
    for region in _slices(tall, wide, bins * channels):
        rows, columns = tall[region][:, :, None], wide[region][:, None, :]
        start = (image[region][:, None] + top[region] * width)[:, :, None] + left[region][:, None, :]
        most_rows, most_columns = int(rows.max()), int(columns.max())
        # Row and column of each visit; a bin with fewer of them sees its last one again, which wins nothing.
        down = torch.arange(most_rows, device=table.device)[:, None, None, None].minimum(rows - 1) * width + start
        right = torch.arange(most_columns, device=table.device)[:, None, None, None].minimum(columns - 1)
        down, right = down.flatten(1), right.expand(-1, -1, size[0], -1).flatten(1)
        empty = ((rows < 1) | (columns < 1)).flatten()[:, None]
        if bool(empty.any()):
            down = down.masked_fill_(empty.T, 0)
            right = right.masked_fill(empty.T, 0)
        best = table.new_full((len(region) * bins, channels), lowest)
        visit = torch.zeros_like(best) if needs_grad else None
        value, other = torch.empty_like(best), torch.empty_like(best)
        for i in range(most_rows):
            for j in range(most_columns):
                torch.index_select(table, 0, down[i] + right[j], out=value)
                if visit is None:
                    torch.maximum(best, value, out=best)
                    continue
                # The last visit that raised the maximum, as its cell counted from 1 and from the bin's first, in
                # the dtype of the values: comparing in place gives 0 or 1, several times faster than with bool.
                torch.maximum(best, value, out=other)
                torch.maximum(visit, value.gt_(best).mul_(i * width + j + 1), out=visit)
                best, other = other, best
        best = best.masked_fill_(empty, 0).view(-1, bins, channels).to(input.dtype)
        output.index_copy_(0, region, best if last else best.transpose(1, 2))
        if visit is not None and cells is not None:
            cell = visit.masked_fill_(empty, 0).int()
            # start + cell - 1 where there was a visit, -1 elsewhere.
            found = cell.clamp(max=1).mul_(start.view(-1, 1).int()).add_(cell).sub_(1)
            cells.index_copy_(0, region, found.view(-1, bins, channels))
    output = output.view(len(rois), *size, channels).permute(0, 3, 1, 2) if last else output
    return output.view(len(rois), channels, *size), cells


def _backward_cpu(grad: Tensor, cells: Tensor, shape: Sequence[int], dtype: torch.dtype, last: bool) -> Tensor:
    channels = shape[1]
    dtype_of_sums = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.zeros((shape[0] * shape[2] * shape[3] + 1) * channels, dtype=dtype_of_sums, device=grad.device)
    channel = torch.arange(channels, device=grad.device)
    for values, cell in zip(grad.split(64), cells.split(64), strict=True):
        # The cell -1 of a bin that passes nothing on is a spare row in front of the map.
        index = (cell.long() + 1).mul_(channels).add_(channel)
        table.scatter_add_(0, index.view(-1), as_table(values).reshape(-1))
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
