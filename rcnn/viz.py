"""Pictures of results: boxes on images, contact sheets, and the curves of a run.

Boxes and sheets need Pillow only. The curves need matplotlib (the extra ``plots``), which is imported when they are
asked for; without it nothing is drawn.
"""

import colorsys
import csv
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont

from rcnn.files import atomic_write

RGB = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]

#: Colours of the first classes of a list: far apart, and bright enough on grass, skin, asphalt and X-ray alike.
PALETTE: tuple[RGB, ...] = (
    (255, 214, 10),
    (0, 200, 255),
    (255, 64, 129),
    (118, 255, 3),
    (213, 100, 255),
    (255, 145, 0),
    (29, 233, 182),
    (255, 82, 82),
    (92, 140, 255),
    (255, 255, 255),
)


def class_colour(name: str, classes: Sequence[str] = ()) -> RGB:
    """The colour of a class, the same on every picture and in every run.

    Args:
        name: of the class.
        classes: all names; the first ten get the ten colours of :data:`PALETTE` in their order. A name that is not
            among these gets a colour made of its letters, which may come close to another's.

    Returns:
        red, green, blue in 0..255.
    """
    if name in classes[: len(PALETTE)]:
        return PALETTE[classes.index(name)]
    code = zlib.crc32(name.encode("utf-8"))
    red, green, blue = colorsys.hsv_to_rgb((code % 997) / 997, (1.0, 0.75, 0.55)[code // 997 % 3], 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: NDArray[np.uint8],
    boxes: ArrayLike,
    names: Sequence[str],
    scores: ArrayLike | None = None,
    classes: Sequence[str] = (),
) -> Image.Image:
    """Draw boxes with their names, and their scores where given, on a copy of an image.

    Lines and letters grow with the image. Small boxes are drawn over large ones, labels over all boxes, those of the
    highest score in the best place; a label stays inside the image, dodges labels already there where it can, and is
    cut short with dots where the image is narrower than its text.

    Args:
        image: ``(H, W, 3)`` uint8, RGB.
        boxes: ``(n, 4)`` x1, y1, x2, y2 in the image's pixels; what lies outside is clipped.
        names: ``n`` class names.
        scores: ``(n,)`` 0..1, shown with two decimals; ``None`` shows names alone.
        classes: all class names, for the colours, see :func:`class_colour`.

    Returns:
        An RGB picture of the image's size.

    Raises:
        ValueError: a shape, a type or a number of things is not as said.
    """
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        got = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"image must be a (H, W, 3) uint8 array, got {got}")
    corners = np.asarray(boxes, np.float64)
    corners = corners.reshape(0, 4) if corners.size == 0 else corners
    if corners.ndim != 2 or corners.shape[1] != 4:
        raise ValueError(f"boxes must have shape (N, 4), got {corners.shape}")
    if not np.isfinite(corners).all():
        raise ValueError("boxes must be finite numbers, got NaN or infinity")
    if len(names) != len(corners):
        raise ValueError(f"names must be one per box, got {len(names)} for {len(corners)} boxes")
    values = None if scores is None else np.asarray(scores, np.float64)
    if values is not None and values.shape != (len(corners),):
        raise ValueError(f"scores must have shape ({len(corners)},), got {values.shape}")

    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    short = min(picture.size)
    line = max(2, round(short / 160))
    font = ImageFont.load_default(max(11, round(short / 26)))
    limit = np.array([picture.width, picture.height] * 2)
    corners = np.clip(np.round(corners), 0, limit)
    area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
    for index in np.argsort(-area, kind="stable").tolist():
        x1, y1, x2, y2 = (int(v) for v in corners[index])
        x2, y2 = max(x2 - 1, x1), max(y2 - 1, y1)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=class_colour(names[index], classes), width=line)
    taken: list[Rectangle] = []
    for index in np.argsort(-values if values is not None else -area, kind="stable").tolist():
        text = names[index] if values is None else f"{names[index]} {values[index]:.2f}"
        place = _label(draw, font, text, corners[index], taken, class_colour(names[index], classes))
        taken.append(place)
    return picture


