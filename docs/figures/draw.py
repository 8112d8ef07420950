"""The figures of docs/how-the-kernels-work.md: ``python docs/figures/draw.py [FOLDER]`` writes them as SVG.

What they show is computed by the package itself, on small inputs.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from rcnn import boxes, kernels

matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rcnn", "font.size": 9})

BLUE, ORANGE, GREEN, GREY, RED = "#2563eb", "#ea580c", "#16a34a", "#9ca3af", "#dc2626"

FIGURES: dict[str, Callable[[], Figure]] = {}


def figure(function: Callable[[], Figure]) -> Callable[[], Figure]:
    """Note a function under its name as a figure."""
    FIGURES[function.__name__] = function
    return function


def canvas(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A white figure, inches, with bare axes in a row."""
    made = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = made.subplots(1, columns, squeeze=False)[0].tolist()
    for one in axes:
        one.set_aspect("equal")
        one.axis("off")
    return made, axes


def draw(axes: Axes, box: torch.Tensor | list[float], colour: str, width: float = 1.5, **style: object) -> None:
    """A box x1, y1, x2, y2."""
    x1, y1, x2, y2 = (float(v) for v in box)
    style = {"fill": False, "linewidth": width, "edgecolor": colour, **style}
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **style))


def grid(axes: Axes, columns: int, rows: int, cell: float = 1.0) -> None:
    """A grid of cells with the origin at the top left, as in pictures."""
    for x in range(columns + 1):
        axes.plot([x * cell] * 2, [0, rows * cell], color=GREY, linewidth=0.5)
    for y in range(rows + 1):
        axes.plot([0, columns * cell], [y * cell] * 2, color=GREY, linewidth=0.5)
    axes.set_xlim(-0.05 * cell, columns * cell + 0.05 * cell)
    axes.set_ylim(rows * cell + 0.05 * cell, -0.05 * cell)


@figure
def step() -> Figure:
    """What passes what in a training step."""
    made, (axes,) = canvas(9, 3.1)
    axes.set_aspect("auto")
    places = {
        "images\n(B, 3, H, W)": (0, 1, GREY),
        "trunk, pyramid": (1, 1, GREY),
        "RPN head": (2, 1, GREY),
        "proposals": (3, 1, BLUE),
        "match_proposals": (4, 1, BLUE),
        "roi_align": (5, 1, BLUE),
        "RoI head": (6, 1, GREY),
        "two losses": (7, 1, GREEN),
        "anchors": (2, 0, BLUE),
        "match_anchors": (3, 0, BLUE),
        "two losses ": (4, 0, GREEN),
        "targets\n(G, 4)": (1, 0, GREY),
    }
    for text, (x, y, colour) in places.items():
        draw(axes, [x - 0.4, y - 0.2, x + 0.4, y + 0.2], colour, facecolor=colour + "22", fill=True)
        axes.text(x, y, text, ha="center", va="center", fontsize=7.5)

    def arrow(a: tuple[float, float], b: tuple[float, float], bend: float = 0.0) -> None:
        style = f"arc3,rad={bend}"
        patch = FancyArrowPatch(a, b, arrowstyle="-|>", mutation_scale=9, color="0.3", connectionstyle=style)
        axes.add_patch(patch)

    for x in range(7):
        arrow((x + 0.4, 1), (x + 0.6, 1))
    for x in (2, 3):
        arrow((x + 0.4, 0), (x + 0.6, 0))
    arrow((2, 0.8), (4, 0.2))
    arrow((2.3, 0.2), (2.8, 0.8))
    arrow((1.2, -0.2), (3.0, -0.2), 0.25)
    arrow((1.1, 0.2), (4.0, 0.8), -0.12)
    arrow((1, 1.2), (5, 1.2), -0.25)
    axes.text(3, 1.75, "features", ha="center", fontsize=7.5)
    axes.set_xlim(-0.5, 7.5)
    axes.set_ylim(-0.6, 1.9)
    return made


@figure
def anchors() -> Figure:
    """The anchors of one cell, and their centres on the map."""
    made, (left, right) = canvas(7, 3.2, 2)
    cells = kernels.cell_anchors([32, 64], [0.5, 1.0, 2.0])
    for row, anchor in enumerate(cells):
        draw(left, anchor, (BLUE, ORANGE)[row % 2])
    left.plot(0, 0, "k.", markersize=5)
    left.set_xlim(-50, 50)
    left.set_ylim(50, -50)
    left.set_title("cell_anchors([32, 64], [0.5, 1, 2])", fontsize=8)
    grid(right, 6, 4, 16)
    placed = kernels.anchors(cells[None], [(4, 6)], [16])
    for x in range(6):
        for y in range(4):
            right.plot(16 * x, 16 * y, "k.", markersize=4)
    draw(right, placed[(2 * 6 + 3) * 6 + 2], BLUE)
    right.set_title("the third anchor of row 2, column 3: cell + (3 · 16, 2 · 16)", fontsize=8)
    return made


