"""RoI pooling: the largest map value in each bin of a region.

The CPU body lists the cells of every bin, as a sparse matrix of ones does its columns; torch multiplies such a matrix
by the channels-last map with maxima in the place of sums. The cell that gives a maximum, to which the gradient goes,
is found in the same way from numbers that hold the value and the cell. The CUDA bodies keep that cell too; backward a
block for each tile of the map adds what the bins send there. They read channels-last, to which a kernel turns
contiguous maps and gradients.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.kernels import _launch
from rcnn.kernels.regions import (
    TURNED,
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
#: Cells of bins, whatever their channels, that are listed at once.
READ = 1 << 18
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
        output_size: bins in y and x, at most 1,024 each, or one number for both.
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
    """Maxima ``(R, C, oh, ow)`` and, if a gradient is needed, the place of each.

    A place is a number of the map as a table ``(B * H * W, C)``. Of a channels-last map they are ``(R * oh * ow, C)``
    and count the values; else ``(C, R * oh * ow)`` and count the rows. One past the last stands for none.
    """
    batch, channels, height, width = input.shape
    if not bool(((rois[:, 0] >= 0) & (rois[:, 0] < batch)).all()):
        raise ValueError(f"boxes must name images 0..{batch - 1}, got {rois[:, 0].min()}..{rois[:, 0].max()}")
    if not channels:
        return input.new_empty(len(rois), 0, *size), input.new_empty(0) if needs_grad else None
    rois = rois.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    finite = torch.isfinite(rois).all(dim=1)[:, None]
    top, tall = _axis(rois[:, 2], rois[:, 4], finite, spatial_scale, height, size[0])
    left, wide = _axis(rois[:, 1], rois[:, 3], finite, spatial_scale, width, size[1])
    start = (rois[:, 0].long() * (height * width))[:, None, None] + (top * width)[:, :, None] + left[:, None, :]

    table = as_table(input)
    last = channels_last(input)
    lowest = torch.finfo(input.dtype).min
    # Then every maximum is a number, and every bin with a cell has one that gives it.
    plain = table.numel() == 0 or bool(table.amin() > lowest)
    if not plain:
        table = table.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    bins = size[0] * size[1]
    # A channels-last output is these rows; a contiguous one is filled from a few of them at a time.
    output = table.new_empty((len(rois) * bins, channels) if last else (len(rois), channels, bins))
    cells = keys = None
    if needs_grad:
        keys = _Keys(table, channels if last else 1)
        if last:
            cells = torch.empty((len(rois) * bins, channels), dtype=keys.dtype)
        else:
            # Scattering wants int64; to turn int32 into it would take half as long as to add.
            cells = torch.empty((channels, len(rois) * bins), dtype=torch.int64)
    for part in _parts((tall.sum(dim=1) * wide.sum(dim=1)).tolist(), bins * channels):
        here = slice(part.start * bins, part.stop * bins)
        offsets, rows = _rows(start[part], tall[part], wide[part], width)
        value = _maxima(offsets, rows, table)
        if keys is not None and cells is not None:
            cell = keys.places(_maxima(offsets, rows, keys.table))
            if not plain:
                cell.masked_fill_(value <= lowest, keys.none)
            (cells[here] if last else cells[:, here].t()).copy_(cell)
        if not plain:
            # An empty bin has a 0.
            value.clamp_(min=lowest)
        if last:
            output[here] = value
        else:
            output[part] = value.view(-1, bins, channels).transpose(1, 2)
    if last:
        return as_map(output, (len(rois), channels, *size), input.dtype, last), cells
    return output.view(len(rois), channels, *size).to(input.dtype), cells


def _rows(start: Tensor, tall: Tensor, wide: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The rows of the table in each bin, bin after bin, and where those of each bin begin, ``(bins + 1,)``.

    A bin has its first cell in row ``start (R, oh, ow)`` and ``tall (R, oh)`` by ``wide (R, ow)`` cells.
    """
    high, across = (x.flatten() for x in torch.broadcast_tensors(tall[:, :, None], wide[:, None, :]))
    # A line of cells is a run of rows; first the lines of the bins, then the cells of the lines.
    lines = torch.where(across > 0, high, 0)
    owner = torch.repeat_interleave(lines)
    begin = (start.flatten() - (lines.cumsum(0) - lines) * width)[owner]
    begin += torch.arange(0, len(owner) * width, width, device=start.device)
    run = across[owner]
    begin -= run.cumsum(0) - run
    rows = begin[torch.repeat_interleave(run)]
    rows += torch.arange(len(rows), device=start.device)
    return F.pad((lines * across).cumsum(0), (1, 0)), rows


