"""Our trunks and pyramid against torchvision's: the same names, shapes and, with the same weights, outputs."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

torchvision = pytest.importorskip("torchvision")

from torchvision.models import resnet18, resnet50, vgg16  # noqa: E402
from torchvision.models.detection import fasterrcnn_resnet50_fpn  # noqa: E402
from torchvision.ops import FeaturePyramidNetwork  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool  # noqa: E402

from rcnn.models import resnet as ours  # noqa: E402
from rcnn.models.backbone import build_backbone  # noqa: E402
from rcnn.models.fpn import FPN  # noqa: E402
from rcnn.models.vgg import vgg16 as our_vgg16  # noqa: E402
from rcnn.models.weights import load_published  # noqa: E402

EPS = torch.finfo(torch.float64).eps


def _warm(module: nn.Module) -> nn.Module:
    """Norms away from the identity, in double precision."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.0)
            nn.init.normal_(m.bias)
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return module.double().eval()


def _close(ours: torch.Tensor, theirs: torch.Tensor, depth: int, terms: int) -> None:
    """``depth`` layers of sums of at most ``terms`` products, rounded in another order, relative to the map's size."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=depth * terms * EPS * theirs.abs().max().item())


def _maps(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    maps = []
    for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = layer(x)
        maps.append(x)
    return maps


@pytest.mark.parametrize(("build", "peer", "depth"), [(ours.resnet18, resnet18, 18), (ours.resnet50, resnet50, 50)])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_resnet(build, peer, depth: int, norm: str) -> None:
    torch.manual_seed(0)
    theirs = _warm(peer())
    net = build(norm=norm)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    own = net.state_dict()
    expected = {k: v.shape for k, v in state.items() if norm == "batch" or not k.endswith("num_batches_tracked")}
    assert {k: v.shape for k, v in own.items()} == expected
    net.load_state_dict(state)
    net.double().eval()
    x = torch.randn(1, 3, 70, 64, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(net(x), _maps(theirs, x), strict=True):
            _close(a, b, depth, 512 * 9)


@pytest.mark.parametrize(("build", "peer", "depth"), [(ours.resnet18, resnet18, 18), (ours.resnet50, resnet50, 50)])
def test_resnet_in_training(build, peer, depth: int) -> None:
    torch.manual_seed(0)
    theirs = _warm(peer()).train()
    net = build().double().train()
    net.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    a, b = net(x)[0], _maps(theirs, x)[0]
    _close(a, b, depth, 512 * 9)
    upstream = torch.randn_like(b)
    a.backward(upstream)
    b.backward(upstream)
    gradients = {k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            # forward and backward through the stage, sums over every cell of the map
            _close(parameter.grad, gradients[name], 2 * depth, 2 * 32 * 32 * 9)
    torch.testing.assert_close(net.bn1.running_mean, theirs.bn1.running_mean, rtol=0, atol=2 * 32 * 32 * EPS)


def test_vgg16() -> None:
    torch.manual_seed(0)
    theirs = vgg16().features.double().eval()
    net = our_vgg16()
    assert {k.removeprefix("features."): v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    net.features.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    with torch.no_grad():
        _close(net.double()(x)[0], theirs[:30](x), 13, 512 * 9)


def test_fpn() -> None:
    torch.manual_seed(0)
    channels = [8, 16, 32]
    theirs = FeaturePyramidNetwork(channels, 24, LastLevelMaxPool()).double()
    net = FPN(channels, 24).double()
    net.load_state_dict(theirs.state_dict())
    maps = [
        torch.randn(2, c, -(-37 // s), -(-51 // s), dtype=torch.float64)
        for c, s in zip(channels, (1, 2, 4), strict=True)
    ]
    expected = theirs(OrderedDict((str(i), m) for i, m in enumerate(maps)))
    for a, b in zip(net(maps), expected.values(), strict=True):
        _close(a, b, 4, 24 * 9)


def test_detection_checkpoint_of_torchvision() -> None:
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    backbone = build_backbone("resnet50_fpn", "frozen").eval()
    report = load_published(backbone, theirs.state_dict(), "fasterrcnn.pth")
    assert report.missing == report.mismatched == []
    assert all(name.startswith(("rpn.", "roi_heads.")) for name in report.unexpected)
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        for a, b in zip(backbone.double()(x), theirs.backbone.double()(x).values(), strict=True):
            _close(a, b, 54, 512 * 9)
