"""RoI pooling: the largest map value in each bin of a region.

The CPU body takes bins of about the same size together: it gathers their cells from the channels-last map and lets
``max_pool2d`` find each maximum and the cell that gave it. The gradient goes to that cell. The CUDA bodies
keep that cell too; backward a block for each tile of the map adds what the bins send there.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.kernels import _launch
from rcnn.kernels.regions import (
    as_map,
    as_rois,
    as_table,
    channels_last,
    check_pool,
    memory_format,
    packs,
    sorted_regions,
    tiles,
)

#: Output values made at once: few, so that their memory is used again and again, and enough for many bins of a size.
POOLED = 1 << 20
#: Map values gathered at once: 4 MB of float32, about what the caches near the cores hold.
GATHERED = 1 << 20
#: Map values that may be gathered twice to save a round of calls, which takes about as long.
SPARE = 1 << 18
#: Blocks of the forward pass on a GPU, if there are regions and channels enough: several for each that run at once, so
#: that those of large regions keep few others waiting.
BLOCKS = 4096
#: Bytes of a line of a GPU's cache: a block reads no fewer of a cell.
LINE = 128

SOURCE = _launch.CudaSource(
    "roi_pool",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    THREADS=256,
    SORT=1024,
    STAGE=4096,  # output values that a forward block collects
    TILE=8,  # cells on each side of the tile that a backward block owns
    LANES=16,  # channels that it owns: 32 bytes of 16-bit values, the least that memory gives
    GROUPS=8,  # times so many threads, which share its bins
    BINS=192,  # bins that it lists at once
    UNROLL=8,  # bins that a thread loads at once
)


def roi_pool(
    input: Tensor, boxes: Tensor | Sequence[Tensor], output_size: int | Sequence[int], spatial_scale: float = 1.0
) -> Tensor:
    """Largest value of a map in each bin of each region.

    The corners of a region are scaled and rounded (halves away from zero) to whole cells, both of which belong to
    it, so it is at least one cell wide and high. Bin i of n holds the cells from ``floor(i * step)`` to
    ``ceil((i + 1) * step) - 1`` of the region that lie on the map, where ``step = extent / n`` and the products are
    rounded to float32 (float64 for a float64 map), as torchvision's are: the last of 7 bins of 57 cells takes a cell
    past the region. A bin without a cell gives 0 and passes no gradient on. At equal values the first cell in
    row-major order takes the gradient. NaN values are passed over; a bin of nothing else gives the lowest finite
    number and passes no gradient on. So does a region with a NaN or infinite coordinate give zeros, and on a GPU,
    where a check would have to wait, one that names no image; on the CPU that is an error.

    Args:
        input: ``(B, C, H, W)`` float, map; channels-last is the fast layout and the output's layout follows it.
        boxes: ``(R, 5)`` float, image index, x1, y1, x2, y2 in image pixels; or B tensors ``(n, 4)``.
        output_size: bins in y and x, or one number for both.
        spatial_scale: map cells per image pixel.

    Returns:
        ``(R, C, oh, ow)`` of the input's dtype.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: a shape, dtype or image index is wrong, or the boxes require a gradient, which they have none of.

    Source:
        Girshick, Fast R-CNN (2015), section 2.1; ``torchvision.ops.roi_pool``.
    """
    rois = as_rois(boxes)
    size = check_pool([input], rois, output_size, [spatial_scale], "roi_pool")
    needs_grad = input.requires_grad and torch.is_grad_enabled()
    return _RoIPool.apply(input, rois, size, float(spatial_scale), needs_grad)


class _RoIPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, needs_grad: bool
    ) -> Tensor:
        ctx.shape, ctx.dtype, ctx.layout = input.shape, input.dtype, channels_last(input)
        ctx.scale = spatial_scale
        forward = _forward_cuda if _launch.uses_kernels(input) else _forward_cpu
        output, cell = forward(input, rois.detach(), size, spatial_scale, needs_grad)
        ctx.save_for_backward(cell, rois)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cell, rois = ctx.saved_tensors
        if _launch.uses_kernels(grad):
            return _backward_cuda(grad, cell, rois, ctx.shape, ctx.layout, ctx.scale), None, None, None, None
        return _backward_cpu(grad, cell, ctx.shape, ctx.dtype, ctx.layout), None, None, None, None


def _forward_cpu(
    input: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Maxima ``(R, C, oh, ow)`` and, if a gradient is needed, where each lies among the values of the map, integers in
    the order of the output in memory, R rows; one past the last value for none."""
    batch, channels, height, width = input.shape
    if not bool(((rois[:, 0] >= 0) & (rois[:, 0] < batch)).all()):
        raise ValueError(f"boxes must name images 0..{batch - 1}, got {rois[:, 0].min()}..{rois[:, 0].max()}")
    rois = rois.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    finite = torch.isfinite(rois).all(dim=1)[:, None]
    top, tall = _axis(rois[:, 2], rois[:, 4], finite, spatial_scale, height, size[0])
    left, wide = _axis(rois[:, 1], rois[:, 3], finite, spatial_scale, width, size[1])
    image = rois[:, 0].long() * (height * width)
    corner = (top * width)[:, :, None] + left[:, None, :]
    start = image[:, None, None] + corner

    table = as_table(input)
    last = channels_last(input)
    # Where the first cell of each bin lies among the values of the map, and how far the next cell and channel are.
    strides = (channels, 1) if last else (1, height * width)
    origin = start * channels if last else image[:, None, None] * channels + corner
    lowest = torch.finfo(input.dtype).min
    # Then every maximum is a number, and every bin with a cell has one that gives it.
    plain = table.numel() == 0 or bool(table.amin() > lowest)
    if not plain:
        table = table.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    bins = size[0] * size[1]
    # A channels-last output is these rows; a contiguous one is filled from a few of them at a time.
    output = table.new_empty((len(rois) * bins, channels) if last else (len(rois), channels, bins))
    cells = None
    if needs_grad:
        # More than 2 ** 31 values need int64, which takes twice as long.
        dtype = torch.int32 if table.numel() < 2**31 else torch.int64
        cells = torch.empty_like(output, dtype=dtype)
    step = _regions(bins * channels)
    for first in range(0, len(rois), step):
        part = slice(first, min(first + step, len(rois)))
        here = slice(part.start * bins, part.stop * bins)
        value, cell, back = _pool(
            table,
            width,
            start[part],
            tall[part],
            wide[part],
            None if cells is None else (origin[part], *strides, dtype),
        )
        if not plain:
            cell = None if cell is None else cell.masked_fill_(value <= lowest, table.numel())
            value.clamp_(min=lowest)
        for found, whole in ((value, output), (cell, cells)):
            if found is None or whole is None:
                continue
            if last:
                torch.index_select(found, 0, back, out=whole[here])
            else:
                whole[part] = found.index_select(0, back).view(-1, bins, channels).transpose(1, 2)
    if last:
        return as_map(output, (len(rois), channels, *size), input.dtype, last), cells
    return output.view(len(rois), channels, *size).to(input.dtype), cells