def _label(
    draw: ImageDraw.ImageDraw,
    font: Any,
    text: str,
    box: NDArray[Any],
    taken: list[Rectangle],
    colour: RGB,
) -> Rectangle:
    """Write one label near its box; returns the rectangle that it fills."""
    width, height = draw.im.size
    ascent, descent = font.getmetrics()
    pad = max(2, ascent // 5)
    room = width - 2 * pad
    while text and math.ceil(font.getlength(text)) > room:
        text = text.removesuffix("...")[:-1]
        text = text + "..." if text else ""
    w, h = math.ceil(font.getlength(text)) + 2 * pad, ascent + descent + pad
    x1, y1, x2, y2 = (int(v) for v in box)
    # Above the box, inside its upper edge, below it; then the same at its right end.
    spots = [(x, y) for x in (x1, x2 - w) for y in (y1 - h, y1, y2, y2 - h)]
    spots = [(min(max(x, 0), max(width - w, 0)), min(max(y, 0), max(height - h, 0))) for x, y in spots]

    def covered(spot: tuple[int, int]) -> int:
        x, y = spot
        return sum(max(0, min(x + w, c) - max(x, a)) * max(0, min(y + h, d) - max(y, b)) for a, b, c, d in taken)

    x, y = min(spots, key=covered)
    draw.rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 120
    draw.text((x + pad, y + pad // 2), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)
    return x, y, x + w, y + h


def contact_sheet(images: Sequence[Image.Image], columns: int, width: int = 1200) -> Image.Image:
    """Put pictures of any shapes side by side in rows, each row scaled to one height, without cutting any.

    Args:
        images: at least one picture.
        columns: pictures a row, from 1 up; the last row may have fewer and is then narrower.
        width: of the sheet, pixels.

    Returns:
        An RGB picture, white between the pictures.

    Raises:
        ValueError: no image, or fewer than one column.
    """
    if not images:
        raise ValueError("images must hold at least one picture, got none")
    if columns < 1:
        raise ValueError(f"columns must be 1 or more, got {columns}")
    gap = max(2, width // 200)
    columns = min(columns, len(images))
    rows, heights = [images[k : k + columns] for k in range(0, len(images), columns)], []
    for row in rows:
        room = (width - gap * (columns - 1)) * len(row) / columns
        heights.append(max(1, round(room / sum(image.width / image.height for image in row))))
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), (255, 255, 255))
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0.0
        for image in row:
            wide = height * image.width / image.height
            left, right = round(x), max(round(x + wide), round(x) + 1)
            sheet.paste(image.convert("RGB").resize((right - left, height), Image.Resampling.LANCZOS), (left, y))
            x += wide + gap
        y += height + gap
    return sheet


def save(picture: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a picture atomically, in the format that the name's ending says.

    Args:
        picture: RGB.
        path: ends in ``.jpg``, ``.jpeg``, ``.png`` or another ending that Pillow can write. Its folder must exist.

    Raises:
        ValueError: an ending that Pillow cannot write.
        OSError: from the file system.
    """
    path = Path(path)
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise ValueError(f"{path} must end in .jpg, .png or another picture format's ending, got {path.suffix!r}")
    options: dict[str, Any] = {"quality": 92} if kind in ("JPEG", "WEBP") else {}
    atomic_write(path, lambda file: picture.save(file, kind, **options))


def plot_run(
    results: str | os.PathLike[str],
    precision_recall: Mapping[str, tuple[ArrayLike, ArrayLike]],
    folder: str | os.PathLike[str],
) -> list[Path]:
    """Draw the curves of a run folder, see :func:`plot_curves`.

    Args:
        results: a ``results.csv``: one row per epoch; a file that is not there gives no epochs.
        precision_recall: class name -> (recall, precision).
        folder: where the plots go; made if it is missing.

    Returns:
        The files written.
    """
    rows: list[dict[str, Any]] = []
    if Path(results).is_file():
        with open(results, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    return plot_curves(rows, precision_recall, folder)


def plot_curves(
    rows: Sequence[Mapping[str, Any]],
    precision_recall: Mapping[str, tuple[ArrayLike, ArrayLike]],
    folder: str | os.PathLike[str],
) -> list[Path]:
    """Draw the losses and the AP over the epochs, and precision over recall per class.

    Args:
        rows: one per epoch, with ``epoch`` and any of the columns ``loss``, ``loss_*``, ``val_loss*``, ``AP*`` and
            ``*_AP``; numbers or their text. Missing, empty and non-finite cells are left out of their line.
        precision_recall: class name -> (recall ``(n,)``, precision ``(n,)``), 0..1.
        folder: where ``loss.png``, ``ap.png`` and ``precision_recall.png`` go; made if it is missing. A plot without
            a single point is not drawn.

    Returns:
        The files written: none where matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        return []
    folder = Path(folder)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    total = [name for name in columns if name in ("loss", "val_loss")]
    parts = [name for name in columns if name.startswith(("loss_", "val_loss_"))]
    ap = [name for name in columns if name.startswith("AP") or name.endswith("_AP")]
    written = []
    for file, names, label, top in (("loss.png", total + parts, "loss", None), ("ap.png", ap, "AP", 1.0)):
        lines = {name: _line(rows, name) for name in names}
        lines = {name: line for name, line in lines.items() if line[0]}
        if lines:
            written.append(_plot(folder / file, lines, "epoch", label, top))
    curves = {name: (np.asarray(r).tolist(), np.asarray(p).tolist()) for name, (r, p) in precision_recall.items()}
    curves = {name: line for name, line in curves.items() if line[0]}
    if curves:
        written.append(_plot(folder / "precision_recall.png", curves, "recall", "precision", 1.0, 1.0))
    return written


def _line(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The epochs and the values of a column, where both are finite numbers."""
    points = [(_number(row.get("epoch")), _number(row.get(name))) for row in rows]
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in points], [y for _, y in points]


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _plot(
    path: Path,
    lines: Mapping[str, tuple[list[float], list[float]]],
    x_label: str,
    y_label: str,
    top: float | None,
    right: float | None = None,
) -> Path:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window, no display needed

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(name.removeprefix("val_") for name in lines))
    for name, (xs, ys) in lines.items():  # a loss and its validation share a colour
        colour, dashed = f"C{kinds.index(name.removeprefix('val_')) % 10}", "--" if name.startswith("val_") else "-"
        axes.plot(xs, ys, dashed, label=name, color=colour, linewidth=1.8, marker="." if len(xs) < 3 else None)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_ylim(0, None if top is None else top * 1.02)
    if right is not None:
        axes.set_xlim(0, right * 1.02)
    axes.grid(alpha=0.3)
    if len(lines) <= 24:
        axes.legend(fontsize="small", ncols=1 + len(lines) // 9)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return path
