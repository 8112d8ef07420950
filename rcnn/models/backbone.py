"""From normalised images to the feature maps that the two heads read: a trunk, with or without a pyramid on it."""

import torch
from torch import Tensor, nn

from rcnn.models.fpn import FPN
from rcnn.models.resnet import Norm, ResNet, resnet18, resnet50
from rcnn.models.vgg import VGG16, vgg16


class Backbone(nn.Module):
    """A trunk (``body``) and, unless ``fpn`` is None, a pyramid over its last maps.

    The names are those of torchvision's detection checkpoints: ``backbone.body.conv1.weight``,
    ``backbone.fpn.inner_blocks.0.0.weight``.

    Args:
        body: the trunk.
        fpn: reads as many of the trunk's last maps as it has lateral convolutions.

    Attributes:
        out_channels: of every level.
        strides: of every level, input pixels per cell, finest first; the pyramid's extra level included.
        memory_format: of all maps; channels_last is the quick one.
    """

    def __init__(self, body: ResNet | VGG16, fpn: FPN | None = None) -> None:
        super().__init__()
        self.body, self.fpn = body, fpn
        self.memory_format = torch.channels_last
        if fpn is None:
            self.used = 1
            self.out_channels, self.strides = body.channels[-1], body.strides[-1:]
        else:
            self.used = len(fpn.inner_blocks)
            self.out_channels, self.strides = fpn.out_channels, body.strides[-self.used :]
            if fpn.extra:
                self.strides = [*self.strides, 2 * self.strides[-1]]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Feature maps.

        Args:
            images: ``(B, 3, H, W)`` float, normalised; turned to the memory format.

        Returns:
            One ``(B, out_channels, H_l, W_l)`` float map, in the memory format, for each of ``strides``.
        """
        maps = self.body(images.contiguous(memory_format=self.memory_format))[-self.used :]
        return maps if self.fpn is None else self.fpn(maps)

    def freeze(self, stages: int) -> None:
        """Take the trunk's first ``stages`` stages out of training."""
        self.body.freeze(stages)


def build_backbone(name: str, norm: Norm = "batch") -> Backbone:
    """The backbone of a named model, with random weights in channels_last format.

    Args:
        name: ``tiny`` (half-width ResNet-18, 64-channel pyramid P3..P6), ``resnet18_fpn``, ``resnet50_fpn``
            (256-channel pyramids P2..P6) or ``vgg16`` (one 512-channel map at stride 16).
        norm: of the ResNets. ``frozen`` is for published weights; from scratch it cannot learn, take ``batch``.

    Raises:
        ValueError: the name is not known.
    """
    if name == "tiny":
        body = resnet18(32, norm)
        backbone = Backbone(body, FPN(body.channels[1:], 64))
    elif name in ("resnet18_fpn", "resnet50_fpn"):
        body = resnet18(norm=norm) if name == "resnet18_fpn" else resnet50(norm)
        backbone = Backbone(body, FPN(body.channels))
    elif name == "vgg16":
        backbone = Backbone(vgg16())
    else:
        raise ValueError(f"the backbone must be one of tiny, resnet18_fpn, resnet50_fpn, vgg16, got {name!r}")
    return backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
