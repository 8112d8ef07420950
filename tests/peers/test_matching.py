"""Anchors, matching, proposals and detections against torchvision, where we do not knowingly differ.

Known differences, kept out here:

* The low-quality rule: ground truth that overlaps no anchor makes every anchor positive there, none here.
* An image without ground truth is an error of torchvision's ``Matcher``; here all its boxes are negative.
* Ignore regions (COCO crowd, VOC difficult) exist here only.
* A box that is not finite overlaps nothing here; there its IoU is NaN.
* Sampling is by hashed keys here, by ``randperm`` there, so the draws are other ones.
* Ties: the lower index wins here, everywhere; torchvision leaves ties of score to the sort.
"""

import pytest
import torch
from torch import Tensor

torchvision = pytest.importorskip("torchvision")

from torchvision.models.detection._utils import BoxCoder, Matcher  # noqa: E402
from torchvision.models.detection.anchor_utils import AnchorGenerator  # noqa: E402
from torchvision.models.detection.image_list import ImageList  # noqa: E402
from torchvision.models.detection.roi_heads import RoIHeads  # noqa: E402
from torchvision.models.detection.rpn import RegionProposalNetwork  # noqa: E402

from rcnn import boxes as box  # noqa: E402
from rcnn.kernels import _launch  # noqa: E402
from rcnn.kernels.anchors import anchors, cell_anchors  # noqa: E402
from rcnn.kernels.detections import detections  # noqa: E402
from rcnn.kernels.matching import match  # noqa: E402
from rcnn.kernels.proposals import proposals  # noqa: E402
from rcnn.structures import Proposals  # noqa: E402

pytestmark = pytest.mark.usefixtures("device")

