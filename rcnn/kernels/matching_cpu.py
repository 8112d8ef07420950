"""The CPU body of the matcher: tiles of neighbouring boxes, each compared with the ground truth that meets it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

#: Boxes in one tile; ground truth that misses the bounding box of a tile is never compared with it.
TILE = 256
#: Pairs of a box and a ground-truth box that are compared at once.
_PAIRS = 1 << 18


def match_cpu(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    high_threshold: float,
    low_threshold: float,
    low_quality: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`rcnn.kernels.match` without its checks."""
    images, count = gt_offsets.shape[0] - 1, boxes.shape[-2]
    if count == 0:
        return gt_labels.new_zeros(images, 0), gt_labels.new_zeros(images, 0)
    tiles = _Tiles(boxes, images)
    truth = _Truth(gt_boxes, gt_offsets)
    best = tiles.full(0.0, torch.float32)
    matched = tiles.full(-1, torch.int64)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for tile, rows in tiles.meetings(truth, gt_labels > 0):
        iou = _iou(tiles.boxes(tile)[:, :, None], truth.boxes[:, rows, None])
        values, slot = iou.max(dim=1)
        best[tile] = values
        matched[tile] = rows.gather(1, slot)
        if low_quality:
            found.append((tile[:, None].expand_as(rows).reshape(-1), rows.reshape(-1), iou.amax(dim=2).reshape(-1)))
    labels = (best >= high_threshold).to(torch.int64) - ((best < high_threshold) & (best >= low_threshold)).to(
        torch.int64
    )
    if found:
        _low_quality(labels, tiles, truth, *(torch.cat(part) for part in zip(*found, strict=True)))
    for tile, rows in tiles.meetings(truth, gt_labels < 0):
        held = tiles.boxes(tile)[:, :, None]
        inside = _intersection(held, truth.boxes[:, rows, None])
        covered = ((inside > 0) & (inside >= 0.5 * held[4])).any(dim=1)
        labels[tile] = torch.where(covered & (labels[tile] == 0), -1, labels[tile])
    matched = torch.where(labels == 1, matched, -1)
    return (
        labels.reshape(images, -1)[:, :count].contiguous(),
        matched.reshape(images, -1)[:, :count].contiguous(),
    )


