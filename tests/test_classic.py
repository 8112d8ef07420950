"""The classic API: the calls of the original tutorial with their argument names, and the documented shapes."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

import rcnn
from rcnn import boxes
from rcnn.classic import (
    RPN,
    AnchorTargerLayer,
    AnchorTargetLayer,
    AverageMeter,
    CocoGenerator,
    CrayonClient,
    Enqueuer,
    FastRCNN,
    ProposalLayer,
    VOCDetection,
    convert_data,
    result_show,
)
from rcnn.data import flowers

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()

# The boxes that the original's documentation shows. It shows 6 indices beside these 7; the seventh box gets one here.
DOCUMENTED_BOXES = np.array(
    [
        [48.57142857, 465.71428571, 537.14285714, 1774.28571429],
        [220.0, 1065.71428571, 382.85714286, 1771.42857143],
        [326.76056338, 315.49295775, 394.36619718, 580.28169014],
        [76.05633803, 290.14084507, 242.25352113, 788.73239437],
        [11.26760563, 8.45070423, 585.91549296, 1769.01408451],
        [178.125, 221.875, 287.5, 975.0],
        [321.875, 334.375, 434.375, 984.375],
    ]
)
DOCUMENTED_INDEX = [0, 0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    flowers.write(folder, count=14, seed=1)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of 96 pixels in place of 600."""
    for kind in (VOCDetection, FastRCNN):
        monkeypatch.setattr(kind, "SCALES", (96,))


@pytest.fixture(scope="module")
def net() -> FastRCNN:
    torch.manual_seed(0)
    return FastRCNN(["__background__", "daisy", "tulip"], hidden=64)


