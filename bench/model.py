"""The ``tiny`` detector against the same detector built from torchvision's parts.

Both have the same weights, settings and images. The gate: with every anchor and proposal in the loss, so that no
sampling is left to chance, the four losses and the gradients agree, and so do the detections. Then one training step
(forward and backward) and one detection are timed, in turn, with torchvision's parts in both memory formats.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import rcnn
from bench.timing import measure
from rcnn.boxes import iou
from rcnn.config import ModelConfig
from rcnn.structures import Targets

BATCH, HEIGHT, WIDTH = 8, 256, 320  # what the default training run sees: 240 x 320 pixels padded to a multiple of 32
CLASSES = ("rectangle", "ellipse")
PROPOSALS = 100  # of each level of an image where every proposal is in the loss
WARM_STEPS = 20  # of training before anything is compared: fresh weights would time a network that finds nothing


def scenes(seed: int = 0) -> tuple[Tensor, Targets]:
    """A batch of drawn rectangles and ellipses: ``(BATCH, 3, HEIGHT, WIDTH)`` uint8 and its ground truth."""
    random = np.random.default_rng(seed)
    images = random.integers(60, 190, (BATCH, HEIGHT // 8, WIDTH // 8, 3)).repeat(8, 1).repeat(8, 2)
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    boxes, labels, offsets = [], [], [0]
    for image in images:
        for _ in range(random.integers(1, 7)):
            width, height = random.uniform(24, 120, 2)
            left, top = random.uniform(0, WIDTH - width), random.uniform(0, 240 - height)
            label = int(random.integers(1, 3))
            across, down = (x - left) / width * 2 - 1, (y - top) / height * 2 - 1
            reach = np.maximum(abs(across), abs(down)) if label == 1 else np.hypot(across, down)
            image[reach <= 1] = random.integers(0, 256, 3)
            boxes.append([left, top, left + width, top + height])
            labels.append(label)
        offsets.append(len(boxes))
    targets = Targets(
        boxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.tensor(labels),
        offsets=torch.tensor(offsets),
        image_sizes=torch.tensor([[240.0, 320.0]]).repeat(BATCH, 1),
        image_ids=torch.arange(BATCH),
    )
    return torch.from_numpy(images.astype(np.uint8)).permute(0, 3, 1, 2).contiguous(), targets


def peer_of(model: rcnn.FasterRCNN) -> nn.Module:
    """The same detector from torchvision's parts, with the same weights and on the same device."""
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.roi_heads import RoIHeads
    from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.ops import MultiScaleRoIAlign

    class HalfResNet(ResNet):
        """ResNet-18 with half of each channel count."""

        def __init__(self) -> None:
            super().__init__(BasicBlock, [2, 2, 2, 2])
            self.conv1 = nn.Conv2d(3, 32, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(32)

        def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
            if planes == 64:
                self.inplanes = 32
            return super()._make_layer(block, planes // 2, *args, **kwargs)

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            rpn, roi = model.config.rpn, model.config.roi
            body = HalfResNet()
            self.backbone = BackboneWithFPN(body, {f"layer{i}": str(i - 2) for i in (2, 3, 4)}, [64, 128, 256], 64)
            ratios = tuple(rpn.aspect_ratios)
            anchors = AnchorGenerator(tuple(map(tuple, rpn.anchor_sizes)), (ratios,) * len(rpn.anchor_sizes))
            self.rpn = RegionProposalNetwork(
                anchors,
                RPNHead(64, anchors.num_anchors_per_location()[0]),
                rpn.high_threshold,
                rpn.low_threshold,
                rpn.batch_size_per_image,
                rpn.positive_fraction,
                {"training": rpn.pre_nms_top_n_train, "testing": rpn.pre_nms_top_n_test},
                {"training": rpn.post_nms_top_n_train, "testing": rpn.post_nms_top_n_test},
                rpn.nms_threshold,
            )
            self.roi_heads = RoIHeads(
                MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
                TwoMLPHead(64 * 49, 128),
                FastRCNNPredictor(128, len(model.classes) + 1),
                roi.high_threshold,
                roi.low_threshold,
                roi.batch_size_per_image,
                roi.positive_fraction,
                None,
                roi.score_threshold,
                roi.nms_threshold,
                roi.detections_per_image,
            )

        def forward(self, images: Tensor, targets: Targets) -> Any:
            """The losses in training, a list of detections else."""
            pixels = (images.float() - model.mean) / model.std
            if next(self.parameters()).is_contiguous(memory_format=torch.channels_last):
                pixels = pixels.contiguous(memory_format=torch.channels_last)
            truth = None
            if self.training:
                bounds = targets.offsets.tolist()
                rows = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
                truth = [{"boxes": targets.boxes[r], "labels": targets.labels[r]} for r in rows]
            sizes = [tuple(map(int, size)) for size in targets.image_sizes.tolist()]
            features = self.backbone(pixels)
            proposals, rpn_losses = self.rpn(ImageList(pixels, sizes), features, truth)
            detections, roi_losses = self.roi_heads(features, proposals, sizes, truth)
            return {**rpn_losses, **roi_losses} if self.training else detections

        @torch.no_grad()
        def detect(self, images: Tensor, targets: Targets) -> Any:
            """Detections of the batch."""
            return self(images, targets)

    peer = Peer()
    peer.load_state_dict(model.state_dict())
    return peer.to(model.mean.device)


def _step(model: nn.Module, images: Tensor, targets: Targets) -> dict[str, Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    losses: dict[str, Tensor] = model(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    return losses


def _trained(images: Tensor, targets: Targets) -> rcnn.FasterRCNN:
    """The detector after a few steps on the batch itself."""
    torch.manual_seed(0)
    model = rcnn.FasterRCNN(ModelConfig(), CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(WARM_STEPS):
        _step(model, images, targets)
        optimizer.step()
    return model


def anchors_of(model: rcnn.FasterRCNN, height: int, width: int) -> int:
    """Anchors of one image."""
    return sum(-(-height // s) * -(-width // s) for s in model.backbone.strides) * model.rpn.cells.shape[1]


def everything(model: rcnn.FasterRCNN, targets: Targets, anchors: int) -> rcnn.FasterRCNN:
    """The same detector with room for every anchor and every proposal in its losses, and no dropout.

    NMS drops nothing and nothing is cut off after it: torchvision ranks by probabilities, which tie
    where logits do not, and so goes through boxes in another order.
    """
    kept = PROPOSALS * len(model.backbone.strides)
    candidates = kept + len(targets.boxes)
    rpn = replace(
        model.config.rpn,
        pre_nms_top_n_train=PROPOSALS,
        post_nms_top_n_train=kept,
        nms_threshold=1.0,
        batch_size_per_image=2 * anchors,
        allowed_border=-1.0,
    )
    roi = replace(model.config.roi, batch_size_per_image=2 * candidates, positive_fraction=0.5, dropout=0.0)
    whole = rcnn.FasterRCNN(replace(model.config, rpn=rpn, roi=roi), model.classes)
    whole.load_state_dict(model.state_dict())
    return whole.to(model.mean.device)


def differences(whole: rcnn.FasterRCNN, peer: nn.Module, images: Tensor, targets: Targets) -> dict[str, float]:
    """Relative differences of the four losses and of the gradient of two detectors with parameters in one order."""
    ours, theirs = _step(whole.train(), images, targets), _step(peer.train(), images, targets)
    report = {name: abs(float(ours[name].detach() / theirs[name].detach()) - 1) for name in ours}
    pairs = list(zip(whole.parameters(), peer.parameters(), strict=True))
    found, expected = (
        torch.cat([pair[i].grad.flatten() for pair in pairs if pair[i].grad is not None]) for i in (0, 1)
    )
    report["gradient"] = float((found - expected).norm() / expected.norm())
    return report


def gate(model: rcnn.FasterRCNN, images: Tensor, targets: Targets) -> dict[str, float]:
    """Prove that ours and torchvision's parts are the same detector.

    Both use channels_last, hence the same convolutions: what remains is the order of the sums, the longest of which
    goes over the anchors of the batch. (torchvision's gradients in its two memory formats differ by 1e-3.)

    Returns:
        Relative differences of the losses and of the gradient, and the number of detections that were compared.

    Raises:
        AssertionError: they differ by more.
    """
    whole = everything(model, targets, anchors_of(model, HEIGHT, WIDTH))
    peer = peer_of(whole).to(memory_format=torch.channels_last)
    tolerance = BATCH * anchors_of(model, HEIGHT, WIDTH) * torch.finfo(torch.float32).eps
    report = differences(whole, peer, images, targets)
    for name, difference in report.items():
        assert difference <= tolerance, f"{name} differs by {difference:.2g}, more than {tolerance:.2g}"

    peer = peer_of(model).to(memory_format=torch.channels_last)  # with NMS again
    detected = model.eval().detect(images, targets.image_sizes).unpad()
    with torch.no_grad():
        expected_detections = peer.eval()(images, targets)
    compared = 0
    for one, other in zip(detected, expected_detections, strict=True):
        compared += _has(one, other) + _has(other, one)
    return {**report, "detections": compared}


def _has(one: dict[str, Tensor], other: dict[str, Tensor]) -> int:
    """Check that each sure detection of ``one`` is in ``other``, and count them."""
    sure = one["scores"] >= 0.1  # well above the score threshold, where rounding decides
    same = (
        (iou(one["boxes"][sure][:, None], other["boxes"][None]) > 0.99)
        & (one["labels"][sure][:, None] == other["labels"][None])
        & ((one["scores"][sure][:, None] - other["scores"][None]).abs() < 1e-3)
    )
    assert same.any(1).all(), f"{int((~same.any(1)).sum())} detections of one are not found by the other"
    return int(sure.sum())


def run(repeats: int) -> dict[str, Any]:
    """Gate, then times: a training step of the batch, detection of the batch and of one image.

    Args:
        repeats: timed calls of each.

    Returns:
        ``{"gate": differences, "rows": one dict per time}``.
    """
    images, targets = scenes()
    model = _trained(images, targets)
    report = gate(model, images, targets)
    nchw, last = peer_of(model), peer_of(model).to(memory_format=torch.channels_last)
    one = Targets(
        boxes=targets.boxes, labels=targets.labels, offsets=targets.offsets[:2],
        image_sizes=targets.image_sizes[:1], image_ids=targets.image_ids[:1],
    )  # fmt: skip
    peers = {"torchvision": nchw, "torchvision, channels_last": last}

    def train(net: nn.Module) -> Callable[[], Any]:
        return lambda: _step(net, images, targets)

    def detect(net: nn.Module, truth: Targets) -> Callable[[], Any]:
        return lambda: net(images[: len(truth.image_sizes)], truth)

    tasks: dict[str, tuple[int, dict[str, Callable[[], Any]]]] = {
        "training step": (BATCH, {"rcnn": train(model), **{name: train(peer) for name, peer in peers.items()}}),
    }
    for truth in (targets, one):
        count = len(truth.image_sizes)
        tasks[f"detection of {count}"] = (
            count,
            {
                "rcnn": partial(model.detect, images[:count], truth.image_sizes),
                **{name: detect(peer, truth) for name, peer in peers.items()},
            },
        )
    rows = []
    for task, (count, rivals) in tasks.items():
        for net in (model, nchw, last):
            net.train(task == "training step")
        with torch.set_grad_enabled(task == "training step"):
            timings = measure(rivals, repeats)
        for name, timing in timings.items():
            rows.append(
                {
                    "task": task,
                    "images": [count, 3, HEIGHT, WIDTH],
                    "with": name,
                    **asdict(timing),
                    "images_per_second": count / timing.median,
                    "speedup": timings["torchvision"].median / timing.median,
                }
            )
    return {"gate": report, "rows": rows}
