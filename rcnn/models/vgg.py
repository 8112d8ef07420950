"""The trunk of VGG-16 (Simonyan and Zisserman 2014, configuration D) under torchvision's parameter names.

Its fully connected layers fc6 and fc7 (``classifier.0`` and ``classifier.3`` in a published file) are the RoI head's
hidden layers; :mod:`rcnn.models.weights` takes them there.
"""

from torch import Tensor, nn

from rcnn.models.convolution import conv_relu

#: Output channels of the convolutions, all 3x3, of each block; a 2x2 max pool stands between two blocks.
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """The convolutions of VGG-16 up to conv5_3 and its ReLU; no pool5, so the stride is 16.

    Convolutions start from He's normal distribution over the fan out with zero bias, as in torchvision.

    Attributes:
        channels: of the one map that :meth:`forward` returns.
        strides: of that map, input pixels per cell.
        stages: blocks of convolutions, that :meth:`freeze` counts.
    """

    stages = len(BLOCKS)

    def __init__(self) -> None:
        super().__init__()
        self.channels = [BLOCKS[-1][-1]]
        self.strides = [2 ** (len(BLOCKS) - 1)]
        layers: list[nn.Module] = []
        in_channels = 3
        for i, block in enumerate(BLOCKS):
            if i > 0:
                layers.append(nn.MaxPool2d(2, 2))
            for out_channels in block:
                layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.ReLU(inplace=True)]
                in_channels = out_channels
        self.features = nn.Sequential(*layers)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The map of conv5_3.

        Args:
            x: ``(B, 3, H, W)`` float, normalised pixels; any memory format, channels_last is the quick one.

        Returns:
            One ``(B, 512, H // 16, W // 16)`` float map.
        """
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                assert module.bias is not None
                x = conv_relu(x, module.weight, module.bias, padding=(1, 1))  # with the ReLU behind it
            elif isinstance(module, nn.MaxPool2d):
                x = module(x)
        return [x]

    def freeze(self, stages: int) -> None:
        """Take the convolutions of the first ``stages`` blocks out of training; 2 freezes all before conv3_1.

        Raises:
            ValueError: ``stages`` is not 0..5.
        """
        if not 0 <= stages <= self.stages:
            raise ValueError(f"frozen_stages must be between 0 and {self.stages} for VGG-16, got {stages}")
        stage = 1
        for module in self.features:
            stage += isinstance(module, nn.MaxPool2d)
            module.requires_grad_(stage > stages)


def vgg16() -> VGG16:
    """The trunk of VGG-16."""
    return VGG16()
