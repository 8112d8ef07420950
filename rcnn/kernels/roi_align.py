"""RoI Align: bilinear samples averaged in each bin of a region, from one map or from the level that fits the region.

The output is a sum of map cells with weights that depend on the regions alone, and the weight of a cell is a product
of a weight in y and one in x. The CPU body lists the cells of each axis once per bin, merges those that several
samples share, and lets ``embedding_bag`` gather and sum the channels-last rows. The gradient is the same sum over the
transposed list, so it needs no atomics and is the same in every run. The CUDA bodies do the same: lists in shared
memory forward, and backward a block for each tile of the maps, which adds what the regions send there.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn import boxes as geometry
from rcnn.kernels import _launch
from rcnn.kernels.checks import check_positive, check_real, check_whole
from rcnn.kernels.regions import (
    BLOCKS,
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

#: Weighted cells listed at once, 12 bytes each and as much again while they are made.
LISTED = 1 << 22
#: Output values made at once before they are put in their place: 8 MB of float32, which caches hold.
SUMMED = 1 << 21
#: Added to the level before it is rounded down, as torchvision does, so that 224 pixels fall on the upper level.
LEVEL_EPS = 1e-6
#: Most samples of a bin and axis that are taken where their number adapts, and that can be asked for.
MOST, MOST_ASKED = 1 << 30, 1024
#: A region with more samples than that per bin reaches far beyond its map: only those inside are listed.
FAR = 1024
#: Levels that the kernels take in one launch.
MAX_LEVELS = 8

SOURCE = _launch.CudaSource(
    "roi_align",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    THREADS=256,
    SORT=1024,
    TAPS=512,  # cells of both axes that a forward block lists; a bin that finds no room is summed without a list
    BINS=128,  # bins of both axes whose cells are listed
    TILE=8,  # cells on each side of the tile that a backward block owns
    LANES=16,  # packs of 16 bytes of channels that it owns
)


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Average bilinear samples of a map in each bin of each region.

    A region is scaled onto the map and cut into ``oh * ow`` equal bins. A bin holds ``n * n`` samples at the centres
    of equal parts, with ``n = sampling_ratio``, or ``ceil(region / bins)`` for each axis where that is not positive.
    A sample in ``-1..size`` on both axes is interpolated between its four cells after a clamp to the map, one outside
    counts as 0. Cell 0 has its centre at coordinate 0 of the map, or at 0.5 with ``aligned``; without ``aligned`` a
    region is at least 1 cell wide and high. A region with a NaN or infinite coordinate gives zeros. So does one that
    names no image on a GPU, where a check would have to wait; on the CPU it is an error.

    Args:
        input: ``(B, C, H, W)`` float, map; channels-last is the fast layout and the output's layout follows it.
        boxes: ``(R, 5)`` float, image index, x1, y1, x2, y2 in image pixels; or B tensors ``(n, 4)``.
        output_size: bins in y and x, at most 1,024 each, or one number for both.
        spatial_scale: map cells per image pixel.
        sampling_ratio: samples per bin and axis, at most 1,024; not positive for an adaptive number.
        aligned: whether pixel centres lie at half coordinates.

    Returns:
        ``(R, C, oh, ow)`` of the input's dtype, summed in float32 (in float64 for a float64 input).

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: a shape, dtype or image index is wrong, or the boxes require a gradient, which they have none of.

    Source:
        He et al., Mask R-CNN (2017), section 3; ``torchvision.ops.roi_align``.
    """
    rois = as_rois(boxes)
    size = check_pool([input], rois, output_size, [spatial_scale], "roi_align")
    _check_ratio(sampling_ratio)
    place = _Placement((float(spatial_scale),), size, int(sampling_ratio), bool(aligned))
    return _RoIAlign.apply(rois, place, input)


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: float = 4,
) -> Tensor:
    """:func:`roi_align` of each region on the pyramid level that fits its size.

    The level is ``floor(canonical_level + log2(sqrt(area) / canonical_scale) + 1e-6)``, clamped to the levels given,
    where a map of scale ``2 ** -k`` is level k.

    Args:
        features: L maps ``(B, C, H_l, W_l)`` float, finest first, each half the scale of the one before; at most 8 on
            a GPU.
        rois: ``(R, 5)`` float, image index, x1, y1, x2, y2 in image pixels.
        output_size: bins in y and x, at most 1,024 each, or one number for both.
        spatial_scales: map cells per image pixel of each level.
        sampling_ratio: samples per bin and axis, at most 1,024; not positive for an adaptive number.
        aligned: whether pixel centres lie at half coordinates.
        canonical_scale: side in pixels of a region that goes to the canonical level.
        canonical_level: that level.

    Returns:
        ``(R, C, oh, ow)`` of the features' dtype.

    Raises:
        TypeError: an argument is not a tensor, or not a number, where one is needed.
        ValueError: a shape, dtype, scale or image index is wrong, or the regions require a gradient.

    Source:
        Lin et al., Feature Pyramid Networks (2017), equation 1; ``torchvision.ops.MultiScaleRoIAlign``.
    """
    size = check_pool(features, rois, output_size, spatial_scales, "multiscale_roi_align")
    scales = tuple(float(scale) for scale in spatial_scales)
    if any(round(math.log2(scales[0] / scale)) != level for level, scale in enumerate(scales)):
        raise ValueError(f"spatial_scales must halve from level to level, got {list(scales)}")
    _check_ratio(sampling_ratio)
    check_real("canonical_level", canonical_level)
    check_positive("canonical_scale", canonical_scale)
    place = _Placement(scales, size, int(sampling_ratio), bool(aligned), canonical_scale, canonical_level)
    return _RoIAlign.apply(rois, place, *features)