def _pool(
    table: Tensor,
    width: int,
    start: Tensor,
    tall: Tensor,
    wide: Tensor,
    places: tuple[Tensor, int, int, torch.dtype] | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Maxima of bins and, with ``places``, where they lie in the map: both ``(bins, C)``, bins by size; and the row of
    each bin.

    A bin has its first cell in row ``start (R, oh, ow)`` of the table and ``tall (R, oh)`` by ``wide (R, ow)`` cells.
    ``places`` has where that cell lies in the map, ``(R, oh, ow)``, the strides of a cell and a channel, and a dtype.
    """
    channels = table.shape[1]
    rows, columns = (x.flatten() for x in torch.broadcast_tensors(tall[:, :, None], wide[:, None, :]))
    key, order = torch.where((rows > 0) & (columns > 0), (rows << 32) + columns, 0).sort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    start, rows, columns = start.flatten()[order], rows[order][:, None] - 1, columns[order][:, None] - 1
    output = table.new_empty((len(order), channels))
    cells = None
    if places is not None:
        origin, cell_stride, channel_stride, dtype = places
        origin = origin.flatten()[order].to(dtype)
        cells = torch.empty_like(output, dtype=dtype)
        channel = torch.arange(0, channels * channel_stride, channel_stride, device=table.device, dtype=dtype)
    for high, across, part in _groups(key, channels):
        if high == 0:
            output[part] = 0
            if cells is not None:
                cells[part] = table.numel()
            continue
        # Row and column of each cell of the window; a smaller bin sees its last ones again, which wins nothing.
        row, column = torch.arange(high, device=table.device), torch.arange(across, device=table.device)
        read = (start[part, None] + row.minimum(rows[part]) * width)[:, :, None]
        read = (read + column.minimum(columns[part])[:, None]).flatten()
        read = table.index_select(0, read).view(-1, high, across, channels).permute(0, 3, 1, 2)
        value, place = F.max_pool2d(read, (high, across), return_indices=True)
        output[part] = value.view(-1, channels)
        if cells is not None:
            place = place.view(-1, channels).to(dtype)
            # The row, place // across. In small windows a product gives it too, is below 2 ** 31 and far faster.
            if high * across**2 < 1 << 15:
                line = (place * ((1 << 16) // across + 1)).bitwise_right_shift_(16)
            else:
                line = place.div(across, rounding_mode="floor")
            found = place.add_(line, alpha=width - across).mul_(cell_stride).add_(origin[part, None])
            torch.add(found, channel, out=cells[part])
    return output, cells, back


def _backward_cpu(grad: Tensor, cells: Tensor, shape: Sequence[int], dtype: torch.dtype, last: bool) -> Tensor:
    dtype_of_sums = torch.float64 if dtype == torch.float64 else torch.float32
    table = torch.zeros(math.prod(shape) + 1, dtype=dtype_of_sums, device=grad.device)
    # The cells stand in the order of the output's values in memory.
    values = math.prod(grad.shape[1:])
    step = _regions(values)
    for part, cell in zip(grad.split(step), cells.view(grad.shape[0], values).split(step), strict=True):
        row = as_table(part) if last else part.to(dtype_of_sums).contiguous()
        table.index_add_(0, cell.reshape(-1), row.view(-1))
    return as_map(table[:-1].view(-1, shape[1]), shape, dtype, last) if last else table[:-1].view(shape).to(dtype)


def _regions(values: int) -> int:
    """Regions of so many output values that are worked on at once."""
    return max(1, POOLED // max(1, values))


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


def _groups(key: Tensor, channels: int) -> Iterator[tuple[int, int, slice]]:
    """Windows and the bins that fit them, few enough for what they read to stay in the cache.

    ``key (n,)`` int64, rising, holds the rows of a bin in its upper half and its columns in the lower.
    """
    sizes, counts = key.unique_consecutive(return_counts=True)
    high = across = cells = first = last = 0
    for size, count in zip([*sizes.tolist(), 0], [*counts.tolist(), 0], strict=True):
        rows, columns = size >> 32, size & 0xFFFFFFFF
        fits = max(high, rows), max(across, columns), cells + rows * columns * count
        # Bins without cells come first and stay apart.
        if not count or high == 0 or (fits[0] * fits[1] * (last + count - first) - fits[2]) * channels > SPARE:
            step = max(1, GATHERED // max(1, high * across * channels))
            for begin in range(first, last, step):
                yield high, across, slice(begin, min(begin + step, last))
            first, fits = last, (rows, columns, rows * columns * count)
        high, across, cells = fits
        last += count


def _forward_cuda(
    input: Tensor, rois: Tensor, size: tuple[int, int], spatial_scale: float, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Maxima ``(R, C, oh, ow)`` and, if a gradient is needed, their cells, channels-last; a cell is y * W + x, -1 for
    none."""
    batch, channels, height, width = input.shape
    last = channels_last(input)
    input = _channels_last(input)
    shape, bins = (len(rois), channels, *size), size[0] * size[1]
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format(last))
    cells = None
    if needs_grad:
        cells = torch.empty(shape, dtype=torch.int32, device=input.device, memory_format=torch.channels_last)
    vector = packs(channels, input, output)
    pack = 16 // input.element_size() if vector else 1
    # Channels of a block, in packs.
    blocks = -(-BLOCKS // max(len(rois), 1))
    each = max(-(-channels // (pack * blocks)), LINE // (pack * input.element_size()))
    room = SOURCE.constants["STAGE"] // (bins * pack)
    staged = not last and room > 0
    each = pack * (min(each, room) if staged else each)
    numbers = (batch, channels, height, width, *size, each, last, staged, vector)
    _launch.launch(
        SOURCE,
        "roi_pool_forward",
        (len(rois), -(-channels // each)),
        SOURCE.constants["THREADS"],
        [
            *(input, rois.float().contiguous(), output, cells, np.float32(spatial_scale)),
            *(np.int32(x) for x in numbers),
        ],
        dtype=input.dtype,
    )
    return output, cells


def _backward_cuda(
    grad: Tensor, cells: Tensor, rois: Tensor, shape: Sequence[int], last: bool, spatial_scale: float
) -> Tensor:
    batch, channels, height, width = shape
    grad, rois = _channels_last(grad), rois.float().contiguous()
    output = torch.empty(tuple(shape), dtype=grad.dtype, device=grad.device, memory_format=memory_format(last))
    order, touched, offsets = sorted_regions(rois, batch)
    scale, size = np.float32(spatial_scale), (np.int32(grad.shape[2]), np.int32(grad.shape[3]))
    _launch.launch(
        SOURCE,
        "roi_pool_sort",
        batch,
        SOURCE.constants["SORT"],
        [
            *(rois, np.int32(len(rois)), order, touched, offsets, scale),
            *(np.int32(batch), np.int32(height), np.int32(width), *size),
        ],
        dtype=grad.dtype,
    )
    _launch.launch(
        SOURCE,
        "roi_pool_backward",
        (tiles(shape, SOURCE.constants["TILE"]), -(-channels // SOURCE.constants["LANES"])),
        SOURCE.constants["LANES"] * SOURCE.constants["GROUPS"],
        [
            *(output, rois, grad, cells, order, touched, offsets, scale),
            *(np.int32(batch), np.int32(channels), np.int32(height), np.int32(width), *size, np.int32(last)),
        ],
        dtype=grad.dtype,
    )
    return output


def _channels_last(x: Tensor) -> Tensor:
    """A map laid out channels-last: itself, or a copy."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    x = x.contiguous()
    output = torch.empty_like(x, memory_format=torch.channels_last)
    planes, rows, columns = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    _launch.launch(
        SOURCE,
        "roi_pool_turn",
        planes * -(-rows // 32) * -(-columns // 32),
        SOURCE.constants["THREADS"],
        [x, output, np.int32(rows), np.int32(columns)],
        dtype=x.dtype,
    )
    return output
