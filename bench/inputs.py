"""Made inputs with the structure of real training: objects of many sizes, and boxes that crowd around them."""

import torch
from torch import Tensor


def generator(seed: int = 0) -> torch.Generator:
    """A source of numbers that gives the same on every machine."""
    return torch.Generator().manual_seed(seed)


def objects(count: int, height: int, width: int, random: torch.Generator) -> Tensor:
    """Boxes ``(count, 4)`` inside an image: sides from 16 pixels to most of the image, as many small as large ones."""
    most = 0.9 * min(height, width)
    side = 16 * (most / 16) ** torch.rand(count, 1, generator=random)
    shape = 2 ** (torch.rand(count, 1, generator=random) - 0.5)
    extent = torch.cat((side * shape, side / shape), dim=1).clamp(max=most)
    corner = torch.rand(count, 2, generator=random) * (torch.tensor([width, height]) - extent)
    return torch.cat((corner, corner + extent), dim=1)


def around(truth: Tensor, count: int, height: int, width: int, random: torch.Generator) -> Tensor:
    """Boxes ``(count, 4)`` as a region proposal network gives them: seven in ten near an object, others anywhere."""
    near = truth[torch.randint(len(truth), (count,), generator=random)]
    extent = near[:, 2:] - near[:, :2]
    near = near + 0.15 * torch.randn(count, 4, generator=random) * extent.repeat(1, 2)
    near = torch.cat((torch.minimum(near[:, :2], near[:, 2:]), torch.maximum(near[:, :2], near[:, 2:])), dim=1)
    free = torch.rand(count, 1, generator=random) < 0.3
    boxes = torch.where(free, objects(count, height, width, random), near)
    limit = torch.tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def regions(images: int, count: int, height: int, width: int, random: torch.Generator) -> Tensor:
    """``(images * count, 5)`` regions of a batch, image after image."""
    boxes = torch.cat([around(objects(20, height, width, random), count, height, width, random) for _ in range(images)])
    return torch.cat((torch.arange(images).repeat_interleave(count)[:, None].to(boxes.dtype), boxes), dim=1)


def feature_map(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: torch.device, seed: int = 0) -> Tensor:
    """Random map ``(B, C, H, W)`` in either memory format."""
    x = torch.randn(shape, generator=generator(seed)).to(device, dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x
