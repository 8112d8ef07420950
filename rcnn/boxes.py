"""Box geometry in plain torch: area, IoU, clipping, encoding and decoding.

Boxes are ``(..., 4)`` tensors ``x1, y1, x2, y2`` in continuous pixels: the area is ``(x2 - x1) * (y2 - y1)``,
with no ``+ 1``. The order of the operations here is a contract: the CUDA twins in ``kernels/box.cuh`` repeat it
so that areas, IoU and clipping are the same bits on every device.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: The largest ``dw`` or ``dh`` that :func:`decode` exponentiates: a box grows by at most 1000 / 16 in one step
#: (torchvision and detectron2 use the same bound).
MAX_LOG_SCALE = math.log(1000.0 / 16)


def area(boxes: Tensor) -> Tensor:
    """Area of each box.

    Args:
        boxes: ``(..., 4)`` float, pixels.

    Returns:
        ``(...)`` float, square pixels; negative or zero for a reversed or empty box.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1) * (y2 - y1)


def intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Area shared by each pair of boxes, by broadcasting.

    Args:
        boxes1: ``(..., 4)`` float, pixels.
        boxes2: ``(..., 4)`` float, pixels, broadcastable against ``boxes1``.

    Returns:
        ``(...)`` float, square pixels, never negative.
    """
    width = torch.minimum(boxes1[..., 2], boxes2[..., 2]) - torch.maximum(boxes1[..., 0], boxes2[..., 0])
    height = torch.minimum(boxes1[..., 3], boxes2[..., 3]) - torch.maximum(boxes1[..., 1], boxes2[..., 1])
    return width.clamp_(min=0) * height.clamp_(min=0)


def iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of each pair of boxes, by broadcasting.

    ``inter / ((area1 + area2) - inter)`` in the input's precision; 0 where the boxes do not overlap, so two empty
    boxes give 0 and not NaN.

    Args:
        boxes1: ``(..., 4)`` float, pixels. Use ``boxes1[:, None]`` and ``boxes2[None]`` for all pairs.
        boxes2: ``(..., 4)`` float, pixels, broadcastable against ``boxes1``.

    Returns:
        ``(...)`` float in 0..1.
    """
    inter = intersection(boxes1, boxes2)
    union = (area(boxes1) + area(boxes2)) - inter
    return torch.where(inter > 0, inter / union, torch.zeros_like(inter))


def clip(boxes: Tensor, image_sizes: Tensor) -> Tensor:
    """Move the corners that lie outside an image onto its border.

    Args:
        boxes: ``(B, ..., 4)`` float, pixels.
        image_sizes: ``(B, 2)`` float, height and width of each image in pixels.

    Returns:
        A new tensor like ``boxes`` with x in 0..width and y in 0..height of its image.
    """
    limits = image_sizes.flip(1).repeat(1, 2).view(-1, *(1,) * (boxes.dim() - 2), 4)
    return boxes.clamp(boxes.new_zeros(()), limits)


def encode(boxes: Tensor, targets: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas that move ``boxes`` onto ``targets``.

    ``dx = wx * (cx_t - cx) / w``, ``dy`` likewise, ``dw = ww * log(w_t / w)``, ``dh`` likewise.

    Args:
        boxes: ``(..., 4)`` float, reference boxes (anchors or proposals) of positive width and height, pixels.
        targets: ``(..., 4)`` float, ground-truth boxes of positive width and height, pixels.
        weights: factors of dx, dy, dw, dh; (10, 10, 5, 5) in the RoI head, so that deltas have about unit variance.

    Returns:
        ``(..., 4)`` float, dx, dy, dw, dh, without unit.

    Source:
        Ren et al., Faster R-CNN (2015), equation 2; weights as in Girshick, Fast R-CNN, section 2.3.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    target_x1, target_y1, target_x2, target_y2 = targets.unbind(-1)
    width, height = x2 - x1, y2 - y1
    target_width, target_height = target_x2 - target_x1, target_y2 - target_y1
    center_x, center_y = x1 + 0.5 * width, y1 + 0.5 * height
    target_x, target_y = target_x1 + 0.5 * target_width, target_y1 + 0.5 * target_height
    wx, wy, ww, wh = weights
    return torch.stack(
        (
            wx * (target_x - center_x) / width,
            wy * (target_y - center_y) / height,
            ww * torch.log(target_width / width),
            wh * torch.log(target_height / height),
        ),
        dim=-1,
    )


def decode(deltas: Tensor, boxes: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Apply deltas to boxes; the inverse of :func:`encode`, with ``dw`` and ``dh`` bounded by ``MAX_LOG_SCALE``.

    Args:
        deltas: ``(..., 4)`` float, dx, dy, dw, dh.
        boxes: ``(..., 4)`` float, reference boxes, pixels, broadcastable against ``deltas``.
        weights: the factors given to :func:`encode`.

    Returns:
        ``(..., 4)`` float, boxes in pixels, not clipped to any image.
    """
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = deltas.unbind(-1)
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    center_x = (dx / wx) * width + (x1 + 0.5 * width)
    center_y = (dy / wy) * height + (y1 + 0.5 * height)
    half_width = 0.5 * (torch.exp((dw / ww).clamp(max=MAX_LOG_SCALE)) * width)
    half_height = 0.5 * (torch.exp((dh / wh).clamp(max=MAX_LOG_SCALE)) * height)
    return torch.stack(
        (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height), dim=-1
    )


def decode_inside(
    deltas: Tensor,
    boxes: Tensor,
    image_sizes: Tensor,
    *,
    min_size: float,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """:func:`decode`, then :func:`clip`, and which of the boxes are of use.

    Args:
        deltas: ``(N, 4)`` float, dx, dy, dw, dh.
        boxes: ``(N, 4)`` float, reference boxes, pixels.
        image_sizes: ``(N, 2)`` float, height and width of the image of each box, pixels.
        min_size: shortest side, pixels.
        weights: the factors given to :func:`encode`.

    Returns:
        ``(N, 4)`` float, pixels, and ``(N,)`` bool: both sides have the minimum and the area before the clipping,
        which would hide a coordinate that is not finite, is finite.
    """
    decoded = decode(deltas, boxes, weights)
    clipped = clip(decoded, image_sizes)
    x1, y1, x2, y2 = clipped.unbind(1)
    return clipped, (torch.minimum(x2 - x1, y2 - y1) >= min_size) & (area(decoded).abs() < math.inf)
