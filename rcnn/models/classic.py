"""The network half of the classic API (:mod:`rcnn.classic`): anchor targets, proposals and the RPN as it shows them.

Shapes: ``B`` pictures, ``A`` anchors per cell, ``G`` boxes in all pictures, ``P`` proposals for each.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from rcnn import boxes, kernels
from rcnn.config import ModelConfig, given, resolve_model
from rcnn.models import rpn
from rcnn.models.vgg import VGG16
from rcnn.structures import Proposals, Targets

#: The settings of ``vgg16``, which the classic names take.
RECIPE = resolve_model(ModelConfig(name="vgg16"))

_RATIOS = given(RECIPE.rpn.aspect_ratios)

#: Channels of the trunk's map, pixels per cell of it, and the seed of all sampling.
CHANNELS, STRIDE, SEED = 512, 16, 0


def _sizes(im_info: ArrayLike | Tensor, count: int, device: torch.device) -> Tensor:
    """``(count, 2)`` heights and widths from ``im_info``, which has a row for each picture or one for all."""
    info = torch.as_tensor(im_info).to(device, torch.float32, non_blocking=device.type == "cuda")
    if info.dim() != 2 or info.shape[0] not in (1, count) or info.shape[1] < 2:
        raise ValueError(f"im_info must have shape ({count}, 2 or 3) or (1, 2 or 3), got {tuple(info.shape)}")
    return info[:, :2].expand(count, 2).contiguous()


def _targets(gt_boxes: ArrayLike | Tensor, index: ArrayLike | Tensor, sizes: Tensor) -> Targets:
    """Ground truth from ``(G, 4)`` or, with classes, ``(G, 5)`` boxes and the picture of each, in any order.

    It is checked and sorted where the index lies: no wait for a GPU, if that is the host.
    """
    image = torch.as_tensor(index).to(torch.int64)
    gt = torch.as_tensor(gt_boxes).to(image.device, torch.float32)
    if gt.dim() != 2 or gt.shape[1] not in (4, 5) or image.shape != gt.shape[:1]:
        got = f"{tuple(gt.shape)} and {tuple(image.shape)}"
        raise ValueError(f"gt_boxes and their index must have shapes (G, 4 or 5) and (G,), got {got}")
    if len(image) and not 0 <= int(image.min()) <= int(image.max()) < len(sizes):
        raise ValueError(f"the index of gt_boxes must be in 0..{len(sizes) - 1}, got {sorted(set(image.tolist()))}")
    gt = gt[image.argsort(stable=True)]
    return Targets(
        boxes=gt[:, :4].contiguous(),
        labels=gt[:, 4].long() if gt.shape[1] == 5 else image.new_ones(len(gt)),
        offsets=nn.functional.pad(torch.bincount(image, minlength=len(sizes)).cumsum(0), (1, 0)),
        image_sizes=sizes,
        image_ids=torch.arange(len(sizes)),
    ).to(sizes.device, non_blocking=sizes.is_cuda)


class _AnchorLayer(nn.Module):
    def __init__(self, feat_stride: ArrayLike, anchor_scales: ArrayLike) -> None:
        super().__init__()
        self._feat_stride = int(np.ravel(feat_stride)[0])
        cells = kernels.cell_anchors([STRIDE * float(scale) for scale in np.ravel(anchor_scales)], _RATIOS)
        self.register_buffer("_anchors", cells[None], persistent=False)
        self._anchors: Tensor

    def _grid(self, height: int, width: int) -> Tensor:
        return kernels.anchors(self._anchors, [(height, width)], [self._feat_stride])

    def _create_anchors(self, feature_height: int, feature_width: int) -> np.ndarray:
        """``(H * W * A, 4)`` float32 anchors of a feature map in pixels, by row, column and anchor of the cell."""
        return self._grid(feature_height, feature_width).cpu().numpy()


class AnchorTargetLayer(_AnchorLayer):
    """Which anchors the region proposal network should find, and how far each should move.

    Args:
        feat_stride: pixels per cell of the feature map: a number, or a list or array of one.
        anchor_scales: sides of the anchors, in units of 16 pixels; each comes in the ratios 0.5, 1 and 2.
        is_cuda: leave the results of :meth:`forward` where its input lies; false brings them to the CPU.
    """

    def __init__(self, feat_stride: ArrayLike, anchor_scales: ArrayLike, is_cuda: bool = True) -> None:
        super().__init__(feat_stride, anchor_scales)
        self.is_cuda, self._calls = is_cuda, 0

    def forward(
        self,
        rpn_cls_score: Tensor,
        gt_boxes: ArrayLike | Tensor,
        batch_boxes_index: ArrayLike | Tensor,
        im_info: ArrayLike | Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw up to 256 anchors of each picture that lie inside it, as :func:`rcnn.kernels.match_anchors` does.

        Args:
            rpn_cls_score: ``(B, 2 * A, H, W)``; only its shape counts.
            gt_boxes: ``(G, 4 or 5)``, pixels; a fifth column is the class, -1 for what is to be ignored.
            batch_boxes_index: ``(G,)``, the picture of each box.
            im_info: ``(B or 1, 2 or 3)``, height and width of each picture, or of all.

        Returns:
            labels ``(B, 1, A * H, W)`` int64: 1 object, 0 background, -1 not drawn. bbox_targets ``(B, 4 * A, H, W)``:
            deltas, zeros where the label is not 1. bbox_inside_weights, of that shape: 1 where the label is 1.
            bbox_outside_weights, of that shape: 1 / anchors drawn, where one was.
        """
        batch, _, height, width = rpn_cls_score.shape
        device, cfg = rpn_cls_score.device, RECIPE.rpn
        anchors = self._grid(height, width).to(device)
        self._calls += 1
        samples = kernels.match_anchors(
            anchors,
            _targets(gt_boxes, batch_boxes_index, _sizes(im_info, batch, device)),
            seed=SEED,
            step=torch.full((), self._calls, device=device),
            high_threshold=cfg.high_threshold,
            low_threshold=cfg.low_threshold,
            batch_size_per_image=given(cfg.batch_size_per_image),
            positive_fraction=cfg.positive_fraction,
            allowed_border=cfg.allowed_border,
        )
        row = torch.where(samples.labels >= 0, samples.index, len(anchors))  # padding: a row that is cut off
        labels = row.new_full((batch, len(anchors) + 1), -1).scatter_(1, row, samples.labels)[:, :-1]
        deltas = samples.deltas.new_zeros(batch, len(anchors) + 1, 4)
        deltas = deltas.scatter_(1, row[..., None].expand_as(samples.deltas), samples.deltas)[:, :-1]
        inside, outside = (labels == 1).float(), (labels >= 0) / (labels >= 0).sum().clamp(min=1)
        parts = labels, deltas, inside[..., None].expand_as(deltas), outside[..., None].expand_as(deltas)
        maps = [part.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous() for part in parts]
        maps = maps if self.is_cuda else [one.cpu() for one in maps]
        return maps[0].reshape(batch, 1, -1, width), maps[1], maps[2], maps[3]

    def _filter_outside_anchors(
        self, all_anchors: np.ndarray, im_height: float, im_width: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The anchors that lie inside an image, ``(n, 4)``, and their rows, ``(n,)``."""
        low, high = (all_anchors[:, :2] >= 0).all(1), (all_anchors[:, 2:] <= (im_width, im_height)).all(1)
        rows = np.flatnonzero(low & high)
        return all_anchors[rows], rows

    def calculate_target(
        self,
        inside_anchors: np.ndarray,
        batch_size: int,
        inside_anchor_indexes: np.ndarray,
        batch_boxes: ArrayLike,
        batch_boxes_index: ArrayLike,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Labels and deltas of all anchors, none drawn: 1 from an IoU of 0.7 or for a box's best, 0 below 0.3, else -1.

        Args:
            inside_anchors: ``(A, 4)``, pixels.
            batch_size: pictures, B.
            inside_anchor_indexes: ``(A,)``; not used.
            batch_boxes: ``(G, 4)``, pixels.
            batch_boxes_index: ``(G,)``, the picture of each box.

        Returns:
            labels ``(B, A)`` int64, and bbox_targets ``(B, A, 4)`` float32, zeros where the label is not 1.
        """
        anchors = torch.as_tensor(inside_anchors).to(torch.float32)
        targets = _targets(batch_boxes, batch_boxes_index, torch.zeros(batch_size, 2))
        labels, matched = kernels.match(
            anchors,
            targets.boxes,
            targets.labels,
            targets.offsets,
            high_threshold=RECIPE.rpn.high_threshold,
            low_threshold=RECIPE.rpn.low_threshold,
            allow_low_quality_matches=True,
        )
        deltas = torch.zeros(batch_size, len(anchors), 4)
        image, row = (labels == 1).nonzero(as_tuple=True)
        deltas[image, row] = boxes.encode(anchors[row], targets.boxes[matched[image, row]])
        return labels.numpy(), deltas.numpy()


#: The original's spelling.
AnchorTargerLayer = AnchorTargetLayer


class ProposalLayer(_AnchorLayer):
    """Turns the maps of the region proposal network into boxes.

    Args:
        _feat_stride: pixels per cell of the feature map.
        anchor_scales: sides of the anchors, in units of 16 pixels.
    """

    def __init__(self, _feat_stride: ArrayLike = (STRIDE,), anchor_scales: ArrayLike = (8, 16, 32)) -> None:
        super().__init__(_feat_stride, anchor_scales)

    def forward(self, scores: Tensor, bbox_deltas: Tensor, im_info: ArrayLike | Tensor, cfg_key: str) -> Tensor:
        """The best boxes, as :func:`rcnn.kernels.proposals` makes them.

        Args:
            scores: ``(B, 2 * A, H, W)``, background and then foreground; the order of the latter counts.
            bbox_deltas: ``(B, 4 * A, H, W)``.
            im_info: ``(B or 1, 2 or 3)``, height and width of each picture, or of all.
            cfg_key: ``TRAIN`` (12,000 boxes before and 2,000 after NMS) or ``TEST`` (6,000 and 300).

        Returns:
            ``(B, P, 5)`` float32 rois: picture, x1, y1, x2, y2; the best first, zeros behind the last.
        """
        if cfg_key not in ("TRAIN", "TEST"):
            raise ValueError(f"cfg_key must be TRAIN or TEST, got {cfg_key!r}")
        batch, channels, height, width = scores.shape
        foreground = scores.detach()[:, channels // 2 :].permute(0, 2, 3, 1).reshape(batch, -1)
        deltas = bbox_deltas.detach().permute(0, 2, 3, 1).reshape(batch, -1, 4)
        anchors, which = self._grid(height, width).to(scores.device), cfg_key.lower()
        sizes, cfg = _sizes(im_info, batch, scores.device), RECIPE.rpn
        before, after = getattr(cfg, f"pre_nms_top_n_{which}"), getattr(cfg, f"post_nms_top_n_{which}")
        found = kernels.proposals(
            foreground,
            deltas,
            anchors,
            sizes,
            [len(anchors)],
            pre_nms_top_n=before,
            post_nms_top_n=after,
            iou_threshold=cfg.nms_threshold,
        )
        return to_rois(found)

    def _filter_boxes(self, boxes: np.ndarray, min_size: float) -> np.ndarray:
        """Rows of the boxes of which no side is shorter than ``min_size`` pixels; sides are ``x2 - x1``."""
        return np.flatnonzero((boxes[:, 2:4] - boxes[:, :2] >= min_size).all(1))


def to_rois(proposals: Proposals) -> Tensor:
    """``(B, P, 5)`` float32: picture, x1, y1, x2, y2 of each proposal."""
    image = torch.arange(len(proposals.boxes), device=proposals.boxes.device, dtype=torch.float32)
    return torch.cat((image[:, None, None].expand(-1, proposals.boxes.shape[1], 1), proposals.boxes), 2)


class RPN(nn.Module):
    """The region proposal network on the trunk of VGG-16.

    Args:
        frozen: blocks of the trunk, from the picture on, that do not train.

    Attributes:
        anchor_scales: sides of the anchors in units of 16 pixels; each comes in the ratios 0.5, 1 and 2.
        features: the trunk; pictures to a ``(B, 512, H, W)`` map of a sixteenth of their size.
        anchor_target_layer: the targets by themselves; :meth:`forward` takes the same from :mod:`rcnn.models.rpn`.
        proposal_layer: the proposals by themselves; likewise.
        cross_entropy: ``()`` loss of the scores in the last :meth:`forward` with ground truth, else None.
        loss_box: ``()`` loss of the deltas, likewise.
    """

    _feat_stride = [STRIDE]
    anchor_scales = [4, 8, 16, 32]

    def __init__(self, frozen: int = 0) -> None:
        super().__init__()
        trunk = VGG16()
        trunk.freeze(frozen)
        self.features = trunk.features
        sizes = [[float(STRIDE * scale) for scale in self.anchor_scales]]
        self.network = rpn.RPN(CHANNELS, CHANNELS, [STRIDE], replace(RECIPE.rpn, anchor_sizes=sizes), SEED)
        self.anchor_target_layer = AnchorTargetLayer(self._feat_stride, self.anchor_scales)
        self.proposal_layer = ProposalLayer(self._feat_stride, self.anchor_scales)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.step: Tensor
        self.cross_entropy: Tensor | None = None
        self.loss_box: Tensor | None = None
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def conv1(self) -> nn.Module:
        """The 3x3 convolution of the head, with its ReLU."""
        return self.network.head.conv

    @property
    def score_conv(self) -> nn.Module:
        """The map of ``conv1`` to ``(B, 2 * A, H, W)`` scores, background and then foreground."""
        return nn.Sequential(self.network.head.cls_logits, _TwoScores())

    @property
    def bbox_conv(self) -> nn.Module:
        """The map of ``conv1`` to ``(B, 4 * A, H, W)`` deltas."""
        return self.network.head.bbox_pred

    @property
    def loss(self) -> Tensor:
        """``cross_entropy + loss_box``, ``()``."""
        return total(self.cross_entropy, self.loss_box)

    def _computer_forward(self, im_data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The maps of ``features``, ``bbox_conv`` and ``score_conv`` for ``(B, 3, H, W)`` normalised pictures."""
        features = self.features(im_data.to(self.step.device, memory_format=torch.channels_last))
        objectness, deltas = self.network.head([features])
        cells = len(features), *features.shape[2:], -1
        logits, deltas = (rows.reshape(cells).permute(0, 3, 1, 2) for rows in (objectness, deltas))
        return features, deltas, _TwoScores()(logits)

    def propose(
        self,
        im_data: Tensor,
        im_info: ArrayLike | Tensor,
        gt_boxes: ArrayLike | Tensor | None,
        index: ArrayLike | Tensor,
    ) -> tuple[Tensor, Proposals, Tensor, Targets | None]:
        """What :meth:`forward` gives, in the structures of this package: features, proposals, sizes, ground truth."""
        features = self.features(im_data.to(self.step.device, memory_format=torch.channels_last))
        sizes = _sizes(im_info, len(im_data), features.device)
        targets = None if gt_boxes is None else _targets(gt_boxes, index, sizes)
        if self.training and targets is not None:
            self.step += 1
        proposals, losses = self.network([features], sizes, targets, self.now())
        self.cross_entropy, self.loss_box = losses.get("loss_objectness"), losses.get("loss_rpn_box_reg")
        return features, proposals, sizes, targets

    def now(self) -> Tensor:
        """The step that seeds the sampling: the number of the training step, or 0 in evaluation."""
        return self.step if self.training else torch.zeros_like(self.step)

    def forward(
        self,
        im_data: Tensor,
        im_info: ArrayLike | Tensor,
        gt_boxes: ArrayLike | Tensor | None = None,
        gt_boxes_index: ArrayLike | Tensor = (),
    ) -> tuple[Tensor, Tensor]:
        """Propose, and where there is ground truth set the losses.

        Args:
            im_data: ``(B, 3, H, W)`` float32, normalised.
            im_info: ``(B or 1, 2 or 3)``, height and width of each picture, or of all.
            gt_boxes: ``(G, 4 or 5)``, pixels; a fifth column is the class, -1 for what is to be ignored.
            gt_boxes_index: ``(G,)``, the picture of each box.

        Returns:
            features ``(B, 512, H // 16, W // 16)``, and rois ``(B, P, 5)`` as :class:`ProposalLayer` gives them:
            2,000 with ground truth, 300 without.
        """
        features, proposals, _, _ = self.propose(im_data, im_info, gt_boxes, gt_boxes_index)
        return features, to_rois(proposals)


class _TwoScores(nn.Module):
    """One logit as two scores, whose softmax is its sigmoid."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.cat((-0.5 * logits, 0.5 * logits), 1)


def total(*losses: Tensor | None) -> Tensor:
    """Sum of the losses, ``()``.

    Raises:
        ValueError: one is None, for there was no ground truth yet.
    """
    known = [loss for loss in losses if loss is not None]
    if len(known) < len(losses):
        raise ValueError("there is no loss yet: call the network with gt_boxes first")
    return torch.stack(known).sum()
