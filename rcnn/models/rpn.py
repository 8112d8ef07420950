"""Region proposal network: a small convolutional head on every pyramid level, and the proposals made from it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcnn import kernels
from rcnn.config import RPNConfig, given
from rcnn.models.convolution import conv_relu
from rcnn.models.losses import Normaliser, rpn_losses
from rcnn.structures import Proposals, Targets


class RPNHead(nn.Module):
    """A 3x3 convolution with ReLU, then 1x1 convolutions to one logit and four deltas per anchor.

    Parameters carry torchvision's names.

    Args:
        in_channels: of the feature maps.
        channels: of the hidden convolution.
        num_anchors: per cell.
    """

    def __init__(self, in_channels: int, channels: int, num_anchors: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)))
        self.cls_logits = nn.Conv2d(channels, num_anchors, 1)
        self.bbox_pred = nn.Conv2d(channels, num_anchors * 4, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Objectness and deltas of every anchor.

        Args:
            features: L maps ``(B, C, H_l, W_l)``.

        Returns:
            ``(B, N)`` logits and ``(B, N, 4)`` deltas, ordered as :func:`rcnn.kernels.anchors`: level, y, x, anchor.
        """
        conv = self.conv[0][0]  # type: ignore[index]
        # Flat in the order that they have in memory: their gradients then have it, too, which DDP asks for.
        order = (0, 2, 3, 1) if conv.weight.is_contiguous(memory_format=torch.channels_last) else (0, 1, 2, 3)
        weight = torch.cat([each.weight.permute(order).flatten(1) for each in (self.cls_logits, self.bbox_pred)])
        bias = torch.cat((self.cls_logits.bias, self.bbox_pred.bias))  # type: ignore[arg-type]
        # One product for both, with rows of zeros up to the multiple of 8 that tensor cores take.
        missing = -len(bias) % 8
        weight, bias = F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing))
        outputs = []
        for feature in features:
            hidden = conv_relu(feature, conv.weight, conv.bias, padding=(1, 1))
            outputs.append(F.linear(hidden.permute(0, 2, 3, 1), weight, bias).flatten(1, 2))
        cells, anchors = torch.cat(outputs, 1), self.cls_logits.out_channels
        deltas = cells[..., anchors : 5 * anchors]
        return cells[..., :anchors].flatten(1), deltas.reshape(len(cells), -1, 4)


class RPN(nn.Module):
    """Region proposal network.

    Args:
        in_channels: of the feature maps.
        channels: of the head's hidden convolution.
        strides: pixels per cell of each level.
        config: resolved configuration.
        seed: of the sampling.
    """

    def __init__(self, in_channels: int, channels: int, strides: list[int], config: RPNConfig, seed: int) -> None:
        super().__init__()
        sizes, ratios = given(config.anchor_sizes), given(config.aspect_ratios)
        if len(sizes) != len(strides):
            raise ValueError(
                f"model.rpn.anchor_sizes must have one list for each of the {len(strides)} levels, got {len(sizes)}"
            )
        if len({len(level) for level in sizes}) != 1:
            raise ValueError(f"model.rpn.anchor_sizes must have as many sizes on each level, got {sizes}")
        self.config, self.strides, self.seed = config, strides, seed
        cells = torch.stack([kernels.cell_anchors(level, ratios) for level in sizes])
        self.register_buffer("cells", cells, persistent=False)
        self.cells: Tensor
        self.head = RPNHead(in_channels, channels, cells.shape[1])

    def forward(
        self,
        features: list[Tensor],
        image_sizes: Tensor,
        targets: Targets | None,
        step: Tensor,
        normaliser: Normaliser | None = None,
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals, and the losses where there are targets.

        Args:
            features: L maps ``(B, C, H_l, W_l)``.
            image_sizes: ``(B, 2)`` float32, height and width of each image, pixels.
            targets: ground truth, or None in detection.
            step: ``()`` int64, number of the training step; it seeds the sampling.
            normaliser: see :func:`rcnn.models.losses.rpn_losses`.

        Returns:
            The proposals (without gradient) and ``{"loss_objectness", "loss_rpn_box_reg"}`` (empty without targets).
        """
        config = self.config
        shapes = [(feature.shape[-2], feature.shape[-1]) for feature in features]
        anchors = kernels.anchors(self.cells, shapes, self.strides)
        objectness, deltas = self.head(features)
        pre, post = config.pre_nms_top_n_test, config.post_nms_top_n_test
        if targets is not None:
            pre, post = config.pre_nms_top_n_train, config.post_nms_top_n_train
        proposals = kernels.proposals(
            objectness.detach(),
            deltas.detach(),
            anchors,
            image_sizes,
            [height * width * self.cells.shape[1] for height, width in shapes],
            pre_nms_top_n=given(pre),
            post_nms_top_n=given(post),
            iou_threshold=config.nms_threshold,
        )
        if targets is None:
            return proposals, {}
        border = config.allowed_border
        samples = kernels.match_anchors(
            anchors,
            targets,
            seed=self.seed,
            step=step,
            high_threshold=config.high_threshold,
            low_threshold=config.low_threshold,
            batch_size_per_image=given(config.batch_size_per_image),
            positive_fraction=config.positive_fraction,
            allowed_border=None if border is None or border < 0 else border,
        )
        loss_objectness, loss_box = rpn_losses(objectness, deltas, samples, normaliser)
        return proposals, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}
