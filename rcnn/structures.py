"""Frozen dataclasses of tensors that pass between the rooms: targets in, proposals and samples within, detections out.

Ragged things have a fixed capacity and a count on the device, so that nothing between the images and the losses has
to wait for the host. Padding rows hold finite, harmless values. Integer tensors are int64, floats are float32.
``B`` images, ``G`` ground-truth boxes of the whole batch, ``P`` proposals per image, ``S`` samples per image,
``D`` detections per image.
"""

from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T", bound="_Tensors")


@dataclass(frozen=True)
class _Tensors:
    def to(self: _T, device: "torch.device | str", non_blocking: bool = False) -> _T:
        """The same structure with every tensor on ``device``."""
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)
        }
        return type(self)(**moved)


@dataclass(frozen=True)
class Targets(_Tensors):
    """Ground truth of a batch.

    Attributes:
        boxes: ``(G, 4)`` float32, pixels of the padded network input. Rows from ``offsets[B]`` on are padding.
        labels: ``(G,)`` int64, 1..K; -1 marks an ignore region (COCO crowd, VOC difficult).
        offsets: ``(B + 1,)`` int64; the boxes of image b are rows ``offsets[b]:offsets[b + 1]``.
        image_sizes: ``(B, 2)`` float32, height and width of each image inside the padded batch, pixels.
        image_ids: ``(B,)`` int64, position of the image in its data set; it seeds the sampling.
    """

    boxes: Tensor
    labels: Tensor
    offsets: Tensor
    image_sizes: Tensor
    image_ids: Tensor


@dataclass(frozen=True)
class Proposals(_Tensors):
    """Class-agnostic boxes of the region proposal network, best first.

    Attributes:
        boxes: ``(B, P, 4)`` float32, pixels, inside the image; zeros from row ``count[b]`` on.
        scores: ``(B, P)`` float32, objectness logits; zeros from row ``count[b]`` on.
        count: ``(B,)`` int64, rows in use.
    """

    boxes: Tensor
    scores: Tensor
    count: Tensor


@dataclass(frozen=True)
class AnchorSamples(_Tensors):
    """Anchors drawn for the loss of the region proposal network: positives first, then negatives, then padding.

    Attributes:
        index: ``(B, S)`` int64, anchor index; 0 in padding rows.
        labels: ``(B, S)`` int64, 1 positive, 0 negative, -1 padding.
        deltas: ``(B, S, 4)`` float32, regression targets; zeros where the label is not 1.
    """

    index: Tensor
    labels: Tensor
    deltas: Tensor


@dataclass(frozen=True)
class Samples(_Tensors):
    """Regions of interest drawn for the loss of the RoI head; S rows per image: positives, negatives, padding.

    Attributes:
        rois: ``(B * S, 5)`` float32, image index, x1, y1, x2, y2 in pixels; padding rows keep their image index.
        labels: ``(B * S,)`` int64, 1..K for positives, 0 for background, -1 for padding.
        matched_boxes: ``(B * S, 4)`` float32, the ground-truth box of each positive; zeros elsewhere.
        deltas: ``(B * S, 4)`` float32, regression targets; zeros where the label is not positive.
        weights: ``(B * S,)`` float32, 1 for rows in use, 0 for padding.
    """

    rois: Tensor
    labels: Tensor
    matched_boxes: Tensor
    deltas: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Detections(_Tensors):
    """Boxes found in each image, by falling score.

    Attributes:
        boxes: ``(B, D, 4)`` float32, pixels; zeros from row ``count[b]`` on.
        scores: ``(B, D)`` float32 in 0..1; zeros in padding.
        labels: ``(B, D)`` int64, 1..K; 0 in padding.
        count: ``(B,)`` int64, rows in use.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor

    def unpad(self) -> list[dict[str, Tensor]]:
        """One ``{"boxes", "labels", "scores"}`` per image without its padding; this waits for the device."""
        counts = self.count.tolist()
        return [
            {"boxes": self.boxes[b, :n], "labels": self.labels[b, :n], "scores": self.scores[b, :n]}
            for b, n in enumerate(counts)
        ]
