"""What the network gets in one step, and how it travels to a GPU.

For a GPU the workers send pixels as they are: unpadded rows in one block of bytes. The block crosses in page-locked
memory on a stream of its own, while the GPU works on the batch before, and is flipped and padded there.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcnn.images import PADDING, ImageError
from rcnn.structures import Targets


@dataclass(frozen=True)
class Batch:
    """What the network gets in one step.

    Attributes:
        images: ``(B, 3, H, W)`` uint8 RGB, padded at the right and bottom.
        targets: ground truth in pixels of ``images``; label -1 where the record says ignore.
        indices: B rows of ``dataset.records``.
        scales: ``(B, 2)`` float32, original height / resized height and the same of the widths: y and x times these
            are pixels of the original image (if nothing was flipped).
        skipped: one sentence for each image of the batch that could not be read, with its path. In training the next
            readable record takes its place; in evaluation a blank image of its size does, so that each record is
            still there exactly once.
    """

    images: Tensor
    targets: Targets
    indices: list[int]
    scales: Tensor
    skipped: list[str]

    def to(self, device: "torch.device | str", non_blocking: bool = False) -> "Batch":
        """The same batch with images, targets and scales on ``device``."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            scales=self.scales.to(device, non_blocking=non_blocking),
        )

    def tensors(self) -> list[Tensor]:
        """Images, the fields of the targets, and scales."""
        return [self.images, *(getattr(self.targets, f.name) for f in fields(self.targets)), self.scales]


@dataclass(frozen=True)
class Packed:
    """A batch on its way: pixels one after another in one block.

    Attributes:
        pixels: uint8; image after image, row after row, RGB, without padding and before the flips.
        sizes: height and width of each image, pixels.
        flips: whether each image is mirrored left to right, and top to bottom; boxes already are.
        shape: height and width of the padded batch, pixels.
        rest: the batch, whose ``images`` are empty.
    """

    pixels: Tensor
    sizes: list[tuple[int, int]]
    flips: list[tuple[bool, bool]]
    shape: tuple[int, int]
    rest: Batch

    @staticmethod
    def of(
        arrays: Sequence[np.ndarray], flips: Sequence[tuple[bool, bool]], shape: tuple[int, int], rest: Batch
    ) -> "Packed":
        """Pack ``(H_b, W_b, 3)`` uint8 arrays, none larger than ``shape``."""
        pixels = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
        return Packed(pixels, [(a.shape[0], a.shape[1]) for a in arrays], list(flips), shape, rest)

    def pin_memory(self) -> "Packed":
        """The same in page-locked memory, from which a copy to a GPU runs beside its work."""
        targets, rest = self.rest.targets, self.rest
        pinned: dict[str, Any] = {f.name: getattr(targets, f.name).pin_memory() for f in fields(targets)}
        rest = replace(rest, targets=Targets(**pinned), scales=rest.scales.pin_memory())
        return replace(self, pixels=self.pixels.pin_memory(), rest=rest)

    def unpack(self, device: torch.device | str = "cpu") -> Batch:
        """The batch on a device: sent there, flipped and padded with :data:`rcnn.images.PADDING`.

        Nobody waits; on a GPU all of it is queued on the current stream.
        """
        pixels = self.pixels.to(device, non_blocking=True)
        images = torch.empty(len(self.sizes), 3, *self.shape, dtype=torch.uint8, device=device)
        for channel, value in enumerate(PADDING):
            images[:, channel].fill_(value)
        start = 0
        for image, (height, width), (mirrored, upside_down) in zip(images, self.sizes, self.flips, strict=True):
            stop = start + 3 * height * width
            picture = pixels[start:stop].view(height, width, 3).permute(2, 0, 1)
            axes = [axis for axis, flip in ((1, upside_down), (2, mirrored)) if flip]
            image[:, :height, :width] = picture.flip(axes) if axes else picture
            start = stop
        return replace(self.rest.to(device, non_blocking=True), images=images)


def uploaded(batches: "Iterable[Packed | ImageError]", device: torch.device) -> "Iterator[Batch | ImageError]":
    """Batches on a GPU, each sent on a stream of its own; errors pass through.

    The caller queues a step and asks for the next batch while the GPU is busy: that batch's bytes then cross beside the
    step's work, and the step after it begins when they are there. The host waits only for the loader.
    """
    stream = torch.cuda.Stream(device)
    for item in batches:
        if isinstance(item, ImageError):
            yield item
            continue
        with torch.cuda.stream(stream):
            batch = item.unpack(device)
        consumer = torch.cuda.current_stream(device)
        consumer.wait_stream(stream)
        for tensor in batch.tensors():
            tensor.record_stream(consumer)  # else its memory would be the side stream's as soon as Python drops it
        yield batch
