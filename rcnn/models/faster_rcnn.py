"""Faster R-CNN: trunk, region proposal network and RoI head, joined."""

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from rcnn import kernels
from rcnn.config import ModelConfig, given, resolve_model
from rcnn.images import ImageError
from rcnn.models.backbone import build_backbone
from rcnn.models.losses import Normaliser
from rcnn.models.predicting import predictions
from rcnn.models.roi_heads import Pool, RoIHeads
from rcnn.models.rpn import RPN
from rcnn.structures import Detections, Proposals, Targets

#: What :meth:`FasterRCNN.predict` takes as one image.
Picture = str | PathLike[str] | Image.Image | np.ndarray


@dataclass(frozen=True)
class _Architecture:
    """Widths that belong to a model and are no option: RPN channels, hidden units, the pooling."""

    rpn_channels: int
    features: int
    pool: str


_ARCHITECTURES = {
    "tiny": _Architecture(64, 128, "align"),
    "resnet18_fpn": _Architecture(256, 1024, "align"),
    "resnet50_fpn": _Architecture(256, 1024, "align"),
    "vgg16": _Architecture(512, 4096, "pool"),
}

_POOLED = 7  # cells on each side of a pooled region


def _align(features: list[Tensor], rois: Tensor, scales: Sequence[float]) -> Tensor:
    return kernels.multiscale_roi_align(features[: len(scales)], rois, _POOLED, scales, sampling_ratio=2)


def _pool(features: list[Tensor], rois: Tensor, scales: Sequence[float]) -> Tensor:
    return kernels.roi_pool(features[0], rois, _POOLED, scales[0])