def test_the_tutorial(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the tutorial, in its order, on whatever device there is."""
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    ds, val_ds = VOCDetection(root, "train"), VOCDetection(root, "val")
    assert (len(ds), len(val_ds)) == (10, 4)
    assert ds.classes == ["__background__", "daisy", "tulip"]

    data_gen = CocoGenerator(data=ds, batch_size=3, shuffle=True)
    queue = Enqueuer(generator=data_gen, use_multiprocessing=False)
    queue.start(max_queue_size=20, workers=4)
    train_data_generator = queue.get()
    val_data_gen = CocoGenerator(data=val_ds, batch_size=3, shuffle=True, seed=2)
    val_queue = Enqueuer(generator=val_data_gen, use_multiprocessing=False)
    val_queue.start(max_queue_size=20, workers=4)
    val_data_generator = val_queue.get()

    net = FastRCNN(ds.classes, debug=False, hidden=64)  # for the sake of time; 4,096 in the tutorial
    if torch.cuda.is_available():
        net.cuda()
    params = filter(lambda p: p.requires_grad, net.parameters())
    optimizer = SGD(params, lr=1e-4, momentum=0.9, weight_decay=0.0005)
    lr_scheduler = StepLR(optimizer, step_size=100, gamma=0.8)

    name = datetime.now().strftime("vgg16_%m-%d_%H-%M-%s")
    experiment = CrayonClient(hostname="crayon", port=8889).create_experiment(name)
    meters = {tag: AverageMeter() for tag in ("train_loss", "rpn_loss", "cross_entropy", "loss_box")}

    def losses() -> dict[str, torch.Tensor]:
        parts = net.loss, net.rpn.loss, net.cross_entropy, net.loss_box
        return {tag: part for tag, part in zip(meters, parts, strict=True) if part is not None}

    net.train()
    before = net.rpn.features[0].weight.detach().clone()
    for step in range(1, 3):
        blobs = train_data_generator.next()
        batch_tensor, im_info, batch_boxes, batch_boxes_index = convert_data(blobs)
        cls_prob, bbox_pred, rois = net(batch_tensor, im_info, batch_boxes, batch_boxes_index)
        rows = 128 * len(blobs)
        assert (cls_prob.shape, bbox_pred.shape, rois.shape) == ((rows, 3), (rows, 12), (rows, 5))
        assert np.argmax(cls_prob.data.cpu().numpy(), axis=1).shape == (rows,)
        for tag, value in losses().items():
            meters[tag].update(value.item())
        optimizer.zero_grad()
        net.loss.backward()
        optimizer.step()
        lr_scheduler.step()
        for tag, meter in meters.items():
            experiment.add_scalar_value(tag, meter.avg, step=step)
    assert not torch.equal(net.rpn.features[0].weight.detach(), before)
    assert all(p.grad is not None for p in net.parameters())
    torch.save(net.state_dict(), f"./checkpoints/faster_model_at_epoch_{1}.pkl")

    net.eval()
    val_loss = AverageMeter()
    net(*convert_data(next(val_data_generator)))
    val_loss.update(net.loss.item())
    assert val_loss.avg == net.loss.item() > 0

    picture = val_ds.dataset.records[0].path
    pred_boxes, scores, classes, rois, blob = net.detect(str(picture), thr=0.0)
    assert isinstance(result_show(blob[0], pred_boxes, classes, scores), Image.Image)
    queue.stop()
    val_queue.stop()
    assert [file.name for file in (tmp_path / "runs" / name).iterdir() if "tfevents" in file.name]

    saved = torch.load("./checkpoints/faster_model_at_epoch_1.pkl", weights_only=True)
    assert saved.keys() == net.state_dict().keys()


def test_anchors_are_laid_by_row_column_and_cell() -> None:
    layer = AnchorTargetLayer(feat_stride=np.array([16.0]), anchor_scales=np.array([4, 8, 16, 32]))
    assert layer.is_cuda is True and AnchorTargerLayer is AnchorTargetLayer
    anchors = layer._create_anchors(2, 3)
    assert anchors.shape == (2 * 3 * 12, 4) and anchors.dtype == np.float32
    # The fifth anchor of a cell is the square of side 64: ratio 0.5 comes first with its four sizes.
    assert anchors[4].tolist() == [-32, -32, 32, 32]
    assert anchors[12 * (3 * 1 + 2) + 4].tolist() == [32 - 32, 16 - 32, 32 + 32, 16 + 32]


def test_outside_anchors_are_those_that_leave_the_image() -> None:
    layer = AnchorTargetLayer([16], [4])
    anchors = np.array([[0, 0, 10, 20], [-1, 0, 5, 5], [0, 0, 11, 20], [0, 0, 10, 21], [3, 3, 4, 4]], np.float32)
    inside, rows = layer._filter_outside_anchors(anchors, im_height=20, im_width=10)
    assert rows.tolist() == [0, 4]
    assert inside.tolist() == anchors[[0, 4]].tolist()


def test_targets_of_the_documented_boxes() -> None:
    layer = AnchorTargetLayer(np.array([16.0]), np.array([4, 8, 16, 32]))
    anchors, rows = layer._filter_outside_anchors(layer._create_anchors(112, 38), 1800, 600)
    labels, targets = layer.calculate_target(anchors, 3, rows, DOCUMENTED_BOXES, DOCUMENTED_INDEX)
    assert labels.shape == (3, len(anchors)) and targets.shape == (3, len(anchors), 4)
    for image in range(3):
        gt = torch.from_numpy(DOCUMENTED_BOXES[np.array(DOCUMENTED_INDEX) == image]).float()
        overlap = boxes.iou(torch.from_numpy(anchors)[:, None], gt[None])
        best, which = overlap.max(1)
        positive = (best >= 0.7) | (overlap == overlap.max(0).values).any(1)
        expected = torch.where(positive, 1, torch.where(best < 0.3, 0, -1))
        assert labels[image].tolist() == expected.tolist()
        assert (labels[image] == 1).any()
        encoded = boxes.encode(torch.from_numpy(anchors), gt[which])[positive]
        np.testing.assert_array_equal(targets[image][positive.numpy()], encoded.numpy())
        assert not targets[image][~positive.numpy()].any()


def test_target_of_one_anchor_by_hand() -> None:
    layer = AnchorTargetLayer([16], [4])
    anchors = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [100, 100, 110, 110]], np.float32)
    # IoU 80/100 and 30/150 with the box of image 1; image 0 has none.
    labels, targets = layer.calculate_target(anchors, 2, np.arange(3), np.array([[0, 0, 10, 8.0]]), [1])
    assert labels.tolist() == [[0, 0, 0], [1, 0, 0]]
    expected = torch.tensor([0.0, -0.1, 0.0, torch.tensor(0.8).log()])
    np.testing.assert_allclose(targets[1, 0], expected, rtol=0, atol=4 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("device", DEVICES)
def test_forward_of_the_target_layer_has_the_documented_shapes(device: str) -> None:
    layer = AnchorTargetLayer([16], [4, 8, 16, 32]).to(device)
    scores = torch.zeros(3, 24, 112, 38, device=device)
    gt = np.column_stack((DOCUMENTED_BOXES, np.ones(7)))
    labels, deltas, inside, outside = layer(scores, gt, DOCUMENTED_INDEX, np.array([[1800, 600]]))
    assert labels.shape == (3, 1, 12 * 112, 38) and labels.device.type == device
    assert deltas.shape == inside.shape == outside.shape == (3, 48, 112, 38)
    drawn = (labels >= 0).flatten(1).sum(1)
    assert drawn.tolist() == [256] * 3
    # The label of an anchor and its four weights lie at the same cell and anchor number.
    flat = labels.reshape(3, 12, 112, 38)
    assert torch.equal(inside.reshape(3, 12, 4, 112, 38), (flat == 1).float()[:, :, None].expand(-1, -1, 4, -1, -1))
    assert torch.equal(outside.reshape(3, 12, 4, 112, 38)[:, :, 2] > 0, flat >= 0)
    torch.testing.assert_close(outside.sum(), torch.tensor(4.0, device=device))
    assert torch.equal((deltas != 0).reshape(3, 12, 4, 112, 38).any(2), flat == 1)
    # Where an anchor is positive, moving it by its deltas gives one of the boxes of its picture.
    image, anchor, y, x = (t[0].item() for t in (flat == 1).nonzero(as_tuple=True))
    row = torch.from_numpy(layer._create_anchors(112, 38)[(y * 38 + x) * 12 + anchor])
    moved = boxes.decode(deltas.reshape(3, 12, 4, 112, 38)[image, anchor, :, y, x].cpu(), row)
    own = torch.from_numpy(DOCUMENTED_BOXES[np.array(DOCUMENTED_INDEX) == image]).float()
    assert (moved - own).abs().amax(1).min() < 1e-2  # of boxes 1,800 pixels long: 50 eps


def test_a_target_layer_may_bring_its_results_to_the_cpu() -> None:
    layer = AnchorTargetLayer([16], [4], is_cuda=False)
    found = layer(torch.zeros(1, 6, 8, 8, device=DEVICES[-1]), np.array([[0, 0, 60, 60.0]]), [0], [[128, 128]])
    assert {one.device.type for one in found} == {"cpu"}


@pytest.mark.parametrize(
    ("gt", "index", "info", "message"),
    [
        (np.zeros((2, 3)), [0, 0], [[64, 64]], r"shapes \(G, 4 or 5\) and \(G,\), got \(2, 3\) and \(2,\)"),
        (np.zeros((7, 4)), [0, 0, 0, 1, 1, 0], [[64, 64]], r"got \(7, 4\) and \(6,\)"),
        (np.zeros((1, 4)), [2], [[64, 64]], r"in 0\.\.1, got \[2\]"),
        (
            np.zeros((1, 4)),
            [0],
            [[64, 64]] * 3,
            r"im_info must have shape \(2, 2 or 3\) or \(1, 2 or 3\), got \(3, 2\)",
        ),
    ],
)
def test_bad_ground_truth_is_told(gt: np.ndarray, index: list[int], info: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorTargetLayer([16], [4])(torch.zeros(2, 6, 4, 4), gt, index, info)


def test_boxes_of_the_pictures_may_stand_in_any_order() -> None:
    def forward(order: list[int]) -> tuple[torch.Tensor, ...]:
        layer = AnchorTargetLayer([16], [4, 8])
        return layer(
            torch.zeros(3, 12, 40, 38), DOCUMENTED_BOXES[order], np.array(DOCUMENTED_INDEX)[order], [[640, 600]]
        )

    for one, other in zip(forward([0, 1, 2, 3, 4, 5, 6]), forward([5, 0, 3, 1, 6, 4, 2]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("cfg_key", "capacity"), [("TRAIN", 2000), ("TEST", 300)])
def test_proposals_are_the_best_boxes(cfg_key: str, capacity: int) -> None:
    layer = ProposalLayer()
    scores, deltas = torch.full((2, 18, 6, 6), -1.0), torch.zeros(2, 36, 6, 6)
    scores[1, 9 + 3, 2, 4] = 5.0  # the square anchor of side 128 at row 2, column 4 of the second picture
    rois = layer(scores, deltas, np.array([[96, 96, 1.0]]), cfg_key)
    assert rois.shape == (2, capacity, 5)
    assert rois[:, :, 0].unique(dim=1).tolist() == [[0.0], [1.0]]
    assert rois[1, 0].tolist() == [1, 64 - 64, 0, 96, 96]  # clipped to the picture
    with pytest.raises(ValueError, match="TRAIN or TEST"):
        layer(scores, deltas, [[96, 96]], "VAL")


def test_boxes_are_filtered_by_their_shorter_side() -> None:
    rows = ProposalLayer()._filter_boxes(np.array([[0, 0, 4, 4], [0, 0, 3.9, 9], [0, 0, 9, 3.9], [1, 1, 6, 5]]), 4)
    assert rows.tolist() == [0, 3]


@pytest.mark.parametrize("device", DEVICES)
def test_rpn_has_the_documented_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    rpn = RPN().to(device)
    assert rpn.anchor_scales == [4, 8, 16, 32]
    assert isinstance(rpn.anchor_target_layer, AnchorTargetLayer) and isinstance(rpn.proposal_layer, ProposalLayer)
    assert rpn.cross_entropy is None and rpn.loss_box is None
    pictures = torch.randn(2, 3, 96, 128)
    features, deltas, scores = rpn._computer_forward(pictures)
    assert features.shape == (2, 512, 6, 8)
    assert deltas.shape == (2, 48, 6, 8) and scores.shape == (2, 24, 6, 8)
    hidden = rpn.conv1(rpn.features(pictures.to(device, memory_format=torch.channels_last)))
    eps = rpn.network.head.conv[0][0].in_channels * torch.finfo(torch.float32).eps  # a sum of so many products
    for one, other in ((rpn.score_conv(hidden), scores), (rpn.bbox_conv(hidden), deltas)):
        assert (one - other).norm() <= eps * other.norm()

    with pytest.raises(ValueError, match="no loss yet"):
        _ = rpn.loss
    info = torch.tensor([[96, 128]])
    found, rois = rpn(pictures, info)
    assert torch.equal(found, features) and rois.shape == (2, 300, 5) and rpn.cross_entropy is None
    # The layer by itself, fed with the two maps, gives the same boxes.
    assert torch.equal(rpn.proposal_layer(scores, deltas, info, "TEST"), rois)

    features, rois = rpn(pictures, info, gt_boxes=np.array([[0, 0, 60, 70, 1.0]]), gt_boxes_index=[1])
    assert features.shape == (2, 512, 6, 8) and rois.shape == (2, 2000, 5)
    assert rpn.cross_entropy.shape == rpn.loss_box.shape == ()
    assert torch.equal(rpn.loss, rpn.cross_entropy + rpn.loss_box)
    rpn.loss.backward()
    assert all(p.grad is not None for p in rpn.parameters())


def test_two_scores_are_the_sigmoid_of_the_logit() -> None:
    rpn = RPN()
    hidden = torch.randn(1, 512, 2, 2)
    pairs = rpn.score_conv(hidden).reshape(1, 2, -1, 2)
    logits = rpn.network.head.cls_logits(hidden)
    torch.testing.assert_close(pairs.softmax(1)[:, 1].reshape(logits.shape), logits.sigmoid())


@pytest.mark.parametrize("device", DEVICES)
def test_losses_back_propagate_and_evaluation_has_them_too(net: FastRCNN, root: Path, device: str) -> None:
    net.to(device).train()
    batch = convert_data(CocoGenerator(VOCDetection(root, "val"), 2).next())
    net(*batch)
    parts = [net.cross_entropy, net.loss_box, net.rpn.cross_entropy, net.rpn.loss_box]
    torch.testing.assert_close(net.loss, torch.stack(parts).sum())
    net.zero_grad()
    net.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.zero_grad()
    net.eval()
    with torch.no_grad():
        net(*batch)
        first = net.loss
        net(*batch)
    assert torch.equal(net.loss, first), "losses of an evaluation must not depend on when it is made"
    net.cpu()


def test_the_losses_are_those_of_the_detector_of_this_package(root: Path) -> None:
    net = FastRCNN(["__background__", "daisy", "tulip"]).eval()
    detector = rcnn.FasterRCNN(rcnn.ModelConfig(name="vgg16", frozen_stages=0), net.classes[1:]).eval()
    own, theirs = net.state_dict(), detector.state_dict()
    names = {n: n.replace("rpn.features.", "backbone.body.features.").replace("rpn.network.", "rpn.") for n in own}
    assert set(names.values()) == set(theirs)
    detector.load_state_dict({names[n]: tensor for n, tensor in own.items()})
    batch_tensor, im_info, batch_boxes, index = convert_data([VOCDetection(root, "val")[0]])
    targets = rcnn.Targets(
        boxes=torch.from_numpy(batch_boxes[:, :4]),
        labels=torch.from_numpy(batch_boxes[:, 4]).long(),
        offsets=torch.tensor([0, len(batch_boxes)]),
        image_sizes=torch.from_numpy(im_info[:, :2]),
        image_ids=torch.tensor([0]),
    )
    with torch.no_grad():
        net(batch_tensor, im_info, batch_boxes, index)
        expected, _ = detector._losses(detector.backbone(batch_tensor), targets)
    found = [net.rpn.cross_entropy, net.rpn.loss_box, net.cross_entropy, net.loss_box]
    assert found == list(expected.values())


def test_without_ground_truth_all_proposals_are_classified(net: FastRCNN) -> None:
    net.eval()
    with torch.no_grad():
        cls_prob, bbox_pred, rois = net(torch.randn(2, 3, 64, 96), np.array([[64, 96]]))
    assert (cls_prob.shape, bbox_pred.shape, rois.shape) == ((600, 3), (600, 12), (600, 5))
    torch.testing.assert_close(cls_prob.sum(1), torch.ones(600))
    assert net.loss_box is None and net.cross_entropy is None
    with pytest.raises(ValueError, match="no loss yet"):
        _ = net.loss


def test_detect_gives_names_and_boxes_in_the_blob(net: FastRCNN, root: Path) -> None:
    path = VOCDetection(root, "val").dataset.records[0].path
    net.train()
    pred_boxes, scores, classes, rois, blob = net.detect(path, thr=0.1)
    assert net.training, "the mode is left as it was"
    assert blob.shape[:2] == (1, 3) and min(blob.shape[2:]) == 96
    count = len(scores)
    assert count > 0 and pred_boxes.shape == (count, 4) and classes.shape == (count,)
    assert set(classes) <= {"daisy", "tulip"}
    assert (scores >= np.float32(0.1)).all() and (np.diff(scores) <= 0).all()
    for some in (pred_boxes, rois):
        assert (some >= 0).all() and (some <= [blob.shape[3], blob.shape[2]] * 2).all()
    assert rois.shape[1] == 4 and 0 < len(rois) <= 300
    nothing = net.detect(Image.open(path), thr=1.0)
    assert [len(part) for part in nothing[:3]] == [0, 0, 0]
    assert isinstance(result_show(nothing[4][0], *(nothing[i] for i in (0, 2, 1))), Image.Image)


def test_debug_tells_what_was_drawn(net: FastRCNN, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net.debug = True
    net.eval()
    with torch.no_grad():
        net(*convert_data([VOCDetection(root, "val")[0]]))
    net.debug = False
    assert capsys.readouterr().out.startswith("rois: ")


@pytest.mark.parametrize("classes", [[], ["__background__"], ["daisy", "tulip"], ["__background__", "a", "a"]])
def test_classes_begin_with_the_background(classes: list[str]) -> None:
    with pytest.raises(ValueError, match="classes must be '__background__' and then different names"):
        FastRCNN(classes)


def test_published_weights_freeze_the_first_blocks(net: FastRCNN, tmp_path: Path) -> None:
    state = {f"features.{n}": torch.full_like(t, 0.25) for n, t in net.rpn.features.state_dict().items()}
    # torchvision's file counts the pools between the blocks, as this trunk does.
    torch.save(state, tmp_path / "vgg16.pth")
    loaded = FastRCNN(net.classes, weights=tmp_path / "vgg16.pth", hidden=64)
    assert all(bool((t == 0.25).all()) for t in loaded.rpn.features.state_dict().values())
    trains = [p.requires_grad for p in loaded.rpn.features.parameters()]
    assert trains == [False] * 8 + [True] * 18  # two blocks of two convolutions with weight and bias
    assert all(p.requires_grad for p in net.parameters()), "without weights nothing may stay random for ever"
