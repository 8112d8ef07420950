"""What the ops on regions of interest share: their checks, the layouts of maps, and room for ``regions.cuh``."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from rcnn.kernels.checks import check_floating, check_positive, check_sequence, check_tensors

#: Blocks that keep a large GPU busy in a forward pass: with fewer regions than that, several blocks share one.
BLOCKS = 1024
#: Most bins of a region along an axis.
MOST_BINS = 1024
#: Values of a map whose layout is changed at a time on a CPU: 512 KB of float32, which the caches near the cores hold.
TURNED = 1 << 17


def as_rois(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """``(R, 5)`` regions from such a tensor or from one ``(n, 4)`` tensor per image."""
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, Sequence):
        raise TypeError(f"boxes must be a torch.Tensor or one tensor per image, got {type(boxes).__name__}")
    if boxes:
        check_tensors({f"boxes[{i}]": each for i, each in enumerate(boxes)})
    for i, each in enumerate(boxes):
        if each.dim() != 2 or each.shape[1] != 4:
            raise ValueError(f"boxes[{i}] must have shape (n, 4), got {tuple(each.shape)}")
    if not boxes:
        raise ValueError("boxes must hold one tensor per image, got an empty list")
    index = torch.cat([each.new_full((len(each), 1), i) for i, each in enumerate(boxes)])
    return torch.cat((index, torch.cat(list(boxes))), dim=1)


def check_pool(
    features: Sequence[Tensor], rois: Tensor, output_size: int | Sequence[int], scales: Sequence[float], op: str
) -> tuple[int, int]:
    """Check the arguments that all RoI pooling ops share; gives the output size as a pair."""
    pyramid = op == "multiscale_roi_align"
    name, regions, factor = ("features", "rois", "spatial_scales") if pyramid else ("input", "boxes", "spatial_scale")
    if isinstance(features, Tensor):
        raise TypeError("features must be a sequence of maps, got one torch.Tensor")
    check_sequence(name, features)
    check_sequence(factor, scales)
    if not len(features) or len(features) != len(scales):
        raise ValueError(f"spatial_scales must name one scale per level, got {len(scales)} for {len(features)}")
    check_tensors({name: features[0], regions: rois} | {f"{name}[{i}]": each for i, each in enumerate(features)})
    for each in features:
        if each.dim() != 4 or 0 in each.shape[2:]:
            raise ValueError(f"{name} must have shape (B, C, H, W) with H, W > 0, got {tuple(each.shape)}")
        check_floating(name, each, torch.float64)
        if each.shape[:2] != features[0].shape[:2] or each.dtype != features[0].dtype:
            raise ValueError(
                f"features must share batch, channels and dtype, got {tuple(each.shape)} {each.dtype} beside "
                f"{tuple(features[0].shape)} {features[0].dtype}"
            )
    if rois.dim() != 2 or rois.shape[1] != 5:
        raise ValueError(f"{regions} must have shape (R, 5), got {tuple(rois.shape)}")
    check_floating(regions, rois, torch.float64)
    if rois.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{regions} must not require a gradient: {op} has none for them, pass {regions}.detach()")
    for scale in scales:
        check_positive(factor, scale)
    pair = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, Integral) or n < 1 for n in pair):
        raise ValueError(f"output_size must be one or two positive integers, got {output_size!r}")
    if max(pair) > MOST_BINS:
        raise ValueError(f"output_size must be at most {MOST_BINS}, got {output_size!r}")
    return int(pair[0]), int(pair[1])


def channels_last(x: Tensor) -> bool:
    """Whether a map, and so what is pooled from it, is laid out channels-last."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def memory_format(last: bool) -> torch.memory_format:
    """The layout that :func:`channels_last` asks about."""
    return torch.channels_last if last else torch.contiguous_format


def as_table(x: Tensor) -> Tensor:
    """``(B * H * W, C)`` rows of a map in the dtype of the arithmetic; a view where the layout allows it."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, channels, height, width = x.shape
    if not x.is_contiguous():
        # A map of one image can be reshaped without a copy to rows that lie apart: hence contiguous.
        return x.permute(0, 2, 3, 1).reshape(batch * height * width, channels).to(dtype).contiguous()
    table = x.new_empty((batch, height * width, channels), dtype=dtype)
    _copy_blocks(table, x.view(batch, channels, height * width).transpose(1, 2))
    return table.view(batch * height * width, channels)


def as_map(table: Tensor, shape: Sequence[int], dtype: torch.dtype, last: bool) -> Tensor:
    """``(B, C, H, W)`` map of a table; channels-last, which is a view, or contiguous."""
    batch, channels, height, width = shape
    if last:
        return table.view(batch, height, width, channels).permute(0, 3, 1, 2).to(dtype)
    output = table.new_empty(tuple(shape), dtype=dtype)
    _copy_blocks(
        output.view(batch, channels, height * width).transpose(1, 2), table.view(batch, height * width, channels)
    )
    return output


def _copy_blocks(target: Tensor, source: Tensor) -> None:
    """Copy ``(B, cells, C)``, either with its channels apart: in one go each value would cost a cache line."""
    batch, cells, channels = target.shape
    across = max(1, TURNED // max(1, channels))
    images = max(1, across // max(1, cells))
    for b in range(0, batch, images):
        for first in range(0, cells, across):
            block = slice(b, b + images), slice(first, first + across)
            target[block].copy_(source[block])


def packs(channels: int, *tensors: Tensor | None) -> bool:
    """Whether the channels of channels-last tensors can be read and written 16 bytes at a time."""
    return all(x is None or (x.data_ptr() % 16 == 0 and channels * x.element_size() % 16 == 0) for x in tensors)


def tiles(shape: Sequence[int], side: int) -> int:
    """Number of square tiles that cover the maps of a ``(B, C, H, W)`` tensor."""
    return shape[0] * -(-shape[2] // side) * -(-shape[3] // side)


def sorted_regions(rois: Tensor, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what ``sort_regions`` of ``regions.cuh`` writes: the order, the cells that each touches, the offsets."""
    return (
        rois.new_empty(len(rois), dtype=torch.int32),
        rois.new_empty((len(rois), 4), dtype=torch.int32),
        rois.new_empty(segments + 1, dtype=torch.int32),
    )