class FasterRCNN(nn.Module):
    """A Faster R-CNN detector.

    ``forward`` gives the losses, ``detect`` the detections of a batch, ``predict`` those of pictures.

    Args:
        config: the detector; unset fields take the model's recipe.
        classes: names of the K foreground classes; label k is ``classes[k - 1]``.
        seed: of the sampling of anchors and proposals in training. Initial weights come from torch's own generator.

    Attributes:
        config: the resolved configuration.
        classes: the class names.
        loaded: what came from a file of published weights, one paragraph; empty without one.
        step: ``()`` int64 buffer, training steps taken; it seeds the sampling and advances with each training forward.
            In evaluation mode sampling takes step 0, so that validation losses can be compared.
        normaliser: in training, what the losses divide by; data parallelism sets it, so that the losses of all
            processes have the mean of the whole batch. None: the number of samples at hand.

    Raises:
        ValueError: no class, or two of the same name.

    Source:
        Ren et al., Faster R-CNN (2015); Lin et al., Feature Pyramid Networks (2017). Parameter names are torchvision's.
    """

    def __init__(self, config: ModelConfig, classes: Sequence[str], seed: int = 0) -> None:
        super().__init__()
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"classes must be one or more different names, got {list(classes)}")
        self.config, self.classes, self.loaded = resolve_model(config), list(classes), ""
        self.normaliser: Normaliser | None = None
        architecture = _ARCHITECTURES[self.config.name]
        self.backbone = build_backbone(self.config.name, given(self.config.norm))
        self.backbone.freeze(given(self.config.frozen_stages))
        channels, strides = self.backbone.out_channels, self.backbone.strides
        self.rpn = RPN(channels, architecture.rpn_channels, strides, self.config.rpn, seed)
        pool: Pool
        if architecture.pool == "pool":
            pool = partial(_pool, scales=[1 / strides[0]])
        else:  # the coarsest level only proposes
            pool = partial(_align, scales=[1 / stride for stride in strides[:-1]])
        self.roi_heads = RoIHeads(
            pool, channels * _POOLED**2, architecture.features, len(classes), self.config.roi, seed
        )
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("mean", torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1), persistent=False)
        self.step: Tensor
        self.mean: Tensor
        self.std: Tensor
        self.use_channels_last(True)

    def use_channels_last(self, on: bool) -> None:
        """Keep weights and maps in the order of NHWC, as a new model does, or in that of NCHW."""
        self.backbone.memory_format = torch.channels_last if on else torch.contiguous_format
        self.to(memory_format=self.backbone.memory_format)  # type: ignore[call-overload]

    def compile_layers(self) -> None:
        """Let torch.compile fuse the trunk and the heads; the ops between them stay as they are."""
        for module in (self.backbone, self.rpn.head, self.roi_heads.box_head, self.roi_heads.box_predictor):
            module.compile()

    def _features(self, images: Tensor) -> list[Tensor]:
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if images.dtype == torch.uint8:
            images = images.float()
        elif images.is_floating_point():
            images = images * 255
        else:
            raise ValueError(f"images must be uint8, or floating point in 0..1, got {images.dtype}")
        return self.backbone((images - self.mean) / self.std)

    def forward(self, images: Tensor, targets: Targets) -> dict[str, Tensor]:
        """The four losses of a batch.

        Args:
            images: ``(B, 3, H, W)`` uint8, or float in 0..1; RGB, padded to the right and below.
            targets: ground truth in pixels of ``images``.

        Returns:
            ``{"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"}``, each ``()`` float32; their
            sum is what trains.

        Raises:
            ValueError: shapes or types that do not fit.
        """
        if targets.image_sizes.shape[0] != images.shape[0]:
            raise ValueError(f"targets must be of {images.shape[0]} images, got {targets.image_sizes.shape[0]}")
        if self.training:
            self.step += 1
        return self._losses(self._features(images), targets)[0]

    def _losses(self, features: list[Tensor], targets: Targets) -> tuple[dict[str, Tensor], Proposals]:
        step = self.step if self.training else torch.zeros_like(self.step)
        normaliser = self.normaliser if self.training else None
        proposals, losses = self.rpn(features, targets.image_sizes, targets, step, normaliser)
        return losses | self.roi_heads.losses(features, proposals, targets, step, normaliser), proposals

    @torch.no_grad()
    def validate(self, images: Tensor, targets: Targets) -> tuple[dict[str, Tensor], Detections]:
        """The losses and the detections of a batch from one pass through the trunk; for validation, without gradient.

        Args:
            images: as for :meth:`forward`.
            targets: as for :meth:`forward`.

        Returns:
            What :meth:`forward` and :meth:`detect` give.
        """
        features = self._features(images)
        losses, proposals = self._losses(features, targets)
        rpn = self.config.rpn
        train = rpn.pre_nms_top_n_train, rpn.post_nms_top_n_train
        same = train == (rpn.pre_nms_top_n_test, rpn.post_nms_top_n_test)
        return losses, self._detections(features, targets.image_sizes, proposals if same else None)

    @torch.no_grad()
    def detect(self, images: Tensor, image_sizes: Tensor | None = None) -> Detections:
        """Detections of a batch, in pixels of ``images``.

        Args:
            images: ``(B, 3, H, W)`` uint8, or float in 0..1; RGB, padded to the right and below.
            image_sizes: ``(B, 2)`` float32, height and width of each image without its padding; default: the full size.

        Returns:
            At most ``roi.detections_per_image`` boxes for each image.

        Raises:
            ValueError: shapes or types that do not fit, or the model is in training mode, where batch statistics would
                enter the result and be changed by it.
        """
        features = self._features(images)
        if image_sizes is None:
            # Filled on the device: a tensor made of Python numbers would have to be copied there.
            image_sizes = torch.empty(len(images), 2, device=images.device)
            image_sizes[:, 0], image_sizes[:, 1] = images.shape[-2:]
        return self._detections(features, image_sizes)

    def _detections(
        self, features: list[Tensor], image_sizes: Tensor, proposals: Proposals | None = None
    ) -> Detections:
        if self.training:
            raise ValueError("the model must be in evaluation mode to detect: call eval() first")
        if proposals is None:
            proposals, _ = self.rpn(features, image_sizes, None, self.step)
        return self.roi_heads.detect(features, proposals, image_sizes)

    def predict(
        self,
        inputs: Picture | Iterable[Picture],
        score_threshold: float = 0.5,
        batch_size: int = 8,
        half: bool = False,
    ) -> Any:
        """Detections of pictures, in pixels of the pictures themselves.

        Args:
            inputs: one picture or several of them: a path, a PIL image, or an ``(H, W, 3)`` uint8 RGB array. A batch is
                read while the network is busy with the one before.
            score_threshold: detections with a lower score are left out. The model makes none under its own
                ``roi.score_threshold``.
            batch_size: pictures per pass through the network.
            half: compute the layers in 16 bits: float16 on a GPU, bfloat16 on a CPU.

        Returns:
            For one picture a dict, for several a list of dicts: ``boxes`` ``(n, 4)`` float32 in pixels, ``labels``
            ``(n,)`` int64, ``scores`` ``(n,)`` float32, on the CPU and by falling score, and ``names``, a list of n
            class names.

        Raises:
            ValueError: a picture that cannot be read (the file is named), or a threshold outside 0..1.
        """
        if isinstance(inputs, (str, PathLike, Image.Image, np.ndarray)):
            return self.predict([inputs], score_threshold, batch_size, half)[0]
        results: list[dict[str, Any]] = []
        with closing(self.predict_each(inputs, score_threshold, batch_size, half)) as found:
            for one in found:
                if isinstance(one, ImageError):
                    raise one
                results.append(one[1])
        return results

    def predict_each(
        self, inputs: Iterable[Picture], score_threshold: float = 0.5, batch_size: int = 8, half: bool = False
    ) -> Generator[tuple[np.ndarray, dict[str, Any]] | ImageError, None, None]:
        """:meth:`predict` for any number of pictures, one after another.

        Yields:
            In the order of the inputs, ``(pixels, result)``: the picture as an ``(H, W, 3)`` uint8 RGB array, and the
            dict that :meth:`predict` gives; for one that cannot be read, the error.
        """
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must be between 0 and 1, got {score_threshold}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be greater than 0, got {batch_size}")
        if not isinstance(inputs, Iterable):
            kinds = "a path, a PIL image, an (H, W, 3) uint8 array, or several of them"
            raise ValueError(f"inputs must be {kinds}, got {type(inputs).__name__}")
        return predictions(self, inputs, score_threshold, batch_size, half)