def _low_quality(labels: Tensor, tiles: "_Tiles", truth: "_Truth", tile: Tensor, row: Tensor, reached: Tensor) -> None:
    """Set the label of the best boxes of each ground-truth row to 1; ``reached`` is the best IoU of row in tile."""
    best = reached.new_zeros(truth.boxes.shape[1]).scatter_reduce_(0, row, reached, "amax")
    # Only the tiles that hold a best box are compared again; the same arithmetic gives the same bits.
    winners = ((reached > 0) & (reached == best[row])).nonzero().squeeze(1)
    for part in winners.split(max(1, _PAIRS // (2 * tiles.size))):
        iou = _iou(tiles.boxes(tile[part]), truth.boxes[:, row[part], None])
        pair, place = (iou == best[row[part]][:, None]).nonzero(as_tuple=True)
        labels[tile[part][pair], place] = 1


def _table(boxes: Tensor) -> Tensor:
    """``(5, ...)`` coordinates and area, apart, so that each is contiguous, of boxes ``(4, ...)`` float32.

    A box whose area is not positive and finite overlaps nothing. It becomes a point with an area of 1, so that no union
    is 0.
    """
    x1, y1, x2, y2 = boxes
    area = (x2 - x1) * (y2 - y1)
    table = torch.cat((boxes, area[None]))
    solid = (area > 0) & (area < math.inf)
    if not solid.all():
        table.masked_fill_(~solid, 0)[4].masked_fill_(~solid, 1)
    return table


def _intersection(table1: Tensor, table2: Tensor) -> Tensor:
    """``boxes.intersection`` of tables."""
    width = torch.minimum(table1[2], table2[2]).sub_(torch.maximum(table1[0], table2[0])).clamp_(min=0)
    return width.mul_(torch.minimum(table1[3], table2[3]).sub_(torch.maximum(table1[1], table2[1])).clamp_(min=0))


def _iou(table1: Tensor, table2: Tensor) -> Tensor:
    """``boxes.iou`` of tables, by the same operations."""
    inter = _intersection(table1, table2)
    return inter.div_((table1[4] + table2[4]).sub_(inter))


class _Truth:
    """Ground truth with an empty box appended as the row of no box, and the image of each row (-1 for padding)."""

    def __init__(self, gt_boxes: Tensor, gt_offsets: Tensor) -> None:
        table = _table(gt_boxes.to(torch.float32).t())
        self.boxes = torch.cat((table, table.new_tensor([[0.0], [0.0], [0.0], [0.0], [1.0]])), dim=1)
        rows = torch.arange(gt_boxes.shape[0], device=gt_boxes.device)
        image = torch.searchsorted(gt_offsets.contiguous(), rows, right=True) - 1
        self.image = torch.where(image < gt_offsets.shape[0] - 1, image, -1)


class _Tiles:
    """Boxes cut into tiles of neighbours; the last tile repeats the last box."""

    def __init__(self, boxes: Tensor, images: int) -> None:
        count = boxes.shape[-2]
        self.per_image = -(-count // TILE)
        self.size = -(-count // self.per_image)
        self.images = images
        self.shared = boxes.dim() == 2
        boxes = boxes.to(torch.float32).reshape(-1, count, 4)
        missing = self.per_image * self.size - count
        if missing:
            boxes = torch.cat((boxes, boxes[:, -1:].expand(-1, missing, 4)), dim=1)
        self.table = _table(boxes.permute(2, 0, 1).reshape(4, -1, self.size))

    def full(self, value: float, dtype: torch.dtype) -> Tensor:
        """A ``(tiles of all images, size)`` tensor of one value."""
        return torch.full((self.images * self.per_image, self.size), value, dtype=dtype, device=self.table.device)

    def boxes(self, tile: Tensor) -> Tensor:
        """``(5, n, size)`` table of the tiles, numbered over all images."""
        return self.table[:, tile % self.per_image if self.shared else tile]

    def meetings(self, truth: _Truth, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles ``(n,)`` and, padded by the zero box, the chosen ground truth ``(n, m)`` that meets their bounding box.

        Each tile comes once, with its rows rising; tiles with about as many rows come together.
        """
        nobody = truth.boxes.shape[1] - 1
        chosen = (chosen & (truth.image >= 0)).nonzero().squeeze(1)
        if not len(chosen):
            return
        slots = torch.bincount(truth.image[chosen], minlength=self.images)
        width = int(slots.max())
        if self.images * self.per_image * self.size * width <= _PAIRS:
            # So few are compared in less time than it takes to find those that meet.
            slot = torch.arange(width, device=chosen.device)
            source = ((slots.cumsum(0) - slots)[:, None] + slot).clamp_(max=len(chosen) - 1)
            rows = torch.where(slot < slots[:, None], chosen[source], nobody)
            yield (
                torch.arange(self.images * self.per_image, device=slot.device),
                rows.repeat_interleave(self.per_image, 0),
            )
            return
        pairs = []
        lowest, highest = self.table[:2].amin(dim=2), self.table[2:4].amax(dim=2)
        bounds = [corner.reshape(2, -1, self.per_image) for corner in (lowest, highest)]
        for rows in chosen.split(max(1, _PAIRS // self.per_image)):
            low, high = bounds if self.shared else (corner[:, truth.image[rows]] for corner in bounds)
            corners = truth.boxes[:, rows, None]
            meets = (torch.minimum(high, corners[2:4]) > torch.maximum(low, corners[:2])).all(dim=0)
            row, place = meets.nonzero(as_tuple=True)
            pairs.append((rows[row], truth.image[rows[row]] * self.per_image + place))
        row, tile = (torch.cat(part) for part in zip(*pairs, strict=True))
        tile, order = tile.sort(stable=True)
        row = row[order]
        tile, counts = tile.unique_consecutive(return_counts=True)
        first = counts.cumsum(0) - counts
        order = counts.argsort(descending=True)
        tile, counts, first = tile[order], counts[order], first[order]
        start, most = 0, counts.tolist()
        while start < len(most):
            width = most[start]
            stop = start + max(1, _PAIRS // (width * self.size))
            slot = torch.arange(width, device=row.device)
            source = (first[start:stop, None] + slot).clamp_(max=row.shape[0] - 1)
            yield tile[start:stop], torch.where(slot < counts[start:stop, None], row[source], nobody)
            start = stop
