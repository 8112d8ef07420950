"""Published names onto ours: trunk files, detection checkpoints, checkpoints of our own, and files that do not fit."""

import copy

import pytest
import torch
from torch import Tensor, nn

from rcnn.models.backbone import build_backbone
from rcnn.models.resnet import ResNet
from rcnn.models.weights import Report, load_published, untrained_frozen


class Detector(nn.Module):
    """The names of a detector, without its workings."""

    def __init__(self, name: str = "tiny", norm: str = "batch", classes: int = 3, pooled: int = 64 * 49) -> None:
        super().__init__()
        self.backbone = build_backbone(name, norm)  # type: ignore[arg-type]
        channels, hidden = self.backbone.out_channels, 16
        self.rpn = nn.Module()
        self.rpn.head = nn.Module()
        self.rpn.head.conv = nn.Sequential(nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()))
        self.roi_heads = nn.Module()
        self.roi_heads.box_head = nn.ModuleDict({"fc6": nn.Linear(pooled, hidden), "fc7": nn.Linear(hidden, hidden)})
        self.roi_heads.box_predictor = nn.ModuleDict({"cls_score": nn.Linear(hidden, classes + 1)})


def _state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Recognisable values under the module's own names."""
    generator = torch.Generator().manual_seed(1)
    return {
        prefix + name: torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in module.state_dict().items()
    }


def test_imagenet_resnet_file() -> None:
    model = Detector()
    state = _state(model.backbone.body)
    # old files of torchvision lack the counters; all have the classifier
    file = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    file |= {"fc.weight": torch.zeros(1000, 256), "fc.bias": torch.zeros(1000)}
    initial = copy.deepcopy(model.state_dict())
    report = load_published(model, file, "resnet.pth")
    own = model.state_dict()
    assert {f"backbone.body.{k}" for k in file if not k.startswith("fc.")} == set(report.matched)
    assert all(torch.equal(own[f"backbone.body.{k}"], v) for k, v in file.items() if not k.startswith("fc."))
    assert report.unexpected == report.mismatched == []
    assert {n.split(".")[1] for n in report.missing} == {"fpn", "head", "box_head", "box_predictor"}
    assert all(torch.equal(own[n], initial[n]) for n in report.missing)
    assert len(report.matched) == 20 * 5  # 20 convolutions and 20 norms of four tensors


