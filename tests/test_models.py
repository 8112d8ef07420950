"""The joined detector: losses, detection, over-fitting, and a training step pinned to its losses."""

import numpy as np
import pytest
import torch
from PIL import Image

from rcnn import images as pictures
from rcnn.boxes import iou
from rcnn.config import RECIPES, ModelConfig, RoIConfig, RPNConfig
from rcnn.detector import build
from rcnn.models.losses import BETA, roi_losses, rpn_losses
from rcnn.models.rpn import RPNHead
from rcnn.optim import make_optimizer
from rcnn.structures import AnchorSamples, Samples, Targets


def make_targets(boxes, labels, sizes, capacity=0):
    """Targets from per-image lists, with ``capacity`` further rows of padding."""
    counts = [len(one) for one in boxes]
    flat = torch.tensor([box for one in boxes for box in one], dtype=torch.float32).reshape(-1, 4)
    names = torch.tensor([k for one in labels for k in one], dtype=torch.int64)
    return Targets(
        boxes=torch.cat((flat, torch.full((capacity, 4), 7.0))),
        labels=torch.cat((names, torch.ones(capacity, dtype=torch.int64))),
        offsets=torch.tensor([0, *np.cumsum(counts)]),
        image_sizes=torch.tensor(sizes, dtype=torch.float32),
        image_ids=torch.arange(len(boxes)),
    )


def small(name):
    """A model at the smallest size that still has every part."""
    return build(ModelConfig(name=name, frozen_stages=0, min_size=64, max_size=96), ["a", "b"])


