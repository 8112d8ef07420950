"""The classic API: the names that the documentation of anhlt/faster_rcnn shows, as thin views onto this package.

Its tutorial runs with its import lines changed, and the one line that raises there (the checkpoint's name). Class lists
begin with the background, and what is given is moved to where the network lies. New code is better served by
:mod:`rcnn` itself.

The parts live in their rooms: :mod:`rcnn.data.classic`, :mod:`rcnn.models.classic`; here are the door and the rest.
"""

import weakref
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor, nn

from rcnn import checkpoint, images, kernels, viz
from rcnn.config import given
from rcnn.data.classic import (
    BACKGROUND,
    MEAN,
    STD,
    CocoData,
    CocoGenerator,
    Enqueuer,
    VOCDetection,
    convert_data,
    make_blob,
)
from rcnn.models.classic import (
    CHANNELS,
    RECIPE,
    RPN,
    SEED,
    STRIDE,
    AnchorTargerLayer,
    AnchorTargetLayer,
    ProposalLayer,
    to_rois,
    total,
)
from rcnn.models.losses import roi_losses
from rcnn.models.roi_heads import BOX_WEIGHTS, RoIHeads
from rcnn.models.weights import load_published
from rcnn.tracking import Events

__all__ = [
    "AnchorTargerLayer",
    "AnchorTargetLayer",
    "AverageMeter",
    "CocoData",
    "CocoGenerator",
    "CrayonClient",
    "Enqueuer",
    "FastRCNN",
    "ProposalLayer",
    "RPN",
    "VOCDetection",
    "convert_data",
    "imshow",
    "result_show",
]

_POOLED = 7  # cells on a side of a pooled region


def _pool(features: list[Tensor], rois: Tensor) -> Tensor:
    return kernels.roi_pool(features[0], rois, _POOLED, 1 / STRIDE)


