"""Trunks and pyramids: shapes, names, freezing, and the norm folded into the convolution."""

import copy

import pytest
import torch
from torch import nn

from rcnn.models.backbone import build_backbone
from rcnn.models.fpn import FPN
from rcnn.models.resnet import BasicBlock, Bottleneck, FrozenBatchNorm2d, ResNet, conv_norm_relu, resnet18, resnet50
from rcnn.models.vgg import vgg16

EPS32, EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _warm(module: nn.Module) -> nn.Module:
    """Norms away from the identity."""
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d):
            with torch.no_grad():
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_()
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(
    ("name", "out_channels", "strides", "parameters"),
    [
        # half of ResNet-18's 9 600 norm entries and 9 408 stem weights, a quarter of its 11 157 504 other weights;
        # laterals (64 + 128 + 256 and a bias each) * 64, outputs 3 * 64 * (64 * 9 + 1)
        ("tiny", 64, [8, 16, 32, 64], 2_798_880 + 451 * 64 + 3 * 64 * 577),
        # torchvision's 11 689 512 less the classifier's 513 000; laterals and outputs as above, four of 256
        ("resnet18_fpn", 256, [4, 8, 16, 32, 64], 11_176_512 + 964 * 256 + 4 * 256 * 2305),
        # torchvision's 25 557 032 less the classifier's 2 049 000
        ("resnet50_fpn", 256, [4, 8, 16, 32, 64], 23_508_032 + 3844 * 256 + 4 * 256 * 2305),
        ("vgg16", 512, [16], 14_714_688),
    ],
)
def test_backbone_levels(name: str, out_channels: int, strides: list[int], parameters: int) -> None:
    backbone = build_backbone(name)
    assert backbone.out_channels == out_channels
    assert backbone.strides == strides
    assert sum(p.numel() for p in backbone.parameters()) == parameters
    height, width = 96, 160
    levels = backbone(torch.randn(2, 3, height, width))
    # padded to 32 the sizes divide exactly down to stride 32; P6 keeps every second cell, counting from the first
    assert [tuple(x.shape) for x in levels] == [
        (2, out_channels, -(-height // stride), -(-width // stride)) for stride in strides
    ]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in levels)


def test_tiny_is_a_half_width_resnet18() -> None:
    full, half = resnet18().state_dict(), build_backbone("tiny").body.state_dict()
    assert full.keys() == half.keys()
    for name, tensor in full.items():
        expected = [n if n in (1, 3, 7) else n // 2 for n in tensor.shape]
        assert list(half[name].shape) == expected, name


def test_resnet_channels_and_strides() -> None:
    assert resnet18(32).channels == [32, 64, 128, 256]
    assert resnet18().channels == [64, 128, 256, 512]
    assert resnet50().channels == [256, 512, 1024, 2048]
    assert resnet50().strides == [4, 8, 16, 32]


def test_bottleneck_stride_is_on_the_3x3_convolution() -> None:
    block = resnet50().layer2[0]
    assert block.conv1.stride == (1, 1)
    assert block.conv2.stride == (2, 2)
    assert block.downsample[0].stride == (2, 2)


def test_maps_of_an_odd_size_round_up() -> None:
    maps = resnet18(8).eval()(torch.randn(1, 3, 50, 33))
    assert [tuple(m.shape[2:]) for m in maps] == [(13, 9), (7, 5), (4, 3), (2, 2)]


@pytest.mark.parametrize("frozen", [False, True])
def test_folded_norm_equals_the_norm_after_the_convolution(frozen: bool) -> None:
    conv = nn.Conv2d(5, 7, 3, 2, 1, bias=False).double()
    norm = _warm((FrozenBatchNorm2d(7) if frozen else nn.BatchNorm2d(7)).double()).eval()
    x = torch.randn(2, 5, 9, 11, dtype=torch.float64, requires_grad=True)
    parameters = [x, conv.weight] + ([] if frozen else [norm.weight, norm.bias])
    folded, plain = conv_norm_relu(x, conv, norm), nn.functional.relu(norm(conv(x)))
    # sums of 5 * 9 products, of size up to the sum of their magnitudes; each side rounds each term a few times
    size = nn.functional.conv2d(x.abs(), conv.weight.abs(), stride=2, padding=1).max() * 4 + 10
    atol = 45 * 4 * EPS64 * size.item()
    torch.testing.assert_close(folded, plain, rtol=0, atol=atol)
    upstream = torch.randn_like(plain)
    ours = torch.autograd.grad(folded, parameters, upstream)
    theirs = torch.autograd.grad(plain, parameters, upstream)
    for a, b in zip(ours, theirs, strict=True):
        # at most 2 * 5 * 6 cells or 7 * 9 products go into one entry
        torch.testing.assert_close(a, b, rtol=0, atol=63 * 8 * EPS64 * size.item() * upstream.abs().max().item())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block", [BasicBlock(8, 4, 2, "batch"), Bottleneck(8, 4, 2, "batch")])
def test_a_block_with_a_shortcut_of_its_own(block: BasicBlock | Bottleneck, training: bool) -> None:
    """One bias stands for both folded norms where the two paths meet."""
    block = copy.deepcopy(block).double()
    _warm(block).train(training)
    x = torch.randn(2, 8, 9, 11, dtype=torch.float64)
    out, relu = x, nn.functional.relu
    for number in range(1, 4 if isinstance(block, Bottleneck) else 3):
        conv, norm = getattr(block, f"conv{number}"), getattr(block, f"bn{number}")
        out = norm(conv(out if number == 1 else relu(out)))
    expected = relu(out + block.downsample(x))
    torch.testing.assert_close(block(x), expected)


def test_batch_norm_in_training_uses_the_batch() -> None:
    conv, norm = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
    x = torch.randn(2, 3, 6, 6)
    out = conv_norm_relu(x, conv, norm)
    assert norm.num_batches_tracked == 1
    y = conv(x)
    centred = y - y.mean((0, 2, 3), keepdim=True)
    expected = centred / (centred.square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
    # means of 72 values of size about 1
    torch.testing.assert_close(out, expected.clamp(min=0), rtol=0, atol=2 * 72 * EPS32 * expected.abs().max().item())
    assert not torch.equal(norm.running_mean, torch.zeros(4))


def test_frozen_norm_is_scale_and_shift() -> None:
    norm = _warm(FrozenBatchNorm2d(4))
    x = torch.randn(2, 4, 3, 3)
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    shift = norm.bias - norm.running_mean * scale
    expected = x * scale[:, None, None] + shift[:, None, None]
    # two products and a sum against three roundings and a root
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=8 * EPS32 * (expected.abs().max().item() + 5))
    assert not list(norm.parameters())
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_frozen_norm_reads_what_batch_norm_wrote() -> None:
    source, target = _warm(nn.BatchNorm2d(6)), FrozenBatchNorm2d(6)
    target.load_state_dict(source.state_dict())  # strict: num_batches_tracked must not disturb
    assert all(torch.equal(source.state_dict()[name], tensor) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize("stages", range(6))
def test_freeze_resnet(stages: int) -> None:
    net = resnet18(4)
    net.freeze(stages)
    net.train()
    rooms = [["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]]
    frozen = {room for stage in rooms[:stages] for room in stage}
    assert {n.split(".")[0] for n, p in net.named_parameters() if not p.requires_grad} == frozen
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == (name.split(".")[0] not in frozen), name
    before = {n: b.clone() for n, b in net.named_buffers()}
    maps = net(torch.randn(2, 3, 64, 64))
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name]) == (name.split(".")[0] in frozen), name
    if stages < 5:
        maps[-1].sum().backward()
        assert {n.split(".")[0] for n, p in net.named_parameters() if p.grad is None} == frozen
    else:
        assert not maps[-1].requires_grad


def test_freeze_can_be_taken_back() -> None:
    net = resnet18(4)
    net.freeze(3)
    net.freeze(0)
    assert all(p.requires_grad for p in net.parameters())
    assert all(m.training for m in net.modules())


def test_freeze_vgg_before_conv3_1() -> None:
    backbone = build_backbone("vgg16")
    backbone.freeze(2)
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    # conv1_1, conv1_2, conv2_1, conv2_2 are layers 0, 2, 5 and 7
    assert frozen == {f"body.features.{i}.{kind}" for i in (0, 2, 5, 7) for kind in ("weight", "bias")}


@pytest.mark.parametrize("trunk", [lambda: resnet18(4), vgg16])
@pytest.mark.parametrize("stages", [-1, 6])
def test_freeze_out_of_range(trunk: type[ResNet], stages: int) -> None:
    with pytest.raises(ValueError, match=f"frozen_stages must be between 0 and 5 .*, got {stages}"):
        trunk().freeze(stages)


def test_vgg_has_no_fifth_pool() -> None:
    net = vgg16()
    assert net.channels == [512]
    assert sum(isinstance(m, nn.MaxPool2d) for m in net.features) == 4
    assert len(net.features) == 30  # torchvision's features[:30]


def test_fpn_by_hand() -> None:
    """One channel, laterals that pass their map through, and outputs that pick the centre: plain additions remain."""
    fpn = FPN([1, 1], 1, "maxpool")
    with torch.no_grad():
        for block in fpn.inner_blocks:
            block[0].weight.fill_(1)
        for block in fpn.layer_blocks:
            block[0].weight.zero_()
            block[0].weight[0, 0, 1, 1] = 1
    fine = torch.arange(12.0).view(1, 1, 3, 4)
    coarse = torch.tensor([[[[100.0, 200.0], [300.0, 400.0]]]])
    levels = fpn([fine, coarse])
    # a coarse cell reaches the fine cells whose row * 2 / 3 and column * 2 / 4 round down to it
    expected = torch.tensor(
        [[[[100.0, 101.0, 202.0, 203.0], [104.0, 105.0, 206.0, 207.0], [308.0, 309.0, 410.0, 411.0]]]]
    )
    assert torch.equal(levels[0], expected)
    assert torch.equal(levels[1], coarse)
    assert torch.equal(levels[2], torch.tensor([[[[100.0]]]]))
    assert len(FPN([1, 1], 1, None)([fine, coarse])) == 2


def test_fpn_refuses() -> None:
    with pytest.raises(ValueError, match="maps must have 2 entries, got 1"):
        FPN([8, 8], 4)([torch.zeros(1, 8, 2, 2)])
    with pytest.raises(ValueError, match="extra must be maxpool or None, got 'p7'"):
        FPN([8], 4, "p7")  # type: ignore[arg-type]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="the backbone must be one of tiny, .*, got 'resnet34'"):
        build_backbone("resnet34")
    with pytest.raises(ValueError, match="norm must be batch or frozen, got 'group'"):
        build_backbone("tiny", "group")  # type: ignore[arg-type]


def test_initialisation_spread() -> None:
    """He's fan-out rule: deviation sqrt(2 / (out_channels * kernel area)); pyramids: uniform of variance 1 / fan_in."""
    weight = resnet18().layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=5 / (2 * weight.numel()) ** 0.5)  # 5 sigma
    fpn = FPN([512], 256)
    weight = fpn.layer_blocks[0][0].weight
    assert weight.std().item() == pytest.approx((1 / (256 * 9)) ** 0.5, rel=5 / (2 * weight.numel()) ** 0.5)
    assert weight.abs().max().item() <= (3 / (256 * 9)) ** 0.5
    assert not fpn.layer_blocks[0][0].bias.any()


@pytest.mark.parametrize("name", ["tiny", "vgg16"])
def test_bfloat16_autocast(name: str) -> None:
    backbone = build_backbone(name)
    with torch.autocast("cpu", torch.bfloat16):
        for training in (True, False):
            levels = backbone.train(training)(torch.randn(1, 3, 64, 64))
            assert {x.dtype for x in levels} == {torch.bfloat16}
