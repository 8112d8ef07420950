"""RoI head: pool each proposal, classify it and refine its box."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcnn import kernels
from rcnn.config import RoIConfig, given
from rcnn.models.losses import Normaliser, roi_losses
from rcnn.structures import Detections, Proposals, Targets

#: Factors of dx, dy, dw, dh in the RoI head (Fast R-CNN's normalisation of the targets by 0.1, 0.1, 0.2, 0.2).
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)

#: Pools regions: feature maps and ``(R, 5)`` rois to ``(R, C, height, width)``.
Pool = Callable[[list[Tensor], Tensor], Tensor]


class TwoFCHead(nn.Module):
    """Two fully connected layers with ReLU, and dropout where the model has it. Parameters carry torchvision's names.

    Args:
        in_features: channels times the cells of a pooled region.
        features: units of each layer.
        dropout: share of the units dropped in training.
    """

    def __init__(self, in_features: int, features: int, dropout: float) -> None:
        super().__init__()
        self.fc6 = nn.Linear(in_features, features)
        self.fc7 = nn.Linear(features, features)
        self.dropout = dropout

    def forward(self, pooled: Tensor) -> Tensor:
        """``(R, C, height, width)`` pooled regions to ``(R, features)``."""
        hidden = F.dropout(F.relu(self.fc6(pooled.flatten(1))), self.dropout, self.training)
        return F.dropout(F.relu(self.fc7(hidden)), self.dropout, self.training)


class BoxPredictor(nn.Module):
    """Class logits and per-class deltas. Parameters carry torchvision's names.

    Args:
        in_features: of the head before it.
        num_classes: foreground classes K.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, (num_classes + 1) * 4)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``(R, in_features)`` to ``(R, K + 1)`` logits and ``(R, (K + 1) * 4)`` deltas."""
        return self.cls_score(hidden), self.bbox_pred(hidden)


class RoIHeads(nn.Module):
    """The second stage.

    Args:
        pool: RoI Align or RoI pooling over the model's feature maps.
        in_features: channels times the cells of a pooled region.
        features: units of the two hidden layers.
        num_classes: foreground classes K.
        config: resolved configuration.
        seed: of the sampling.
    """

    def __init__(
        self, pool: Pool, in_features: int, features: int, num_classes: int, config: RoIConfig, seed: int
    ) -> None:
        super().__init__()
        self.pool, self.config, self.seed = pool, config, seed
        self.box_head = TwoFCHead(in_features, features, given(config.dropout))
        self.box_predictor = BoxPredictor(features, num_classes)

    def losses(
        self,
        features: list[Tensor],
        proposals: Proposals,
        targets: Targets,
        step: Tensor,
        normaliser: Normaliser | None = None,
    ) -> dict[str, Tensor]:
        """``{"loss_classifier", "loss_box_reg"}`` over rois sampled from the proposals and the ground truth.

        Args:
            features: maps ``(B, C, H_l, W_l)``.
            proposals: of the region proposal network.
            targets: ground truth.
            step: ``()`` int64, number of the training step; it seeds the sampling.
            normaliser: see :func:`rcnn.models.losses.roi_losses`.
        """
        config = self.config
        samples = kernels.match_proposals(
            proposals,
            targets,
            seed=self.seed,
            step=step,
            high_threshold=config.high_threshold,
            low_threshold=config.low_threshold,
            batch_size_per_image=given(config.batch_size_per_image),
            positive_fraction=config.positive_fraction,
            box_weights=BOX_WEIGHTS,
        )
        logits, deltas = self.box_predictor(self.box_head(self.pool(features, samples.rois)))
        loss_classifier, loss_box = roi_losses(logits, deltas, samples, normaliser)
        return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box}

    def detect(self, features: list[Tensor], proposals: Proposals, image_sizes: Tensor) -> Detections:
        """Classify and refine every proposal.

        Args:
            features: maps ``(B, C, H_l, W_l)``.
            proposals: of the region proposal network.
            image_sizes: ``(B, 2)`` float32, height and width of each image, pixels.

        Returns:
            Boxes in pixels of the network input.
        """
        config = self.config
        batch, capacity = proposals.scores.shape
        image = torch.arange(batch, device=proposals.boxes.device, dtype=torch.float32)
        rois = torch.cat((image[:, None, None].expand(-1, capacity, 1), proposals.boxes), 2).reshape(-1, 5)
        logits, deltas = self.box_predictor(self.box_head(self.pool(features, rois)))
        return kernels.detections(
            logits,
            deltas,
            proposals,
            image_sizes,
            score_threshold=given(config.score_threshold),
            iou_threshold=config.nms_threshold,
            detections_per_image=config.detections_per_image,
            box_weights=BOX_WEIGHTS,
        )
