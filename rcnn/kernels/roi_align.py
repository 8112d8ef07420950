"""RoI Align: bilinear samples averaged in each bin of a region, from one map or from the level that fits the region.

The output is a sum of map cells with weights that depend on the regions alone, and the weight of a cell is a product
of a weight in y and one in x. The bodies list the cells of each axis once per bin and sum the channels-last rows; the
gradient is the same sum over the transposed list, so that it needs no atomics and is the same in every run. See
``roi_align_cpu.py``; the CUDA bodies keep the lists in shared memory forward, and backward a block for each tile of the
maps adds what the regions send there.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rcnn.kernels import _launch
from rcnn.kernels.checks import check_positive, check_real, check_whole
from rcnn.kernels.regions import (
    BLOCKS,
    as_rois,
    channels_last,
    check_pool,
    memory_format,
    packs,
    sorted_regions,
    tiles,
)
from rcnn.kernels.roi_align_cpu import Placement, backward_cpu, forward_cpu

#: Most samples of a bin and axis that can be asked for.
MOST_ASKED = 1024
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
    place = Placement((float(spatial_scale),), size, int(sampling_ratio), bool(aligned))
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
    place = Placement(scales, size, int(sampling_ratio), bool(aligned), canonical_scale, canonical_level)
    return _RoIAlign.apply(rois, place, *features)


def _check_ratio(sampling_ratio: int) -> None:
    check_whole("sampling_ratio", sampling_ratio, -(1 << 31))
    if sampling_ratio > MOST_ASKED:
        raise ValueError(f"sampling_ratio must be at most {MOST_ASKED}, got {sampling_ratio}")


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rois: Tensor, place: Placement, *features: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in features]
        ctx.layouts = [channels_last(x) for x in features]
        ctx.place, ctx.dtype = place, features[0].dtype
        forward = _forward_cuda if _launch.uses_kernels(features[0]) else forward_cpu
        output, saved = forward(features, rois.detach(), place)
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backward = _backward_cuda if _launch.uses_kernels(grad) else backward_cpu
        needed = ctx.needs_input_grad[2:]
        return None, None, *backward(grad, ctx.saved_tensors, ctx.place, ctx.shapes, ctx.layouts, ctx.dtype, needed)


def _forward_cuda(features: Sequence[Tensor], rois: Tensor, place: Placement) -> tuple[Tensor, tuple[Tensor, ...]]:
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
    place: Placement,
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


def _pyramid(maps: Sequence[Tensor | None], shapes: Sequence[torch.Size], place: Placement) -> list[Any]:
    """Arguments of the kernels that describe the levels."""
    arguments: list[Any] = []
    for x, shape, scale in zip(maps, shapes, place.scales, strict=True):
        arguments += [x, np.int32(shape[2]), np.int32(shape[3]), np.float32(scale)]
    arguments += [None, np.int32(0), np.int32(0), np.float32(0)] * (MAX_LEVELS - len(shapes))
    canonical = place.canonical_scale, place.canonical_level
    return [*arguments, np.int32(len(shapes)), *(np.float32(x) for x in (*place.range(), *canonical))]


def _sampling(place: Placement) -> list[Any]:
    """Arguments of the kernels that say where the samples of a region lie."""
    return [np.int32(x) for x in (*place.size, max(place.sampling_ratio, 0), place.aligned)]
