"""The CPU body of RoI Align: lists of weighted cells, whose rows ``embedding_bag`` gathers and sums.

The weight of a cell is a product of one in y and one in x, so that each axis is listed by itself, then multiplied out.
Where all bins take the same few samples and none lies outside, the lists are rectangular; else a bin lists the cells of
all its samples once. Two samples per axis, whose cells mostly differ, are listed six times as fast that way.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rcnn import boxes as geometry
from rcnn.kernels.regions import as_map, as_table, channels_last

#: Weighted cells listed at once, 12 bytes each and as much again while they are made.
LISTED = 1 << 22
#: Output values made at once before they are put in their place: 8 MB of float32, which caches hold.
SUMMED = 1 << 21
#: Added to the level before it is rounded down, as torchvision does, so that 224 pixels fall on the upper level.
LEVEL_EPS = 1e-6
#: Most samples of a bin and axis that are taken where their number adapts.
MOST = 1 << 30
#: A region with more samples than that per bin reaches far beyond its map: only those inside are listed.
FAR = 1024
#: Most samples of a bin and axis that are listed as they come. The more, the more of them share their cells.
FEW = 2


class Placement(NamedTuple):
    """Where the samples of a region lie: the arguments that both passes share."""

    scales: tuple[float, ...]
    size: tuple[int, int]
    sampling_ratio: int
    aligned: bool
    canonical_scale: float = 224
    canonical_level: float = 4

    def range(self) -> tuple[float, float]:
        """Finest and coarsest level."""
        return -math.log2(self.scales[0]), -math.log2(self.scales[-1])


class _Axis(NamedTuple):
    """Cells that the bins of each region read along one axis, bin after bin."""

    cell: Tensor  # (T,) int32, or (R, bins, K) where every bin reads K
    weight: Tensor  # float, as many
    length: Tensor  # (R, bins) int32, cells of a bin; empty where every bin reads K
    start: Tensor  # (R, bins) int32, the first of them; likewise


def forward_cpu(features: Sequence[Tensor], rois: Tensor, place: Placement) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output of the op and what :func:`backward_cpu` needs of the regions."""
    batch, channels = features[0].shape[:2]
    if not bool(((rois[:, 0] >= 0) & (rois[:, 0] < batch)).all()):
        raise ValueError(f"boxes must name images 0..{batch - 1}, got {rois[:, 0].min()}..{rois[:, 0].max()}")
    rois = rois.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)
    shapes = [x.shape for x in features]
    joined = _joined(shapes, len(rois) * place.size[0] * place.size[1])
    level = _levels(rois, place) if len(features) > 1 else torch.zeros_like(rois[:, 0], dtype=torch.int64)
    if joined:
        order, counts = torch.arange(len(rois), device=rois.device), torch.tensor([len(rois)])
    else:
        level, order = torch.sort(level, stable=True)
        rois, counts = rois[order], torch.bincount(level, minlength=len(features))
    before = [0, *itertools.accumulate(map(_cells, shapes[:-1]))] if joined else [0] * len(shapes)
    maps = torch.tensor([(*shape[2:], first) for shape, first in zip(shapes, before, strict=True)], dtype=torch.int32)
    height, width, first_cell = maps.to(rois.device).t().index_select(1, level)
    scale = torch.tensor(place.scales, dtype=rois.dtype, device=rois.device).index_select(0, level)
    y, x = _axes(rois, scale, torch.stack((height, width)), place)
    stride = torch.stack((first_cell + rois[:, 0].int() * height * width, width), dim=1)
    saved = (order, counts, stride, *y, *x)

    values = place.size[0] * place.size[1] * channels
    # Of one table they stand in order, and what is summed is the output.
    most = len(rois) if max(counts.tolist()) == len(rois) else max(1, SUMMED // max(1, values))
    parts = list(_parts(counts, y, x, most))
    rows = rois.new_empty((0 if len(parts) == 1 else len(rois), values))
    table, of_number = rows, -1
    for number, first, last in parts:
        if number != of_number:
            tables = [as_table(each) for each in (features if joined else features[number : number + 1])]
            table, of_number = tables[0] if len(tables) == 1 else torch.cat(tables), number
        cell, weight, offset = _expand(y, x, stride, first, last)
        part = _gather(table, cell, weight, offset).view(last - first, values)
        rows = part if len(parts) == 1 else rows.index_copy_(0, order[first:last], part)
    output = as_map(rows, (len(rois), channels, *place.size), features[0].dtype, channels_last(features[0]))
    return output, saved


def backward_cpu(
    grad: Tensor,
    saved: tuple[Tensor, ...],
    place: Placement,
    shapes: Sequence[torch.Size],
    layouts: Sequence[bool],
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of those maps that need one."""
    order, counts, stride = saved[:3]
    y, x = _Axis(*saved[3:7]), _Axis(*saved[7:11])
    bins = place.size[0] * place.size[1]
    rows = as_table(grad)
    sizes = [_cells(shape) for shape in shapes]
    joined = _joined(shapes, len(order) * bins)
    tables: list[Tensor | None] = [None] * len(shapes)
    for number, first, last in _parts(counts, y, x, len(order)):
        if not (joined or needed[number]):
            continue
        cell, weight, offset = _expand(y, x, stride, first, last)
        row = (order[first:last, None] * bins + torch.arange(bins, device=grad.device)).flatten().int()
        row = row.repeat_interleave(offset.diff(append=offset.new_tensor([len(cell)])))
        by_cell = torch.sort(cell, stable=True).indices
        length = torch.bincount(cell, minlength=sum(sizes) if joined else sizes[number])
        start = (torch.cumsum(length, dim=0) - length).int()
        part = _gather(rows, row.index_select(0, by_cell), weight.index_select(0, by_cell), start)
        previous = tables[number]
        tables[number] = part if previous is None else previous.add_(part)
    if joined and tables[0] is not None:
        tables = list(tables[0].split(sizes))
    grads: list[Tensor | None] = []
    for table, shape, last_layout, need in zip(tables, shapes, layouts, needed, strict=True):
        if need and table is None:
            table = rows.new_zeros((_cells(shape), shape[1]))
        grads.append(None if table is None or not need else as_map(table, shape, dtype, last_layout))
    return grads


def _cells(shape: torch.Size) -> int:
    return shape[0] * shape[2] * shape[3]


def _joined(shapes: Sequence[torch.Size], bins: int) -> bool:
    """Whether all maps are read as one table: where they are smaller than the output, a copy of the maps is less work
    than to sum the regions level by level and to put the sums in their places."""
    return len(shapes) == 1 or sum(map(_cells, shapes)) <= bins


def _levels(rois: Tensor, place: Placement) -> Tensor:
    """Place of each region's level among the features ``(R,)`` int64."""
    finest, coarsest = place.range()
    side = torch.sqrt(geometry.area(rois[:, 1:].float()))
    level = torch.floor(place.canonical_level + torch.log2(side / place.canonical_scale) + LEVEL_EPS)
    return (level.nan_to_num(nan=finest).clamp(finest, coarsest) - finest).long()


def _gather(table: Tensor, index: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Sums of weighted rows of a table: bag b adds the rows ``index[offset[b]:offset[b + 1]]``."""
    if not table.shape[1]:  # embedding_bag with several threads fails on rows without columns
        return table.new_empty(len(offset), 0)
    return F.embedding_bag(index, table, offset, mode="sum", per_sample_weights=weight)


def _parts(counts: Tensor, y: _Axis, x: _Axis, most: int) -> Iterator[tuple[int, int, int]]:
    """Level, first and last region of slices of ``most`` regions whose list of weighted cells stays near ``LISTED``."""
    if y.cell.dim() == 3:
        most, cells = min(most, max(1, LISTED // (y.cell.shape[1:].numel() * x.cell.shape[1:].numel()))), None
    else:
        cells = torch.cumsum(y.length.sum(dim=1) * x.length.sum(dim=1), dim=0)
    first = 0
    for level, count in enumerate(counts.tolist()):
        end = first + count
        while first < end:
            last = end
            if cells is not None:
                limit = LISTED + (int(cells[first - 1]) if first else 0)
                if int(cells[end - 1]) > limit:
                    last = max(int(torch.searchsorted(cells[:end], limit)), first + 1)
            last = min(last, first + most)
            yield level, first, last
            first = last


def _axes(rois: Tensor, scale: Tensor, shape: Tensor, place: Placement) -> tuple[_Axis, _Axis]:
    """Cells and weights in y and x of ``(R, 5)`` regions, on maps of scale ``(R,)`` and shape ``(2, R)``."""
    ratio, offset = place.sampling_ratio, 0.5 if place.aligned else 0.0
    # (2, R) each, y before x.
    low, high = rois.t().contiguous()[1:].view(2, 2, -1).flip(1) * scale - offset
    extent = high - low
    finite = torch.isfinite(extent)  # then both ends are
    start, extent = torch.where(finite, low, -math.inf), torch.where(finite, extent, 0)
    if not place.aligned:
        extent = extent.clamp(min=1)
    step = extent / extent.new_tensor(place.size)[:, None]
    if 0 < ratio <= FEW:
        return _few(start, step, shape, place)
    grid = torch.where(finite, ratio if ratio > 0 else torch.ceil(step).clamp(0, MOST).long(), 0)
    y, x = (_merged(*each) for each in zip(start, step, grid, shape, place.size, strict=True))
    return y, x


def _few(start: Tensor, step: Tensor, shape: Tensor, place: Placement) -> tuple[_Axis, _Axis]:
    """Both cells of each sample, in rectangles unless a sample lies outside; everything given is ``(2, R)``."""
    ratio, most = place.sampling_ratio, max(place.size)
    bin = start.new_tensor([n // ratio for n in range(most * ratio)])
    share = start.new_tensor([n % ratio + 0.5 for n in range(most * ratio)])
    start, step, limit = (x[..., None] for x in (start, step, shape))
    position = _sample(start, step, ratio, bin, share)
    before, after, fraction = _between(position, limit)
    # (2, R, bins, 2 * ratio)
    fraction /= ratio
    cell, weight = (
        torch.stack(pair, dim=3).view(2, -1, most, 2 * ratio)
        for pair in ((before, after), (1 / ratio - fraction, fraction))
    )
    axes = [(cell[i, :, :bins], weight[i, :, :bins]) for i, bins in enumerate(place.size)]
    # Each rounding keeps the order, so that all samples lie between the first and the last.
    if _counts(torch.stack((position[..., 0], position[..., -1])), shape).all():
        y, x = (_Axis(*axis, cell[:0], cell[:0]) for axis in axes)
    else:
        inside = _counts(position, limit).repeat_interleave(2, dim=2).view_as(cell)
        y, x = (_inner(*axis, inside[i, :, :bins]) for i, (axis, bins) in enumerate(zip(axes, place.size, strict=True)))
    return y, x


def _inner(cell: Tensor, weight: Tensor, inside: Tensor) -> _Axis:
    length = inside.sum(dim=2).int()
    start = (length.flatten().cumsum(0) - length.flatten()).view(length.shape)
    return _Axis(cell[inside], weight[inside], length, start.int())


def _merged(start: Tensor, step: Tensor, grid: Tensor, size: Tensor, bins: int) -> _Axis:
    """Each cell once per bin, of samples inside only."""
    # One row per sample, bin after bin, along the axis.
    per_bin = grid.repeat_interleave(bins)
    first = torch.zeros_like(per_bin)
    if len(grid) and int(grid.max()) > FAR:
        first, per_bin = _inside(start, step, grid, size, bins)
    bag = torch.repeat_interleave(per_bin)
    number = torch.arange(len(bag), device=bag.device) - (torch.cumsum(per_bin, dim=0) - per_bin - first)[bag]
    region = torch.div(bag, bins, rounding_mode="floor")
    parts, limit = grid[region], size[region]
    position = _position(start[region], step[region], parts, bag - region * bins, number)
    inside = _counts(position, limit)
    if not bool(inside.all()):
        bag, position, parts, limit = bag[inside], position[inside], parts[inside], limit[inside]
    before, after, fraction = _between(position, limit)
    weights = torch.stack((1 - fraction, fraction), dim=1) / parts[:, None]

    # Cells rise along a bin, so one that a bin has already is the last one listed or the one before that.
    listed = torch.full_like(after, -1)
    listed[1:] = torch.where(bag[1:] == bag[:-1], after[:-1], -1)
    new = torch.stack((before > listed, after > torch.maximum(before, listed)), dim=1)
    rank = torch.cumsum(new.flatten(), dim=0).view(-1, 2) - 1
    rank[:, 0] -= (listed - before).clamp_(min=0)
    cell = torch.stack((before, after), dim=1)[new]
    weight = weights.new_zeros(len(cell)).index_add_(0, rank.flatten(), weights.flatten())
    count = torch.bincount(bag[:, None].expand(-1, 2)[new], minlength=len(start) * bins)
    start_of = torch.cumsum(count, dim=0) - count
    return _Axis(cell.int(), weight, count.view(-1, bins).int(), start_of.view(-1, bins).int())


def _position(start: Tensor, step: Tensor, parts: Tensor, bin: Tensor, number: Tensor) -> Tensor:
    """Where samples of bins lie, by rising position: a reversed region runs backwards, so it is turned."""
    number = torch.where(step < 0, parts - 1 - number, number)
    return _sample(start, step, parts, bin, number + 0.5)


def _sample(start: Tensor, step: Tensor, parts: Tensor | int, bin: Tensor, share: Tensor) -> Tensor:
    """Position of a sample, ``share`` of ``parts`` into its bin: torchvision's operations in their order."""
    return start + bin * step + share * step / parts


def _counts(position: Tensor, limit: Tensor) -> Tensor:
    return (position >= -1) & (position <= limit)


def _between(position: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cells before and after samples, int32, and how far a sample lies from the first to the second."""
    last = limit - 1
    position = torch.minimum(position.clamp(min=0), last)
    before = position.int()
    return before, torch.minimum(before + 1, last), position - before


def _inside(start: Tensor, step: Tensor, grid: Tensor, size: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """First sample of each bin in ``-1..size`` and how many there are, ``(R * bins,)``, by bisection.

    For regions far larger than the map: a list of all their samples would not fit in memory.
    """
    bin = torch.arange(bins, device=grid.device).repeat(len(grid))
    start, step, grid, size = (x.repeat_interleave(bins) for x in (start, step, grid, size))
    ends = []
    for below in (lambda x: x < -1, lambda x: x <= size):
        low, high = torch.zeros_like(grid), grid
        while not torch.equal(low, high):
            middle = torch.div(low + high, 2, rounding_mode="floor")
            right = (low < high) & below(_position(start, step, grid, bin, middle))
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        ends.append(low)
    return ends[0], (ends[1] - ends[0]).clamp(min=0)


def _expand(y: _Axis, x: _Axis, stride: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """All weighted cells of the regions ``first:last``: the product of both axes, bin after bin.

    Returns:
        Row of the table ``(T,)`` int32, weight ``(T,)``, start of each bin in these ``(bins,)`` int32.
    """
    if y.cell.dim() == 3:
        base, width = stride[first:last, :, None, None].unbind(1)
        many = y.cell.shape[2], x.cell.shape[2]
        cell_y, weight_y = (
            each.repeat_interleave(many[1], dim=2)[:, :, None]
            for each in (y.cell[first:last] * width + base, y.weight[first:last])
        )
        cell_x, weight_x = (each[first:last].repeat(1, 1, many[0])[:, None] for each in (x.cell, x.weight))
        cell, weight = (cell_y + cell_x).flatten(), (weight_y * weight_x).flatten()
        return cell, weight, torch.arange(0, len(cell), many[0] * many[1], device=cell.device, dtype=torch.int32)

    rows, columns = y.length[first:last, :, None], x.length[first:last, None, :]
    offset = torch.cumsum((rows * columns).flatten(), dim=0) - (rows * columns).flatten()
    shape = (last - first, rows.shape[1], columns.shape[2])
    rows, columns = rows.expand(shape).flatten(), columns.expand(shape).flatten()

    # One row per bin and cell in y.
    bag = torch.repeat_interleave(rows)
    line = torch.arange(len(bag), device=bag.device, dtype=torch.int32)
    row_start = (torch.cumsum(rows, dim=0) - rows).int()
    in_y = line + (y.start[first:last, :, None].expand(shape).flatten() - row_start)[bag]
    region = torch.div(bag, shape[1] * shape[2], rounding_mode="floor")
    base, width = stride[first:last][region].unbind(1)
    base = base + y.cell.index_select(0, in_y) * width
    length = columns[bag]
    shift = x.start[first:last, None, :].expand(shape).flatten()[bag] - (torch.cumsum(length, dim=0) - length).int()

    # One row per bin and cell.
    row = torch.repeat_interleave(length)
    in_x = torch.arange(len(row), device=row.device, dtype=torch.int32) + shift.index_select(0, row)
    cell = base.index_select(0, row) + x.cell.index_select(0, in_x)
    weight = y.weight.index_select(0, in_y).index_select(0, row) * x.weight.index_select(0, in_x)
    return cell, weight, offset.int()