def _maxima(offsets: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """Largest value of each column among some rows of a table, ``rows[offsets[i] : offsets[i + 1]]``; 0 among none."""
    _sparse_is_beta()
    ones = table.new_ones(len(rows))
    shape = (len(offsets) - 1, len(table))
    return torch.sparse.mm(torch.sparse_csr_tensor(offsets, rows, ones, shape, check_invariants=False), table, "amax")


@cache
def _sparse_is_beta() -> None:
    """Let torch say so, as it does once, where nobody is disturbed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


class _Keys:
    """Float64 numbers above 0 that rise with the values of a table, and of equal ones with those that come first.

    The largest key among some cells so gives the first cell of the largest value.

    Args:
        table: ``(cells, C)`` float without NaN.
        stride: how many places further the next row is; that of the next column is 0 for a stride of 1, else 1.
    """

    def __init__(self, table: Tensor, stride: int) -> None:
        self.none = len(table) * stride
        self.dtype = torch.int32 if self.none < 2**31 else torch.int64
        self.table = torch.empty_like(table, dtype=torch.float64)
        self.order: Tensor | None = None
        columns = (
            torch.arange(table.shape[1], device=table.device) if stride > 1 else torch.zeros((), dtype=torch.int64)
        )
        if table.dtype == torch.float64 or self.dtype == torch.int64:
            # No room for value and place: the rank of the value, of equal ones the first in the table last.
            order = table.flatten().flip(0).sort(stable=True).indices.neg_().add_(table.numel() - 1)
            self.table.view(-1)[order] = torch.arange(1.0, len(order) + 1, dtype=torch.float64, device=table.device)
            place = (torch.arange(len(table), device=table.device)[:, None] * stride + columns).expand_as(table)
            self.order = F.pad(place.flatten()[order], (1, 0), value=self.none).to(self.dtype)
            return
        step = max(1, TURNED // max(1, table.shape[1]))
        for first in range(0, len(table), step):
            values = table[first : first + step]
            # Bits that rise with the value; adding 0 makes -0 equal to 0.
            bits = (values + 0.0).view(torch.int32)
            key = torch.bitwise_xor(bits, (bits >> 31) & 0x7FFFFFFF).to(torch.int64)
            # 32 of them, raised to be positive, above 31 of the place from behind. The bits of a positive float64 rise
            # with it too, and these are neither too small nor too large for one that is normal.
            key.add_(0x7F800001).bitwise_left_shift_(31).add_((1 << 52) + self.none)
            rows = torch.arange(first, first + len(values), device=table.device)[:, None] * stride
            self.table[first : first + step] = key.sub_(rows).sub_(columns).view(torch.float64)

    def places(self, keys: Tensor) -> Tensor:
        """The places of some keys, ``none`` for a 0."""
        if self.order is not None:
            return self.order[keys.long()]
        return keys.view(torch.int64).to(torch.int32).bitwise_and_(0x7FFFFFFF).neg_().add_(self.none)


def _backward_cpu(grad: Tensor, cells: Tensor, shape: Sequence[int], dtype: torch.dtype, last: bool) -> Tensor:
    batch, channels, height, width = shape
    if not channels:
        return grad.new_empty(tuple(shape))
    dtype_of_sums = torch.float64 if dtype == torch.float64 else torch.float32
    if last:
        sums = torch.zeros(math.prod(shape) + 1, dtype=dtype_of_sums, device=grad.device)
        step = max(1, POOLED // max(1, channels))
        for part, cell in zip(as_table(grad).split(step), cells.split(step), strict=True):
            sums.index_add_(0, cell.view(-1), part.view(-1))
        return as_map(sums[:-1].view(-1, channels), shape, dtype, last)
    # Channels apart, each of which has its own sums: several threads can add.
    sums = torch.zeros((channels, batch * height * width + 1), dtype=dtype_of_sums, device=grad.device)
    step = max(1, POOLED // max(1, cells.shape[1]))
    for first in range(0, channels, step):
        part = slice(first, first + step)
        cell = cells[part]
        sums[part].scatter_add_(1, cell, grad[:, part].transpose(0, 1).to(dtype_of_sums).reshape(cell.shape))
    return sums[:, :-1].unflatten(1, (batch, height, width)).transpose(0, 1).to(dtype).contiguous()


def _parts(cells: Sequence[int], values: int) -> Iterator[slice]:
    """Regions that are worked on at once, of so many cells each and so many output values."""
    first = total = 0
    for last, count in enumerate(cells):
        if last > first and (total + count > READ or (last + 1 - first) * values > POOLED):
            yield slice(first, last)
            first, total = last, 0
        total += count
    if first < len(cells):
        yield slice(first, len(cells))


def _axis(low: Tensor, high: Tensor, finite: Tensor, scale: float, size: int, bins: int) -> tuple[Tensor, Tensor]:
    """First cell and number of cells on the map, both ``(R, bins)`` int64, of each bin along one axis."""
    first, last = _round(low * scale)[:, None], _round(high * scale)[:, None]
    step = (last - first + 1).clamp(min=1) / bins
    finite = finite & torch.isfinite(first) & torch.isfinite(step)  # nor may scaling overflow
    number = torch.arange(bins, dtype=low.dtype, device=low.device)
    start = (torch.floor(number * step) + first).clamp(0, size)
    end = (torch.ceil((number + 1) * step) + first).clamp(0, size)
    return torch.where(finite, start, 0).long(), torch.where(finite, end - start, 0).clamp(min=0).long()


def _round(x: Tensor) -> Tensor:
    """Nearest whole number, halves away from zero as in C."""
    whole = torch.trunc(x)
    return whole + torch.sign(x) * ((x - whole).abs() >= 0.5).to(x.dtype)


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