def test_frozen_norms_take_the_statistics() -> None:
    model = build_backbone("tiny", "frozen")
    file = _state(build_backbone("tiny").body)
    report = load_published(model, file, "resnet.pth")
    assert report.unexpected == []
    assert torch.equal(model.body.bn1.running_var, file["bn1.running_var"])
    assert torch.equal(model.body.bn1.weight, file["bn1.weight"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_detection_checkpoint_with_old_and_new_names(prefix: str) -> None:
    model = Detector(classes=3)
    new = _state(Detector(classes=90))
    old = {
        prefix + (k.replace(".0.weight", ".weight").replace(".0.bias", ".bias") if "fpn" in k else k): v
        for k, v in new.items()
    }
    old = {k.replace("conv.0.0.", "conv."): v for k, v in old.items()}
    assert prefix + "backbone.fpn.inner_blocks.0.weight" in old
    assert prefix + "rpn.head.conv.weight" in old
    for file in (new, old):
        target = copy.deepcopy(model)
        report = load_published(target, file, "fasterrcnn.pth")
        assert report.missing == report.unexpected == []
        assert report.mismatched == [
            "roi_heads.box_predictor.cls_score.weight ((4, 16), (91, 16))",
            "roi_heads.box_predictor.cls_score.bias ((4,), (91,))",
        ]
        own = target.state_dict()
        assert all(torch.equal(own[n], new[n]) for n in report.matched)
        assert torch.equal(
            own["roi_heads.box_predictor.cls_score.bias"],
            model.state_dict()["roi_heads.box_predictor.cls_score.bias"],
        )


def test_own_checkpoint_is_taken_whole() -> None:
    model = Detector()
    file = _state(Detector())
    report = load_published(model, file, "model_best.safetensors")
    assert report.matched == list(model.state_dict())
    assert all(torch.equal(v, file[n]) for n, v in model.state_dict().items())
    assert report.summary() == f"model_best.safetensors gave {len(file)} of the model's {len(file)} tensors."


def test_vgg_file_fills_trunk_fc6_and_fc7() -> None:
    model = Detector("vgg16", pooled=8)
    file = _state(model.backbone.body)
    file |= {
        "classifier.0.weight": torch.full((16, 8), 6.0),
        "classifier.0.bias": torch.full((16,), 6.0),
        "classifier.3.weight": torch.full((16, 16), 7.0),
        "classifier.3.bias": torch.full((16,), 7.0),
        "classifier.6.weight": torch.zeros(1000, 16),
        "classifier.6.bias": torch.zeros(1000),
    }
    report = load_published(model, file, "vgg16.pth")
    assert len(report.matched) == 2 * 13 + 4
    assert report.unexpected == report.mismatched == []
    assert torch.equal(model.roi_heads.box_head["fc6"].weight, file["classifier.0.weight"])
    assert torch.equal(model.roi_heads.box_head["fc7"].bias, file["classifier.3.bias"])
    assert torch.equal(model.backbone.body.features[28].weight, file["features.28.weight"])


def test_a_trunk_by_itself_and_half_precision() -> None:
    net: ResNet = build_backbone("tiny").body  # type: ignore[assignment]
    file = {name: tensor.half() for name, tensor in _state(net).items()}
    load_published(net, {"backbone.body." + k: v for k, v in file.items()}, "own.safetensors")
    assert net.conv1.weight.dtype == torch.float32
    assert torch.equal(net.conv1.weight, file["conv1.weight"].float())
    assert net.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_another_trunk_is_refused_and_nothing_is_copied() -> None:
    model = build_backbone("resnet18_fpn")
    file = _state(build_backbone("resnet50_fpn").body)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="resnet50.pth holds another trunk: body.layer1.0.conv1.weight must"):
        load_published(model, file, "resnet50.pth")
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize("file", [{}, {"encoder.weight": torch.zeros(2)}])
def test_a_file_of_something_else_is_named(file: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError) as error:
        load_published(build_backbone("tiny"), file, "other.pth")
    theirs = "encoder.weight (2,)" if file else "nothing"
    assert str(error.value) == (
        "other.pth does not fit this model: the model expects body.conv1.weight (32, 3, 7, 7), body.bn1.weight (32,), "
        f"body.bn1.bias (32,), ..., the file has {theirs}"
    )


def test_summary_counts_by_room() -> None:
    report = Report(
        path="a.pth",
        matched=["backbone.body.conv1.weight"],
        missing=["rpn.head.conv.0.0.weight", "rpn.head.conv.0.0.bias"],
        unexpected=["encoder.weight"],
        mismatched=["cls_score.weight ((4, 8), (91, 8))"],
    )
    assert report.summary() == (
        "a.pth gave 1 of the model's 4 tensors. Not in the file, left as initialised: rpn.head (2). "
        "Of another shape (model's, file's), left as initialised: cls_score.weight ((4, 8), (91, 8)). "
        "In the file, without a place in the model: encoder (1)."
    )


def test_frozen_layers_without_weights_are_pointed_out() -> None:
    model = build_backbone("tiny")
    assert untrained_frozen(model) is None
    model.freeze(1)
    sentence = untrained_frozen(model)
    assert sentence is not None
    # conv1.weight, bn1.weight, bn1.bias
    assert sentence.startswith("3 of 3 frozen tensors (body.conv1.weight, body.bn1.weight, ...) keep their random")
    report = load_published(model, _state(model.body), "resnet.pth")
    assert untrained_frozen(model, report.matched) is None
    without = {k: v for k, v in _state(model.body).items() if k != "conv1.weight"}
    report = load_published(model, without, "resnet.pth")
    assert "1 of 3 frozen tensors (body.conv1.weight) keep" in str(untrained_frozen(model, report.matched))


def test_frozen_norms_without_weights_are_pointed_out() -> None:
    assert "body.bn1.weight, body.bn1.bias, ..." in str(untrained_frozen(build_backbone("tiny", "frozen")))