def scene():
    """Two images of 96 x 128 with a bright and a dark square on noise."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(90, 120, (2, 3, 96, 128), generator=generator, dtype=torch.uint8)
    boxes = [[[10, 20, 50, 60], [70, 40, 110, 90]], [[40, 30, 90, 80]]]
    labels = [[1, 2], [2]]
    for image, its_boxes, its_labels in zip(images, boxes, labels, strict=True):
        for (x1, y1, x2, y2), label in zip(its_boxes, its_labels, strict=True):
            image[:, y1:y2, x1:x2] = 230 if label == 1 else 10
    return images, boxes, labels, make_targets(boxes, labels, [(96, 128)] * 2)


def test_rpn_losses_by_hand():
    # One image, two anchors in the loss (positive at index 2, negative at 0) and one row of padding.
    objectness, deltas = torch.tensor([[0.0, 5.0, 0.0]]), torch.zeros(1, 3, 4)
    deltas[0, 2] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    samples = AnchorSamples(
        index=torch.tensor([[2, 0, 0]]), labels=torch.tensor([[1, 0, -1]]), deltas=torch.zeros(1, 3, 4)
    )
    entropy, box = rpn_losses(objectness, deltas, samples)
    assert entropy.item() == pytest.approx(np.log(2))  # both logits 0: log 2 each, mean over the two
    assert box.item() == pytest.approx((1 - BETA / 2) / 2)  # |1| - beta / 2 in one coordinate, over two samples


def test_roi_losses_by_hand():
    logits, deltas = torch.zeros(3, 3), torch.zeros(3, 12)
    deltas[0, 8] = 2.0  # dx of class 2; the other classes' deltas must not count
    deltas[0, 4] = 9.0
    samples = Samples(
        rois=torch.zeros(3, 5),
        labels=torch.tensor([2, 0, -1]),
        matched_boxes=torch.zeros(3, 4),
        deltas=torch.zeros(3, 4),
        weights=torch.tensor([1.0, 1.0, 0.0]),
    )
    entropy, box = roi_losses(logits, deltas, samples)
    assert entropy.item() == pytest.approx(np.log(3))
    assert box.item() == pytest.approx((2 - BETA / 2) / 2)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_model_trains_and_detects(name):
    torch.manual_seed(0)
    model = small(name)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    targets = make_targets([[[8, 8, 40, 40]], []], [[1], []], [(64, 96), (50, 80)])
    losses = model(images, targets)
    assert list(losses) == ["loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"]
    assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    found = model.eval().detect(images, targets.image_sizes)
    assert found.boxes.shape == (2, 100, 4)
    for one, (height, width) in zip(found.unpad(), [(64, 96), (50, 80)], strict=True):
        assert (one["boxes"] >= 0).all()
        assert (one["boxes"][:, 2] <= width).all() and (one["boxes"][:, 3] <= height).all()
        assert (one["scores"].diff() <= 0).all()


def test_images_without_objects_train_and_touch_every_parameter():
    torch.manual_seed(0)
    model = small("tiny")
    losses = model(torch.zeros(2, 3, 64, 96, dtype=torch.uint8), make_targets([[], []], [[], []], [(64, 96)] * 2))
    assert losses["loss_rpn_box_reg"].item() == losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_losses_do_not_depend_on_the_capacity_of_the_ground_truth():
    torch.manual_seed(0)
    model = small("tiny").eval()  # evaluation mode: batch statistics stay as they are
    images, boxes, labels, targets = scene()
    padded = make_targets(boxes, labels, [(96, 128)] * 2, capacity=13)
    with torch.no_grad():
        assert model(images, targets) == model(images, padded)


def test_losses_do_not_depend_on_the_order_of_the_batch():
    torch.manual_seed(0)
    model = small("tiny").eval()
    images, boxes, labels, targets = scene()
    swapped = Targets(
        boxes=targets.boxes[[2, 0, 1]],
        labels=targets.labels[[2, 0, 1]],
        offsets=torch.tensor([0, 1, 3]),
        image_sizes=targets.image_sizes,
        image_ids=targets.image_ids.flip(0),
    )
    with torch.no_grad():
        straight, turned = model(images, targets), model(images.flip(0), swapped)
    for name in straight:  # the same samples are drawn; only the order of the sums differs
        assert turned[name].item() == pytest.approx(straight[name].item(), rel=1e-5)


def test_two_images_can_be_learnt_by_heart():
    torch.manual_seed(0)
    model = build(ModelConfig(name="tiny", min_size=96, max_size=128), ["bright", "dark"])
    images, boxes, labels, targets = scene()
    config = RECIPES["tiny"].optim
    optimizer = make_optimizer(model, config, 1e-3)
    for step in range(120):
        if step == 100:  # at the full rate a box too many comes and goes to the end
            for group in optimizer.param_groups:
                group["lr"] /= 10
        losses = model(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for its_boxes, its_labels, found in zip(boxes, labels, model.eval().detect(images).unpad(), strict=True):
        keep = found["scores"] > 0.5
        assert sorted(found["labels"][keep].tolist()) == its_labels
        order = found["labels"][keep].argsort()
        assert (iou(found["boxes"][keep][order], torch.tensor(its_boxes, dtype=torch.float32)) > 0.5).all()
    # In 16 bits each of the 25 layers rounds to one part in 256, which makes at most a tenth of deltas and logits.
    arrays = list(images.permute(0, 2, 3, 1).numpy())
    for whole, half in zip(model.predict(arrays), model.predict(arrays, half=True), strict=True):
        order, other = whole["labels"].argsort(), half["labels"].argsort()
        assert torch.equal(whole["labels"][order], half["labels"][other])
        assert (iou(whole["boxes"][order], half["boxes"][other]) > 0.9).all()
        assert not torch.equal(whole["scores"], half["scores"])


def test_a_training_step_is_pinned_to_its_losses():
    """Weights, matching, sampling, pooling and losses all enter: a change of any of them moves these numbers.

    Every proposal enters the second stage: with NMS and ranking in between, the last bit of a logit, which differs
    between processors, would decide which ones do.
    """
    everything = {"pre_nms_top_n_train": 10_000, "post_nms_top_n_train": 2_000, "nms_threshold": 1.0}
    roi = RoIConfig(batch_size_per_image=3_000, positive_fraction=1.0)
    config = ModelConfig(name="tiny", min_size=64, max_size=96, rpn=RPNConfig(**everything), roi=roi)
    torch.manual_seed(0)
    model = build(config, ["a", "b"])
    images, _, _, targets = scene()
    losses = model(images, targets)
    # Float32 sums of at most 1e5 terms (64 channels x 9 taps x cells), whose errors grow as the root: 300 eps = 4e-5.
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(PINNED, rel=4e-5)


PINNED = {
    "loss_objectness": 0.691890,
    "loss_rpn_box_reg": 0.00423912,
    "loss_classifier": 1.087488,
    "loss_box_reg": 0.0397970,
}


def test_sampling_advances_with_the_step_and_only_in_training():
    model = small("tiny")
    images, _, _, targets = scene()
    model(images, targets)
    assert model.step.item() == 1
    model.eval()(images, targets)
    assert model.step.item() == 1


def test_predict_takes_what_people_have_and_answers_in_its_pixels(tmp_path):
    torch.manual_seed(0)
    model = small("tiny")
    array = np.random.default_rng(0).integers(0, 256, (150, 300, 3), dtype=np.uint8)
    file = tmp_path / "a.png"
    Image.fromarray(array).save(file)
    ways = [file, str(file), Image.fromarray(array), array]
    results = [model.predict(way, score_threshold=0.0) for way in ways]
    assert model.training
    for result in results:
        assert torch.equal(result["boxes"], results[0]["boxes"])
        assert [model.classes[k - 1] for k in result["labels"].tolist()] == result["names"]
    assert len(results[0]["boxes"]) > 0
    assert results[0]["boxes"][:, 2].max() > 150, "boxes must be in pixels of the picture, not of the network input"
    several = model.predict([file, array], score_threshold=0.0, batch_size=1)
    assert [len(one["boxes"]) for one in several] == [len(results[0]["boxes"])] * 2
    assert model.predict([]) == []


def test_bad_arguments_are_named(tmp_path):
    model = small("tiny")
    images, _, _, targets = scene()
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), got \(2, 96, 128\)"):
        model(images[:, 0], targets)
    with pytest.raises(ValueError, match="images must be uint8, or floating point in 0..1, got torch.int64"):
        model(images.long(), targets)
    with pytest.raises(ValueError, match="targets must be of 1 images, got 2"):
        model(images[:1], targets)
    with pytest.raises(ValueError, match="score_threshold must be between 0 and 1, got 2"):
        model.predict(images[0].permute(1, 2, 0).numpy(), score_threshold=2)
    with pytest.raises(ValueError, match="batch_size must be greater than 0, got 0"):
        model.predict([], batch_size=0)
    with pytest.raises(ValueError, match="evaluation mode"):
        model.detect(images)
    with pytest.raises(pictures.ImageError, match="nowhere.jpg"):
        model.predict(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="classes must be one or more different names"):
        build("tiny", ["a", "a"])
    with pytest.raises(ValueError, match="model.name must be one of tiny, .*, got 'huge'"):
        build("huge", ["a"])
    with pytest.raises(ValueError, match="one list for each of the 4 levels, got 1"):
        build(ModelConfig(rpn=RPNConfig(anchor_sizes=[[32.0]])), ["a"])
    with pytest.raises(ValueError, match="model.roi.low_threshold must not exceed"):
        build(ModelConfig(roi=RoIConfig(low_threshold=0.9)), ["a"])


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
def test_gradients_of_the_rpn_lie_as_their_parameters_do(order: torch.memory_format) -> None:
    """DDP warns of any other, and copies them."""
    head = RPNHead(16, 16, 3).to(memory_format=order)
    objectness, deltas = head([torch.randn(2, 16, 5, 7).to(memory_format=order)])
    (objectness.sum() + deltas.sum()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.stride() == parameter.stride(), name
