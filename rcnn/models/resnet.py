"""ResNet trunks (He et al. 2015) under torchvision's parameter names, so that its published files load.

Bottlenecks put the stride on the 3x3 convolution ("v1.5"), as torchvision does. A norm whose statistics do not change
is folded into the convolution before it, which saves one pass over the activations and their copy for the backward.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rcnn.models.convolution import conv_relu, stem_relu

Norm = Literal["batch", "frozen"]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine part are constants.

    ``x * scale + shift`` with ``scale = weight / sqrt(running_var + eps)`` and ``shift = bias - running_mean * scale``.
    The buffers carry BatchNorm2d's names, so a file written by either loads into the other; ``num_batches_tracked``,
    which means nothing here, is dropped on the way in.

    Args:
        num_features: channels.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)`` float activations; the result has the input's dtype."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # BatchNorm's counter, which nothing here needs
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _norm(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "frozen":
        return FrozenBatchNorm2d(channels)
    raise ValueError(f"norm must be batch or frozen, got {norm!r}")


def conv_norm_relu(
    x: Tensor, conv: nn.Module, norm: nn.Module, *, shortcut: tuple[Tensor, Tensor | None] | None = None
) -> Tensor:
    """``relu(norm(conv(x)) + shortcut)``; a norm with fixed statistics becomes weight and bias of the convolution.

    The gradient reaches the convolution's own weight, and the norm's affine part if that trains.

    Args:
        x: ``(B, C, H, W)`` float.
        conv: Conv2d without a bias.
        norm: BatchNorm2d or :class:`FrozenBatchNorm2d` over the convolution's output.
        shortcut: of :func:`_shortcut`; None adds nothing.

    Returns:
        ``(B, C', H', W')`` float.
    """
    added, shift = (None, None) if shortcut is None else shortcut
    folded = _folded(conv, norm)
    if folded is not None:
        weight, bias = folded
        return conv_relu(x, weight, bias if shift is None else bias + shift, *_geometry(conv), added)
    out = norm(conv(x))
    if added is not None:
        out = out.add_(added if shift is None else added + shift[:, None, None])
    return F.relu_(out)


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a convolution with the norm behind it, if the norm's statistics are fixed."""
    assert isinstance(conv, nn.Conv2d)
    if not isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d) or (isinstance(norm, nn.BatchNorm2d) and norm.training):
        return None
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
    return conv.weight * scale[:, None, None, None], shift


def _geometry(conv: nn.Module) -> tuple[tuple[int, int], tuple[int, int]]:
    """Stride and padding."""
    assert isinstance(conv, nn.Conv2d) and not isinstance(conv.padding, str)
    return (conv.stride[0], conv.stride[1]), (conv.padding[0], conv.padding[1])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18 and -34)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = _norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = _norm(norm, width)
        self.downsample = _downsample(in_channels, width * self.expansion, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm_relu(x, self.conv1, self.bn1)
        return conv_norm_relu(out, self.conv2, self.bn2, shortcut=_shortcut(x, self.downsample))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions and a shortcut (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = _norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = _norm(norm, width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = _norm(norm, out_channels)
        self.downsample = _downsample(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm_relu(x, self.conv1, self.bn1)
        out = conv_norm_relu(out, self.conv2, self.bn2)
        return conv_norm_relu(out, self.conv3, self.bn3, shortcut=_shortcut(x, self.downsample))


def _downsample(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), _norm(norm, out_channels))


def _shortcut(x: Tensor, downsample: nn.Sequential | None) -> tuple[Tensor, Tensor | None]:
    """What is added to the last convolution of a block, and the bias of it where a norm was folded: one for both."""
    if downsample is None:
        return x, None
    conv, norm = downsample
    folded = _folded(conv, norm)
    if folded is None:
        return norm(conv(x)), None
    weight, bias = folded
    return F.conv2d(x, weight, None, *_geometry(conv)), bias


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Convolutions start from He's normal distribution over the fan out, norms from the identity, as in torchvision.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        blocks: blocks in each of the four stages.
        width: channels of the stem and of the first stage's inner convolutions; doubled at each stage.
        norm: ``batch`` trains with the batch's statistics, ``frozen`` keeps those of a file.

    Attributes:
        channels: of C2..C5, the maps that :meth:`forward` returns.
        strides: of C2..C5, input pixels per cell.
        stages: that :meth:`freeze` counts.
    """

    stages = 5

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], blocks: Sequence[int], width: int = 64, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.channels = [width * 2**i * block.expansion for i in range(4)]
        self.strides = [4, 8, 16, 32]
        self.frozen_stages = 0
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = _norm(norm, width)
        in_channels = [width, *self.channels[:3]]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            nn.Sequential(
                block(in_channels[i], width * 2**i, 1 if i == 0 else 2, norm),
                *(block(self.channels[i], width * 2**i, 1, norm) for _ in range(1, blocks[i])),
            )
            for i in range(4)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the four stages.

        Args:
            x: ``(B, 3, H, W)`` float, normalised pixels; any memory format, channels_last is the quick one.

        Returns:
            C2..C5, each ``(B, channels[i], ceil(H / strides[i]), ceil(W / strides[i]))`` float.
        """
        folded = _folded(self.conv1, self.bn1)
        x = conv_norm_relu(x, self.conv1, self.bn1) if folded is None else stem_relu(x, *folded)
        x = F.max_pool2d(x, 3, 2, 1)
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return maps

    def _stage(self, stage: int) -> list[nn.Module]:
        return [self.conv1, self.bn1] if stage == 1 else [getattr(self, f"layer{stage - 1}")]

    def freeze(self, stages: int) -> None:
        """Take the first ``stages`` stages out of training: 1 is the stem, 2 to 5 are ``layer1`` to ``layer4``.

        Their parameters stop requiring a gradient and their norms stay in eval mode under ``train()``.

        Raises:
            ValueError: ``stages`` is not 0..5.
        """
        if not 0 <= stages <= self.stages:
            raise ValueError(f"frozen_stages must be between 0 and {self.stages} for a ResNet, got {stages}")
        self.frozen_stages = stages
        for stage in range(1, self.stages + 1):
            for module in self._stage(stage):
                module.requires_grad_(stage > stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> "ResNet":
        super().train(mode)
        for stage in range(1, self.frozen_stages + 1):
            for module in self._stage(stage):
                module.eval()
        return self


def resnet18(width: int = 64, norm: Norm = "batch") -> ResNet:
    """ResNet-18; ``width=32`` halves every channel count (32 to 256)."""
    return ResNet(BasicBlock, (2, 2, 2, 2), width, norm)


def resnet50(norm: Norm = "batch") -> ResNet:
    """ResNet-50, v1.5."""
    return ResNet(Bottleneck, (3, 4, 6, 3), 64, norm)