class FastRCNN(nn.Module):
    """Faster R-CNN on VGG-16.

    Args:
        classes: names, the background first, as ``VOCDetection(...).classes``.
        debug: print after each call with ground truth how many rois are objects and how many of those are recognised.
        weights: file of torchvision's VGG-16 for ImageNet, ``.pth`` or ``.safetensors``; its first two blocks then do
            not train. The original downloaded such weights; without them everything trains from random values.
        hidden: units of each of the two fully connected layers; published weights are for 4,096.

    Attributes:
        rpn: the :class:`RPN`.
        cross_entropy: ``()`` loss of the classes in the last call with ground truth, else None.
        loss_box: ``()`` loss of the boxes, likewise.
        SCALES: what the shorter side of a picture becomes in :meth:`detect`, pixels.
        MAX_SIZE: what the longer side may become at most, pixels.

    Raises:
        ValueError: the first class is not the background, there is no other, or two are the same.
    """

    SCALES = (600,)
    MAX_SIZE = 1000

    def __init__(
        self,
        classes: Sequence[str],
        debug: bool = False,
        weights: str | PathLike[str] | None = None,
        hidden: int = 4096,
    ) -> None:
        super().__init__()
        self.classes, self.debug = [str(name) for name in classes], debug
        if self.classes[:1] != [BACKGROUND] or len(set(self.classes)) != len(self.classes) or len(self.classes) < 2:
            raise ValueError(f"classes must be {BACKGROUND!r} and then different names, got {self.classes}")
        self.rpn = RPN(0 if weights is None else given(RECIPE.frozen_stages))
        size = CHANNELS * _POOLED**2
        self.roi_heads = RoIHeads(_pool, size, hidden, len(self.classes) - 1, RECIPE.roi, SEED)
        self.cross_entropy: Tensor | None = None
        self.loss_box: Tensor | None = None
        if weights is not None:
            room = nn.ModuleDict({"body": nn.ModuleDict({"features": self.rpn.features}), "roi_heads": self.roi_heads})
            load_published(room, checkpoint.read_weights(weights), str(weights))

    @property
    def loss(self) -> Tensor:
        """The sum of all four losses, ``()``: the two of this network and ``rpn.loss``."""
        return total(self.cross_entropy, self.loss_box, self.rpn.loss)

    def forward(
        self,
        im_data: Tensor,
        im_info: ArrayLike | Tensor,
        gt_boxes: ArrayLike | Tensor | None = None,
        gt_boxes_index: ArrayLike | Tensor = (),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Classify rois: those drawn for the losses where there is ground truth (128 a picture), else all proposals.

        With ground truth, in training and in evaluation, ``loss``, ``cross_entropy``, ``loss_box`` and ``rpn.loss``
        are set.

        Args:
            im_data: ``(B, 3, H, W)`` float32, normalised.
            im_info: ``(B or 1, 2 or 3)``, height and width of each picture, or of all.
            gt_boxes: ``(G, 5)``, x1, y1, x2, y2 in pixels and the class, -1 for what is to be ignored.
            gt_boxes_index: ``(G,)``, the picture of each box.

        Returns:
            cls_prob ``(R, K + 1)``, bbox_pred ``(R, 4 * (K + 1))``, deltas times (10, 10, 5, 5), and rois ``(R, 5)``:
            picture, x1, y1, x2, y2. Rows of a picture that are not used are zeros behind the others.
        """
        features, proposals, _, targets = self.rpn.propose(im_data, im_info, gt_boxes, gt_boxes_index)
        heads, cfg = self.roi_heads, RECIPE.roi
        if targets is None:
            self.cross_entropy = self.loss_box = None
            rois = to_rois(proposals).reshape(-1, 5)
            logits, deltas = heads.box_predictor(heads.box_head(heads.pool([features], rois)))
            return logits.softmax(1), deltas, rois
        samples = kernels.match_proposals(
            proposals,
            targets,
            seed=SEED,
            step=self.rpn.now(),
            high_threshold=cfg.high_threshold,
            low_threshold=cfg.low_threshold,
            batch_size_per_image=given(cfg.batch_size_per_image),
            positive_fraction=cfg.positive_fraction,
            box_weights=BOX_WEIGHTS,
        )
        logits, deltas = heads.box_predictor(heads.box_head(heads.pool([features], samples.rois)))
        self.cross_entropy, self.loss_box = roi_losses(logits, deltas, samples)
        if self.debug:
            objects = samples.labels > 0
            right = int((logits.argmax(1) == samples.labels)[objects].sum())
            print(
                f"rois: {int((samples.labels == 0).sum())} background, {int(objects.sum())} objects, {right} recognised"
            )
        return logits.softmax(1), deltas, samples.rois

    @torch.no_grad()
    def detect(
        self, image: str | PathLike[str] | Image.Image | np.ndarray, thr: float = 0.5
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Tensor]:
        """Find objects in a picture.

        Args:
            image: a path, a PIL image or an ``(H, W, 3)`` uint8 RGB array.
            thr: lowest score.

        Returns:
            pred_boxes ``(n, 4)`` float32 in pixels of the blob, scores ``(n,)``, classes ``(n,)`` names, best first;
            rois ``(m, 4)``, the proposals; and blob ``(1, 3, H, W)``, the picture as the network saw it.
        """
        blob = make_blob(images.to_array(image), str(image), self.SCALES[0], self.MAX_SIZE)
        training = self.training
        self.eval()
        try:
            features, proposals, sizes, _ = self.rpn.propose(blob["tensor"], blob["im_info"], None, ())
            found = self.roi_heads.detect([features], proposals, sizes).to("cpu").unpad()[0]
        finally:
            self.train(training)
        keep = found["scores"] >= thr
        names = np.array([self.classes[label] for label in found["labels"][keep].tolist()], dtype=str)
        rois = proposals.boxes[0, : int(proposals.count[0])].cpu().numpy()
        return found["boxes"][keep].numpy(), found["scores"][keep].numpy(), names, rois, blob["tensor"]


class AverageMeter:
    """The latest value and the mean of all: ``val``, ``sum``, ``count``, ``avg``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all values."""
        self.val, self.sum, self.count, self.avg = 0.0, 0.0, 0, 0.0

    def update(self, val: float, n: int = 1) -> None:
        """Add a value that is the mean of ``n``."""
        self.val, self.sum, self.count = val, self.sum + val * n, self.count + n
        self.avg = self.sum / self.count


class CrayonClient:
    """Writes scalars for TensorBoard; there is no crayon server to talk to, and none is needed.

    Args:
        hostname: not used.
        port: not used.
        folder: where each experiment gets a folder of its own; ``tensorboard --logdir`` shows it.
    """

    def __init__(self, hostname: str = "localhost", port: int = 8889, folder: str | PathLike[str] = "runs") -> None:
        self.folder = Path(folder)

    def create_experiment(self, xp_name: str) -> "CrayonExperiment":
        """The experiment of that name, begun or continued."""
        return CrayonExperiment(self.folder / xp_name)


class CrayonExperiment:
    """One run in TensorBoard, made by :meth:`CrayonClient.create_experiment`."""

    def __init__(self, folder: Path) -> None:
        self._events = Events(folder)
        weakref.finalize(self, self._events.close)  # or at the end of the program
        self._next: dict[str, int] = {}

    def add_scalar_value(self, name: str, value: float, wall_time: float = -1, step: int = -1) -> None:
        """Write a value; ``step`` -1 comes after the last of that name, ``wall_time`` -1 is now."""
        step = self._next.get(name, 0) if step == -1 else step
        self._next[name] = step + 1
        self._events.add_scalar(name, value, step, None if wall_time == -1 else wall_time)
        self._events.flush()


def imshow(inp: Tensor, gt_boxes: ArrayLike = (), predict_boxes: ArrayLike = (), random: bool = False) -> Image.Image:
    """A normalised ``(3, H, W)`` tensor as a picture with boxes; a notebook shows it, ``.show()`` does elsewhere.

    Args:
        inp: as ``blob["tensor"][0]``.
        gt_boxes: ``(n, 4)``, pixels.
        predict_boxes: ``(m, 4)``, pixels.
        random: a colour of its own for each predicted box.
    """
    both = [
        np.asarray(some, np.float64).reshape(-1, np.shape(some)[-1] if np.size(some) else 4)[:, :4]
        for some in (gt_boxes, predict_boxes)
    ]
    names = ["truth"] * len(both[0]) + [f"found {i}" if random else "found" for i in range(1, len(both[1]) + 1)]
    return viz.draw_boxes(_pixels(inp), np.concatenate(both), names, classes=["truth", *dict.fromkeys(names)])


def result_show(
    inp: Tensor,
    predicted_boxes: ArrayLike = (),
    classes: Sequence[str] = (),
    scores: ArrayLike = (),
    mapping_name: dict[int, str] | None = None,
) -> Image.Image:
    """What :meth:`FastRCNN.detect` found, on the picture; a notebook shows it, ``.show()`` does elsewhere.

    Args:
        inp: ``(3, H, W)`` normalised, ``blob[0]``.
        predicted_boxes: ``(n, 4)``, pixels.
        classes: ``n`` names.
        scores: ``(n,)``.
        mapping_name: names to show, where ``classes`` are numbers.
    """
    names = [str(one) if mapping_name is None else mapping_name[int(one)] for one in classes]
    return viz.draw_boxes(_pixels(inp), predicted_boxes, names, scores)


def _pixels(tensor: Tensor) -> np.ndarray:
    rgb = (tensor.detach().cpu() * STD + MEAN).clamp(0, 1) * 255
    return rgb.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
