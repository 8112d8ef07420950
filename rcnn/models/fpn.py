"""Feature pyramid network (Lin et al. 2016) under torchvision's parameter names."""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _enlarged(x: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour copy, which needs no arithmetic: autocast would have it in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, size=(height, width), mode="nearest")


class FPN(nn.Module):
    """Lateral 1x1 convolutions, a nearest-neighbour top-down path, and a 3x3 convolution on each level.

    Weights start from He's uniform distribution with ``a = 1`` and zero bias, as in torchvision.

    Args:
        in_channels: of the trunk's maps, from the finest on.
        out_channels: of every level.
        extra: ``maxpool`` adds one coarser level, every second cell of the last one (P6); ``None`` adds none.
    """

    def __init__(
        self, in_channels: Sequence[int], out_channels: int = 256, extra: Literal["maxpool"] | None = "maxpool"
    ) -> None:
        super().__init__()
        if extra not in ("maxpool", None):
            raise ValueError(f"extra must be maxpool or None, got {extra!r}")
        self.extra, self.out_channels = extra, out_channels
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, out_channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in in_channels
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Pyramid levels.

        Args:
            maps: one ``(B, in_channels[i], H_i, W_i)`` float map for each entry of ``in_channels``, finest first.

        Returns:
            As many levels (one more with ``extra``), each ``(B, out_channels, H_i, W_i)`` float, finest first.
        """
        if len(maps) != len(self.inner_blocks):
            raise ValueError(f"maps must have {len(self.inner_blocks)} entries, got {len(maps)}")
        inner = self.inner_blocks[-1](maps[-1])
        levels = [self.layer_blocks[-1](inner)]
        for i in range(len(maps) - 2, -1, -1):
            lateral = self.inner_blocks[i](maps[i])
            inner = lateral.add_(_enlarged(inner, lateral.shape[-2], lateral.shape[-1]))
            levels.insert(0, self.layer_blocks[i](inner))
        if self.extra:
            levels.append(F.max_pool2d(levels[-1], 1, 2))
        return levels
