"""The four losses of Faster R-CNN, over samples of fixed shape whose padding has no weight."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from rcnn.structures import AnchorSamples, Samples

#: Where smooth L1 turns from quadratic to linear (torchvision's value; 1 / sigma^2 with sigma = 3 in py-faster-rcnn).
BETA = 1.0 / 9

#: Turns the number of samples at hand, ``()``, into the one to divide by: the mean over those who share a batch.
Normaliser = Callable[[Tensor], Tensor]


def rpn_losses(
    objectness: Tensor, deltas: Tensor, samples: AnchorSamples, normaliser: Normaliser | None = None
) -> tuple[Tensor, Tensor]:
    """Losses of the region proposal network, each a sum over the sampled anchors divided by their number.

    Args:
        objectness: ``(B, N)`` float, logit of each anchor.
        deltas: ``(B, N, 4)`` float, predicted deltas of each anchor.
        samples: the sampled anchors.
        normaliser: None divides by the number at hand.

    Returns:
        ``()`` float32 ``loss_objectness`` (binary cross-entropy) and ``()`` float32 ``loss_rpn_box_reg`` (smooth L1 of
        the positives). A batch without any sample gives zeros that still have a gradient.

    Source:
        Ren et al. (2015), equation 1, normalised as in torchvision.
    """
    logits = objectness.gather(1, samples.index).float()
    predicted = deltas.gather(1, samples.index[..., None].expand(-1, -1, 4)).float()
    used, positive = samples.labels >= 0, samples.labels == 1
    number = _number(used.sum(), normaliser)
    entropy = F.binary_cross_entropy_with_logits(logits, positive.float(), reduction="none")
    box = F.smooth_l1_loss(predicted, samples.deltas, reduction="none", beta=BETA)
    return (entropy * used).sum() / number, (box * positive[..., None]).sum() / number


def roi_losses(
    logits: Tensor, deltas: Tensor, samples: Samples, normaliser: Normaliser | None = None
) -> tuple[Tensor, Tensor]:
    """Losses of the RoI head, each a sum over the sampled rois divided by their number.

    Args:
        logits: ``(R, K + 1)`` float, class logits, background first.
        deltas: ``(R, (K + 1) * 4)`` float, deltas for each class.
        samples: the sampled rois, R rows.
        normaliser: None divides by the number at hand.

    Returns:
        ``()`` float32 ``loss_classifier`` (cross-entropy) and ``()`` float32 ``loss_box_reg`` (smooth L1 of the deltas
        of the true class of each positive). A batch without any sample gives zeros that still have a gradient.

    Source:
        Girshick, Fast R-CNN (2015), section 2.3, normalised as in torchvision.
    """
    number = _number(samples.weights.sum(), normaliser)
    labels = samples.labels.clamp(min=0)
    entropy = F.cross_entropy(logits.float(), labels, reduction="none") * samples.weights
    column = labels[:, None, None].expand(-1, 1, 4)
    predicted = deltas.reshape(len(labels), -1, 4).gather(1, column)[:, 0].float()
    box = F.smooth_l1_loss(predicted, samples.deltas, reduction="none", beta=BETA)
    return entropy.sum() / number, (box * (samples.labels > 0)[:, None]).sum() / number


def _number(count: Tensor, normaliser: Normaliser | None) -> Tensor:
    # Over several processes the mean may be a fraction: no sample at all is what must not divide by zero.
    return count.clamp(min=1) if normaliser is None else normaliser(count).clamp(min=1 / 2**20)