@figure
def matching() -> Figure:
    """Labels of a grid of anchors, and the tile that never meets a distant box."""
    made, (axes,) = canvas(7, 3.6)
    cells = kernels.cell_anchors([24.0], [1.0])
    found = kernels.anchors(cells[None], [(9, 20)], [10])
    truth = torch.tensor([[22.0, 18, 50, 44], [138, 48, 160, 74]])
    labels, _ = kernels.match(
        found,
        truth,
        torch.tensor([1, 1]),
        torch.tensor([0, 2]),
        high_threshold=0.7,
        low_threshold=0.3,
        allow_low_quality_matches=True,
    )
    for value, colour, name in ((0, GREY, "negative"), (-1, ORANGE, "ignored"), (1, GREEN, "positive")):
        chosen = found[labels[0] == value]
        centres = (chosen[:, :2] + chosen[:, 2:]) / 2
        axes.scatter(centres[:, 0], centres[:, 1], s=14, color=colour, label=f"{name} ({len(chosen)})")
    for anchor in found[labels[0] == 1]:
        draw(axes, anchor, GREEN, 0.8)
    for box in truth:
        draw(axes, box, BLUE, 2)
    for start in (0, 60, 120):
        tile = found.reshape(9, 20, 4)[0:9, start // 10 : start // 10 + 6].reshape(-1, 4)
        draw(axes, [*tile[:, :2].amin(0).tolist(), *tile[:, 2:].amax(0).tolist()], RED, 0.8, linestyle="--")
    axes.set_xlim(-14, 206)
    axes.set_ylim(96, -14)
    axes.legend(loc="upper right", fontsize=7)
    return made


@figure
def sampling() -> Figure:
    """The smallest keys are drawn."""
    made, (axes,) = canvas(7, 2.0)
    axes.set_aspect("auto")
    keys = torch.rand(40, generator=torch.Generator().manual_seed(1)).tolist()
    chosen = sorted(range(40), key=lambda index: keys[index])[:8]
    axes.bar(range(40), keys, color=[GREEN if index in chosen else GREY for index in range(40)])
    axes.axhline(max(keys[index] for index in chosen), color=RED, linewidth=1, linestyle="--")
    axes.text(39.6, max(keys[index] for index in chosen) + 0.03, "the eighth smallest key", ha="right", color=RED)
    axes.text(0, 1.05, "key of each candidate: hash(seed, step, picture, index)", fontsize=8)
    return made


@figure
def nms() -> Figure:
    """Greedy suppression as a fixed point."""
    made, (left, right) = canvas(8, 3.4, 2)
    rows = torch.tensor(
        [
            [4.0, 4, 24, 24],
            [7, 6, 27, 26],
            [10, 8, 30, 28],
            [34, 5, 52, 27],
            [36, 7, 54, 29],
            [13, 10, 33, 30],
            [38, 4, 56, 24],
        ]
    )
    count, threshold = len(rows), 0.5
    overlap = boxes.iou(rows[:, None], rows[None]) > threshold
    earlier = torch.triu(overlap, 1)  # [i, j]: i comes first and overlaps j
    rounds = [torch.ones(count, dtype=torch.bool)]
    while len(rounds) < 2 or not torch.equal(rounds[-1], rounds[-2]):
        rounds.append(~(earlier & rounds[-1][:, None]).any(0))
    kept = kernels.nms(rows, torch.arange(count, 0, -1).float(), threshold).tolist()
    assert rounds[-1].nonzero().flatten().tolist() == sorted(kept)
    for row in reversed(range(count)):
        draw(left, rows[row], GREEN if row in kept else GREY, 2 if row in kept else 1)
        left.text(float(rows[row, 0]) + 0.6, float(rows[row, 1]) + 2.4, str(row), fontsize=8)
    left.set_xlim(0, 60)
    left.set_ylim(34, 0)
    left.set_title("boxes by falling score; IoU > 0.5 strikes", fontsize=8)
    for number, state in enumerate(rounds):
        for row in range(count):
            colour = GREEN if state[row] else GREY
            draw(right, [row, number, row + 0.9, number + 0.9], colour, facecolor=colour + "55", fill=True)
            right.text(row + 0.45, number + 0.5, str(row), ha="center", va="center", fontsize=8)
        right.text(-0.3, number + 0.5, f"round {number}", ha="right", va="center", fontsize=8)
    right.set_xlim(-2.2, count + 0.2)
    right.set_ylim(len(rounds) + 0.2, -0.2)
    right.set_title("keep = those that no kept box before them overlaps", fontsize=8)
    return made


@figure
def select() -> Figure:
    """A radix select finds the key of the last anchor to take, digit by digit."""
    made, axes = canvas(8, 2.4, 2)
    generator = torch.Generator().manual_seed(0)
    keys = (torch.randn(4000, generator=generator) * 90 + 500).clamp(0, 1023).long()
    wanted, above = 1000, 0
    prefix = 0
    for number, one in enumerate(axes):
        one.set_aspect("auto")
        shift = 5 * (1 - number)
        members = keys if number == 0 else keys[keys >> 5 == prefix]
        counts = torch.bincount((members >> shift) & 31, minlength=32)
        total, digit = above, 31
        while total + int(counts[digit]) < wanted:
            total += int(counts[digit])
            digit -= 1
        one.bar(range(32), counts, color=[GREEN if d > digit else RED if d == digit else GREY for d in range(32)])
        one.set_title(
            f"digit {number + 1}: {total} of the {wanted} lie above; the last lies in bin {digit}", fontsize=8
        )
        above, prefix = total, digit
    return made


@figure
def roi_align() -> Figure:
    """Samples of one bin, and the tile that owns the cells in the backward pass."""
    made, (left, right) = canvas(8, 3.4, 2)
    grid(left, 9, 7)
    region = [1.3, 1.2, 7.9, 5.6]
    draw(left, region, BLUE, 2)
    width, height = (region[2] - region[0]) / 3, (region[3] - region[1]) / 3
    for i in range(1, 3):
        left.plot([region[0] + i * width] * 2, [region[1], region[3]], color=BLUE, linewidth=0.8)
        left.plot([region[0], region[2]], [region[1] + i * height] * 2, color=BLUE, linewidth=0.8)
    for i in range(2):
        for j in range(2):
            x, y = region[0] + width * (1 + (i + 0.5) / 2), region[1] + height * (1 + (j + 0.5) / 2)
            left.plot(x, y, "o", color=RED, markersize=4)
            for cx in (int(x - 0.5), int(x - 0.5) + 1):
                for cy in (int(y - 0.5), int(y - 0.5) + 1):
                    draw(left, [cx, cy, cx + 1, cy + 1], ORANGE, 0.5, facecolor=ORANGE + "33", fill=True)
    left.set_title("3 x 3 bins, 2 x 2 samples: the middle bin reads these cells", fontsize=8)
    grid(right, 16, 12)
    for x in range(0, 16, 8):
        for y in range(0, 12, 8):
            draw(right, [x, y, x + 8, min(y + 8, 12)], GREEN, 2)
    draw(right, [0, 0, 8, 8], GREEN, 2, facecolor=GREEN + "22", fill=True)
    for region, colour in (([1, 2, 6, 7], BLUE), ([5, 4, 13, 10], BLUE), ([10, 1, 15, 5], GREY)):
        draw(right, region, colour, 1.5)
    right.set_title("backward: the block of a tile adds what its regions send, in order", fontsize=8)
    return made


@figure
def roi_pool() -> Figure:
    """Bins are whole cells, and may share some."""
    made, (axes,) = canvas(4.6, 3.4)
    grid(axes, 10, 7)
    region = [1.2, 0.8, 8.1, 5.7]
    draw(axes, region, BLUE, 1.2, linestyle="--")
    x1, y1, x2, y2 = (round(v) for v in region)
    draw(axes, [x1, y1, x2 + 1, y2 + 1], BLUE, 2)
    width, height = (x2 - x1 + 1) / 3, (y2 - y1 + 1) / 3
    for i in range(3):
        for j in range(3):
            low_x, high_x = int(i * width) + x1, -int(-(i + 1) * width // 1) + x1
            low_y, high_y = int(j * height) + y1, -int(-(j + 1) * height // 1) + y1
            colour = (ORANGE, GREEN)[(i + j) % 2]
            draw(axes, [low_x, low_y, high_x, high_y], colour, 0.8, facecolor=colour + "2a", fill=True)
    axes.set_title("the region snaps to cells; a bin takes every cell that it touches", fontsize=8)
    return made


@figure
def laws() -> Figure:
    """The four numbers of an IoU."""
    made, (axes,) = canvas(4.2, 2.6)
    one, other = torch.tensor([0.0, 0, 6, 4]), torch.tensor([3.0, 1, 9, 5])
    draw(axes, one, BLUE, 2)
    draw(axes, other, ORANGE, 2)
    shared = torch.cat((torch.maximum(one, other)[:2], torch.minimum(one, other)[2:]))
    draw(axes, shared, GREEN, 0, facecolor=GREEN + "55", fill=True)
    value = float(boxes.iou(one, other))
    inter = float(boxes.intersection(one, other))
    text = f"{inter:g} / (({float(boxes.area(one)):g} + {float(boxes.area(other)):g}) - {inter:g}) = {value:.4f}"
    axes.set_title(f"IoU = {text}", fontsize=8)
    axes.set_xlim(-0.5, 9.5)
    axes.set_ylim(5.4, -0.4)
    return made


def main(folder: Path) -> None:
    """Write every figure into ``folder``."""
    for name, function in FIGURES.items():
        function().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
