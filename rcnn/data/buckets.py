"""Few sizes: batches padded so that their shapes repeat, which a captured step needs and a GPU's libraries like."""

from dataclasses import dataclass

import numpy as np
import torch

from rcnn.images import target_size
from rcnn.structures import Targets

#: Longer side / shorter side of the buckets, besides the longest that there can be: the shapes of most cameras.
ASPECTS = (1.0, 4 / 3, 3 / 2)
#: Rows of ground truth of the smallest capacity; larger ones are powers of two.
ROWS = 64


@dataclass(frozen=True)
class Buckets:
    """The sizes that batches are padded to: one shorter side with a few longer ones, wide and tall.

    A batch of both wide and tall images gets the square of the longest side.

    Args:
        min_size: shorter side of an image at the highest zoom, pixels.
        max_size: longer side of it at most, pixels.
        divisor: sides are multiples of it, pixels.
    """

    min_size: int
    max_size: int
    divisor: int

    @property
    def short(self) -> int:
        """The shorter side."""
        return self._whole(self.min_size)

    @property
    def longs(self) -> list[int]:
        """The longer sides, rising."""
        sides = (min(self.max_size, round(self.min_size * aspect)) for aspect in ASPECTS)
        return sorted({self._whole(side) for side in (*sides, self.max_size)})

    def shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a batch whose largest image sides are these."""
        if height <= self.short:
            return self.short, self._long(width)
        if width <= self.short:
            return self._long(height), self.short
        return self.longs[-1], self.longs[-1]

    def kinds(self, sizes: np.ndarray) -> np.ndarray:
        """Bucket of each image, ``(n,)`` int: tall ones negative, the longer the farther from 0.

        Args:
            sizes: ``(n, 2)`` int, height and width of the files, pixels.
        """
        kinds = np.zeros(len(sizes), np.int64)
        for i, (height, width) in enumerate(sizes.tolist()):
            h, w = target_size(height, width, self.min_size, self.max_size)
            kinds[i] = self.longs.index(self._long(max(h, w))) * (-1 if h > w else 1)
        return kinds

    def _whole(self, side: int) -> int:
        return -(-side // self.divisor) * self.divisor

    def _long(self, side: int) -> int:
        return next(long for long in self.longs if long >= side)


def pad_targets(targets: Targets) -> Targets:
    """The same ground truth with padding rows behind it, up to a power of two of at least :data:`ROWS`.

    No result depends on how many there are.
    """
    rows = len(targets.boxes)
    capacity = max(ROWS, 1 << (rows - 1).bit_length())
    boxes = torch.cat((targets.boxes, targets.boxes.new_zeros(capacity - rows, 4)))
    labels = torch.cat((targets.labels, targets.labels.new_zeros(capacity - rows)))
    return Targets(boxes, labels, targets.offsets, targets.image_sizes, targets.image_ids)
