"""torchvision's Faster R-CNN with the settings and the weights of one of ours."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rcnn
from rcnn.models.roi_heads import TwoFCHead
from rcnn.structures import Targets


def torchvision_model(model: rcnn.FasterRCNN, height: int, width: int) -> nn.Module:
    """torchvision's ``FasterRCNN`` over a ResNet-50 with a pyramid, or over VGG-16 with RoI pooling.

    The first is ``fasterrcnn_resnet50_fpn`` as it is with published weights: frozen norms, two frozen stages.

    Args:
        model: ``resnet50_fpn`` or ``vgg16``, whose weights are taken; the same parameters train.
        height: of the images, pixels; they keep their size.
        width: of the images, pixels.
    """
    from torchvision.models import vgg16
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    rpn, roi, classes = model.config.rpn, model.config.roi, len(model.classes) + 1
    sizes = tuple(map(tuple, rpn.anchor_sizes))
    settings: dict[str, Any] = {
        "min_size": min(height, width),
        "max_size": max(height, width),
        "rpn_anchor_generator": AnchorGenerator(sizes, (tuple(rpn.aspect_ratios),) * len(sizes)),
        "rpn_pre_nms_top_n_train": rpn.pre_nms_top_n_train,
        "rpn_pre_nms_top_n_test": rpn.pre_nms_top_n_test,
        "rpn_post_nms_top_n_train": rpn.post_nms_top_n_train,
        "rpn_post_nms_top_n_test": rpn.post_nms_top_n_test,
        "rpn_nms_thresh": rpn.nms_threshold,
        "rpn_batch_size_per_image": rpn.batch_size_per_image,
        "box_batch_size_per_image": roi.batch_size_per_image,
        "box_positive_fraction": roi.positive_fraction,
        "box_score_thresh": roi.score_threshold,
    }
    if model.config.name == "vgg16":
        trunk: Any = vgg16().features[:30]
        trunk.out_channels = 512
        hidden = TwoFCHead(512 * 49, 4096, roi.dropout or 0.0)
        net = FasterRCNN(trunk, **settings, box_head=hidden, box_predictor=FastRCNNPredictor(4096, classes))
        net.roi_heads.box_roi_pool = _RoIPool()
    else:
        trunk = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
        net = FasterRCNN(trunk, classes, **settings)

    def theirs(name: str) -> str:
        return name.replace("backbone.body.features.", "backbone.") if model.config.name == "vgg16" else name

    net.load_state_dict({theirs(name): value for name, value in model.state_dict().items()})
    trains = {theirs(name): parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(trains[name])
    return net.to(model.mean.device)


class _RoIPool(nn.Module):
    """torchvision's RoI pooling where its detectors take RoI Align."""

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], _: list[tuple[int, int]]) -> Tensor:
        from torchvision.ops import roi_pool

        pooled: Tensor = roi_pool(features["0"], boxes, 7, 1 / 16)
        return pooled


@dataclass(frozen=True)
class Lists:
    """A batch as torchvision takes it.

    Attributes:
        images: ``(3, H_b, W_b)`` float in 0..1 each, without padding.
        truth: ``{"boxes", "labels"}`` each.
    """

    images: Sequence[Tensor]
    truth: Sequence[dict[str, Tensor]]

    @staticmethod
    def of(images: Tensor, targets: Targets) -> "Lists":
        """The same batch; this waits for the device."""
        pixels = [
            image[:, : int(height), : int(width)].float() / 255
            for image, (height, width) in zip(images, targets.image_sizes.tolist(), strict=True)
        ]
        bounds = targets.offsets.tolist()
        rows = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        return Lists(pixels, [{"boxes": targets.boxes[r], "labels": targets.labels[r]} for r in rows])


class Peer(nn.Module):
    """A torchvision detector that is called as ours is.

    Args:
        net: the detector.
        lists: what it computes on whatever it is given: made once, as a loader of torchvision's would.
    """

    def __init__(self, net: nn.Module, lists: Lists) -> None:
        super().__init__()
        self.net, self.lists = net, lists

    def forward(self, images: Tensor, targets: Targets) -> Any:
        """The losses in training, a list of detections else."""
        return self.net(self.lists.images, self.lists.truth if self.training else None)

    @torch.no_grad()
    def detect(self, images: Tensor, image_sizes: Tensor) -> Any:
        """Detections of the batch."""
        return self.net(self.lists.images)