def _check_ratio(sampling_ratio: int) -> None:
    check_whole("sampling_ratio", sampling_ratio, -(1 << 31))
    if sampling_ratio > MOST_ASKED:
        raise ValueError(f"sampling_ratio must be at most {MOST_ASKED}, got {sampling_ratio}")


class _Axis(NamedTuple):
    """Cells that the bins of each region read along one axis, bin after bin."""

    cell: Tensor  # (T,) int32
    weight: Tensor  # (T,) float
    length: Tensor  # (R, bins) int32, cells of a bin
    start: Tensor  # (R, bins) int32, the first of them


class _Placement(NamedTuple):
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


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rois: Tensor, place: _Placement, *features: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in features]
        ctx.layouts = [channels_last(x) for x in features]
        ctx.place, ctx.dtype = place, features[0].dtype
        forward = _forward_cuda if _launch.uses_kernels(features[0]) else _forward_cpu
        output, saved = forward(features, rois.detach(), place)
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = _backward_cuda if _launch.uses_kernels(grad) else _backward_cpu
        needed = ctx.needs_input_grad[2:]
        return None, None, *backward(grad, ctx.saved_tensors, ctx.place, ctx.shapes, ctx.layouts, ctx.dtype, needed)


def _levels(rois: Tensor, place: _Placement) -> Tensor:
    """Place of each region's level among the features ``(R,)`` int64."""
    finest, coarsest = place.range()
    side = torch.sqrt(geometry.area(rois[:, 1:].float()))
    level = torch.floor(place.canonical_level + torch.log2(side / place.canonical_scale) + LEVEL_EPS)
    return (level.nan_to_num(nan=finest).clamp(finest, coarsest) - finest).long()