EPS = torch.finfo(torch.float32).eps
SCALES, RATIOS, STRIDES = (32, 64, 128, 256), (0.5, 1.0, 2.0), (8, 16, 32, 64)
HEIGHT, WIDTH, IMAGES = 256, 320, 3
SHAPES = [(HEIGHT // stride, WIDTH // stride) for stride in STRIDES]
LEVELS = [3 * height * width for height, width in SHAPES]
SIZES = torch.tensor([[256.0, 320.0], [200.0, 320.0], [256.0, 300.0]])
PAIRS = [(int(height), int(width)) for height, width in SIZES.tolist()]


def grid() -> Tensor:
    return anchors(torch.stack([cell_anchors([size], RATIOS) for size in SCALES]), SHAPES, STRIDES)


def rpn(pre_nms_top_n: int = 300, post_nms_top_n: int = 200) -> RegionProposalNetwork:
    pre, post = {"training": pre_nms_top_n}, {"training": post_nms_top_n}
    return RegionProposalNetwork(None, None, 0.7, 0.3, 256, 0.5, pre, post, 0.7)


def ground_truth(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(count, 2, generator=generator) * 150
    return torch.cat((first, first + 8 + torch.rand(count, 2, generator=generator) * 90), dim=1)


def test_anchors_are_equal() -> None:
    generator = AnchorGenerator(tuple((size,) for size in SCALES), (RATIOS,) * len(SCALES))
    images = ImageList(torch.zeros(1, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)])
    theirs = generator(images, [torch.zeros(1, 1, *shape) for shape in SHAPES])[0]
    assert torch.equal(grid(), theirs)


@pytest.mark.parametrize("sizes", [(32, 64, 128, 256, 512), (20, 33.3)])
@pytest.mark.parametrize("ratios", [(0.5, 1.0, 2.0), (0.3, 3.0)])
def test_cell_anchors_are_equal(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> None:
    assert torch.equal(cell_anchors(sizes, ratios), AnchorGenerator().generate_anchors(sizes, ratios))


@pytest.mark.parametrize("seed", range(5))
def test_anchor_labels_are_equal(seed: int) -> None:
    truth = [ground_truth(count, 10 * seed + count) for count in (1, 4, 30)]
    labels, matched = match(
        grid(),
        torch.cat(truth),
        torch.ones(35, dtype=torch.int64),
        torch.tensor([0, 1, 5, 35]),
        high_threshold=0.7,
        low_threshold=0.3,
        allow_low_quality_matches=True,
    )
    theirs, boxes = rpn().assign_targets_to_anchors([grid()] * IMAGES, [{"boxes": part} for part in truth])
    assert torch.equal(labels.float(), torch.stack(theirs))
    positive = labels == 1
    assert positive.any(dim=1).all()
    assert torch.equal(torch.cat(truth)[matched[positive]], torch.stack(boxes)[positive])


@pytest.mark.parametrize("low_quality", [False, True])
@pytest.mark.parametrize(("high", "low"), [(0.7, 0.3), (0.5, 0.5), (0.5, 0.1)])
def test_the_matcher(high: float, low: float, low_quality: bool) -> None:
    matcher = Matcher(high, low, low_quality)
    generator = torch.Generator().manual_seed(int(100 * high + 10 * low) + low_quality)
    compared = 0
    for case in range(50 if _launch.uses_kernels(torch.empty(0)) else 500):
        count, rows = (int(torch.randint(1, high, (1,), generator=generator)) for high in (300, 30))
        boxes, truth = ground_truth(count, 3 * case), ground_truth(rows, 3 * case + 1)
        if case % 3 == 0:  # near each other, so that the thresholds are met
            boxes = truth[torch.randint(0, rows, (count,), generator=generator)]
            boxes = boxes + torch.randn(count, 4, generator=generator) * 6
        quality = torchvision.ops.box_iou(truth, boxes)
        met = quality.amax(dim=1) > 0
        if low_quality and not met.all():
            truth, quality = truth[met], quality[met]
        if not len(truth):
            continue
        expected = matcher(quality)
        ones = torch.ones(len(truth), dtype=torch.int64)
        offsets = torch.tensor([0, len(truth)])
        labels, matched = match(
            boxes,
            truth,
            ones,
            offsets,
            high_threshold=high,
            low_threshold=low,
            allow_low_quality_matches=low_quality,
        )
        # There, -1 is below the low threshold and -2 between the two.
        assert torch.equal(labels[0], torch.where(expected >= 0, 1, torch.where(expected == -1, 0, -1)))
        assert torch.equal(matched[0], expected.clamp(min=-1))
        compared += int((expected >= 0).sum())
    assert compared > 100


@pytest.mark.parametrize("seed", range(5))
def test_proposal_labels_are_equal(seed: int) -> None:
    truth, found = ground_truth(20, seed), ground_truth(500, seed + 50)
    gt_labels = torch.arange(20) % 7 + 1
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, None, 0.05, 0.5, 100)
    (index,), (theirs,) = heads.assign_targets_to_proposals([found], [truth], [gt_labels])
    labels, matched = match(found, truth, gt_labels, torch.tensor([0, 20]), high_threshold=0.5, low_threshold=0.5)
    positive = labels[0] == 1
    assert positive.any()
    assert torch.equal(positive, theirs > 0)
    assert torch.equal(matched[0, positive], index[positive])


def test_encode_and_decode_are_equal() -> None:
    found, truth = ground_truth(500, 0), ground_truth(500, 1)
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    deltas = box.encode(found, truth, coder.weights)
    assert torch.equal(deltas, coder.encode_single(truth, found))
    # exp may differ in its last bit between vector and scalar code; then a product and a sum, up to 300 pixels.
    torch.testing.assert_close(
        box.decode(deltas, found, coder.weights), coder.decode_single(deltas, found), rtol=0, atol=3 * EPS * 300
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("pre", "post"), [(300, 200), (1000, 1000), (50, 20)])
def test_proposals_are_equal(pre: int, post: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count = sum(LEVELS)
    # All scores differ even after the sigmoid that torchvision sorts by, and moves by eighths give exact boxes.
    order = torch.stack([torch.randperm(count, generator=generator) for _ in range(IMAGES)])
    objectness = order / count * 4 - 2
    deltas = torch.randint(-4, 5, (IMAGES, count, 4), generator=generator) / 8
    deltas[..., 2:] = 0
    decoded = box.decode(deltas, grid())
    boxes, scores = rpn(pre, post).filter_proposals(decoded, objectness, PAIRS, LEVELS)
    ours = proposals(objectness, deltas, grid(), SIZES, LEVELS, pre_nms_top_n=pre, post_nms_top_n=post)
    for b in range(IMAGES):
        rows = int(ours.count[b])
        assert torch.equal(ours.boxes[b, :rows], boxes[b])
        # The same logits through the same function, whose last bit may differ between vector and scalar code.
        torch.testing.assert_close(ours.scores[b, :rows].sigmoid(), scores[b], rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("score", "most"), [(0.05, 100), (0.2, 10)])
def test_detections_are_equal(score: float, most: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    capacity, classes = 150, 6
    logits = 2 * torch.randn(IMAGES * capacity, classes + 1, generator=generator)
    deltas = torch.randint(-2, 3, (IMAGES * capacity, classes + 1, 4), generator=generator).float()
    deltas[..., 2:] = 0
    found = (ground_truth(IMAGES * capacity, seed) / 8).round() * 8
    found = found.reshape(IMAGES, capacity, 4)
    weights = (8.0, 8.0, 4.0, 4.0)
    heads = RoIHeads(None, None, None, 0.5, 0.5, 512, 0.25, weights, score, 0.5, most)
    boxes, scores, labels = heads.postprocess_detections(logits, deltas.flatten(1), list(found), PAIRS)
    ours = detections(
        logits,
        deltas.flatten(1),
        Proposals(found, torch.zeros(IMAGES, capacity), torch.full((IMAGES,), capacity)),
        SIZES,
        score_threshold=score,
        detections_per_image=most,
        box_weights=weights,
    )
    for result, *theirs in zip(ours.unpad(), boxes, scores, labels, strict=True):
        assert torch.equal(result["boxes"], theirs[0])
        # A softmax of 7: exp to 2 ulp above and below the fraction, 6 sums, a division and the difference before exp.
        torch.testing.assert_close(result["scores"], theirs[1], rtol=(8 + 7) * EPS, atol=0)
        assert torch.equal(result["labels"], theirs[2])