def _forward_cpu(features: Sequence[Tensor], rois: Tensor, place: _Placement) -> tuple[Tensor, tuple[Tensor, ...]]:
    scales, size, sampling_ratio, aligned = place[:4]
    batch, channels = features[0].shape[:2]
    if not bool(((rois[:, 0] >= 0) & (rois[:, 0] < batch)).all()):
        raise ValueError(f"boxes must name images 0..{batch - 1}, got {rois[:, 0].min()}..{rois[:, 0].max()}")
    rois = rois.to(torch.float64 if features[0].dtype == torch.float64 else torch.float32)
    levels = _levels(rois, place) if len(features) > 1 else torch.zeros_like(rois[:, 0], dtype=torch.int64)
    level, order = torch.sort(levels, stable=True)
    rois = rois[order]
    shape = torch.tensor([x.shape[2:] for x in features], device=rois.device)[level]
    scale = torch.tensor(scales, dtype=rois.dtype, device=rois.device)[level]
    y = _axis(rois[:, 2], rois[:, 4], scale, shape[:, 0], size[0], sampling_ratio, aligned)
    x = _axis(rois[:, 1], rois[:, 3], scale, shape[:, 1], size[1], sampling_ratio, aligned)
    stride = torch.stack((rois[:, 0].long() * shape[:, 0] * shape[:, 1], shape[:, 1]), dim=1).int()
    counts = torch.bincount(level, minlength=len(features))
    saved = (order, counts, stride, *y, *x)

    values = size[0] * size[1] * channels
    rows = rois.new_empty((len(rois), values))
    # On one level they stand in order, and what is summed is the output.
    most = len(rois) if int((counts > 0).sum()) == 1 else max(1, SUMMED // max(1, values))
    table, of_level = rows, -1
    for number, first, last in _parts(counts, y, x, most):
        if number != of_level:
            table, of_level = as_table(features[number]), number
        cell, weight, offset, _ = _expand(y, x, stride, first, last)
        part = _gather(table, cell, weight, offset).view(last - first, values)
        if last - first == len(rois):
            rows = part
        else:
            rows.index_copy_(0, order[first:last], part)
    output = as_map(rows, (len(rois), channels, *size), features[0].dtype, channels_last(features[0]))
    return output, saved


def _backward_cpu(
    grad: Tensor,
    saved: tuple[Tensor, ...],
    place: _Placement,
    shapes: Sequence[torch.Size],
    layouts: Sequence[bool],
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    order, counts, stride = saved[:3]
    y, x = _Axis(*saved[3:7]), _Axis(*saved[7:11])
    bins = place.size[0] * place.size[1]
    rows = as_table(grad)
    tables: list[Tensor | None] = [None] * len(shapes)
    for number, first, last in _parts(counts, y, x, len(order)):
        if not needed[number]:
            continue
        cells = shapes[number][0] * shapes[number][2] * shapes[number][3]
        cell, weight, _, bag = _expand(y, x, stride, first, last)
        row = order[first:last, None] * bins + torch.arange(bins, device=grad.device)
        by_cell = torch.sort(cell, stable=True).indices
        source = row.flatten().int().index_select(0, bag.index_select(0, by_cell))
        length = torch.bincount(cell, minlength=cells)
        offset = (torch.cumsum(length, dim=0) - length).int()
        part = _gather(rows, source, weight.index_select(0, by_cell), offset)
        previous = tables[number]
        tables[number] = part if previous is None else previous.add_(part)
    grads: list[Tensor | None] = []
    for table, shape, last_layout, need in zip(tables, shapes, layouts, needed, strict=True):
        if need and table is None:
            table = rows.new_zeros((shape[0] * shape[2] * shape[3], shape[1]))
        grads.append(None if table is None else as_map(table, shape, dtype, last_layout))
    return grads


def _gather(table: Tensor, index: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Sums of weighted rows of a table: bag b adds the rows ``index[offset[b]:offset[b + 1]]``."""
    if not table.shape[1]:  # embedding_bag with several threads fails on rows without columns
        return table.new_empty(len(offset), 0)
    return F.embedding_bag(index, table, offset, mode="sum", per_sample_weights=weight)


def _parts(counts: Tensor, y: _Axis, x: _Axis, most: int) -> Iterator[tuple[int, int, int]]:
    """Level, first and last region of slices of ``most`` regions whose list of weighted cells stays near ``LISTED``."""
    cells = torch.cumsum(y.length.sum(dim=1) * x.length.sum(dim=1), dim=0)
    first = 0
    for level, count in enumerate(counts.tolist()):
        end = first + count
        while first < end:
            limit = LISTED + (int(cells[first - 1]) if first else 0)
            last = end if int(cells[end - 1]) <= limit else int(torch.searchsorted(cells[:end], limit))
            last = min(max(last, first + 1), first + most)
            yield level, first, last
            first = last


def _axis(
    low: Tensor, high: Tensor, scale: Tensor, size: Tensor, bins: int, sampling_ratio: int, aligned: bool
) -> _Axis:
    """Cells and weights of each bin along one axis, ``(R,)`` region borders in pixels, ``(R,)`` map sizes."""
    offset = 0.5 if aligned else 0.0
    start = low * scale - offset
    extent = high * scale - offset - start
    finite = torch.isfinite(extent)  # then all of them are
    start, extent = torch.where(finite, start, 0), torch.where(finite, extent, 0)
    if not aligned:
        extent = extent.clamp(min=1)
    step = extent / bins
    grid = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else torch.ceil(step).clamp(0, MOST).long()
    grid = torch.where(finite, grid, 0)

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
    inside = (position >= -1) & (position <= limit)
    if not bool(inside.all()):
        bag, position, parts, limit = bag[inside], position[inside], parts[inside], limit[inside]
    position = position.clamp(min=0)
    before = torch.minimum(position.long(), limit - 1)
    after = torch.minimum(before + 1, limit - 1)
    fraction = (position - before).masked_fill_(after == before, 0)
    weights = torch.stack((1 - fraction, fraction), dim=1) / parts[:, None]

    # Cells rise along a bin, so one that a bin has already is the last one listed or the one before that.
    listed = torch.full_like(after, -1)
    listed[1:] = torch.where(bag[1:] == bag[:-1], after[:-1], -1)
    new = torch.stack((before > listed, after > torch.maximum(before, listed)), dim=1)
    rank = torch.cumsum(new.flatten(), dim=0).view(-1, 2) - 1
    rank[:, 0] -= (listed - before).clamp_(min=0)
    cell = torch.stack((before, after), dim=1)[new]
    weight = weights.new_zeros(len(cell)).index_add_(0, rank.flatten(), weights.flatten())
    count = torch.bincount(bag[:, None].expand(-1, 2)[new], minlength=len(low) * bins)
    start_of = torch.cumsum(count, dim=0) - count
    return _Axis(cell.int(), weight, count.view(-1, bins).int(), start_of.view(-1, bins).int())


def _position(start: Tensor, step: Tensor, parts: Tensor, bin: Tensor, number: Tensor) -> Tensor:
    """Where samples of bins lie, by rising position: a reversed region runs backwards, so it is turned."""
    number = torch.where(step < 0, parts - 1 - number, number)
    return start + bin * step + (number + 0.5) * step / parts


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


def _expand(y: _Axis, x: _Axis, stride: Tensor, first: int, last: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All weighted cells of the regions ``first:last``: the product of both axes, bin after bin.

    Returns:
        Row of the level's table ``(T,)`` int32, weight ``(T,)``, start of each bin in these ``(bins,)`` int32, and
        the bin of each ``(T,)`` int32, bins counted from the first region of the slice.
    """
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
    return cell, weight, offset.int(), bag.int().index_select(0, row)


def _forward_cuda(features: Sequence[Tensor], rois: Tensor, place: _Placement) -> tuple[Tensor, tuple[Tensor, ...]]:
    if len(features) > MAX_LEVELS:
        raise ValueError(f"features must have at most {MAX_LEVELS} levels on a GPU, got {len(features)}")
    batch, channels = features[0].shape[:2]
    layout = memory_format(channels_last(features[0]))
    maps = [x.contiguous(memory_format=layout) for x in features]
    rois = rois.float().contiguous()
    output = torch.empty(
        (len(rois), channels, *place.size), dtype=maps[0].dtype, device=maps[0].device, memory_format=layout
    )
    parts = min(-(-BLOCKS // max(len(rois), 1)), -(-output[:1].numel() // SOURCE.constants["THREADS"]))
    last = layout == torch.channels_last
    _launch.launch(
        SOURCE,
        "roi_align_forward",
        (len(rois), parts),
        SOURCE.constants["THREADS"],
        [
            *_pyramid(maps, [x.shape for x in maps], place),
            *(rois, output, np.int32(batch), np.int32(channels), *_sampling(place)),
            *(np.int32(last), np.int32(last and packs(channels, *maps, output))),
        ],
        dtype=output.dtype,
    )
    return output, (rois,)


def _backward_cuda(
    grad: Tensor,
    saved: tuple[Tensor, ...],
    place: _Placement,
    shapes: Sequence[torch.Size],
    layouts: Sequence[bool],
    dtype: torch.dtype,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    (rois,) = saved
    batch, channels = shapes[0][:2]
    layout = memory_format(layouts[0])
    grad = grad.contiguous(memory_format=layout)
    grads = [
        torch.empty(shape, dtype=dtype, device=grad.device, memory_format=layout) if need else None
        for shape, need in zip(shapes, needed, strict=True)
    ]
    pyramid = _pyramid(grads, shapes, place)
    order, cells, offsets = sorted_regions(rois, batch * len(shapes))
    _launch.launch(
        SOURCE,
        "roi_align_sort",
        batch * len(shapes),
        SOURCE.constants["SORT"],
        [*pyramid, rois, np.int32(len(rois)), order, cells, offsets, np.int32(batch), *_sampling(place)],
        dtype=dtype,
    )
    tile = SOURCE.constants["TILE"]
    slices = -(-channels * grad.element_size() // (16 * SOURCE.constants["LANES"]))
    _launch.launch(
        SOURCE,
        "roi_align_backward",
        (sum(tiles(shape, tile) for shape, need in zip(shapes, needed, strict=True) if need), slices),
        SOURCE.constants["THREADS"],
        [
            *(*pyramid, rois, grad, order, cells, offsets, np.int32(batch), np.int32(channels), *_sampling(place)),
            *(np.int32(layouts[0]), np.int32(layouts[0] and packs(channels, grad, *grads))),
        ],
        dtype=dtype,
    )
    return [
        None if x is None else x.contiguous(memory_format=memory_format(last))
        for x, last in zip(grads, layouts, strict=True)
    ]


def _pyramid(maps: Sequence[Tensor | None], shapes: Sequence[torch.Size], place: _Placement) -> list[Any]:
    """Arguments of the kernels that describe the levels."""
    arguments: list[Any] = []
    for x, shape, scale in zip(maps, shapes, place.scales, strict=True):
        arguments += [x, np.int32(shape[2]), np.int32(shape[3]), np.float32(scale)]
    arguments += [None, np.int32(0), np.int32(0), np.float32(0)] * (MAX_LEVELS - len(shapes))
    canonical = place.canonical_scale, place.canonical_level
    return [*arguments, np.int32(len(shapes)), *(np.float32(x) for x in (*place.range(), *canonical))]


def _sampling(place: _Placement) -> list[Any]:
    """Arguments of the kernels that say where the samples of a region lie."""
    return [np.int32(x) for x in (*place.size, max(place.sampling_ratio, 0), place.aligned)]
