"""A data set drawn on the spot: daisies and tulips in VOC layout, with nothing to download.

``python -m rcnn.data.flowers DIR`` writes it. Every picture comes from its own random generator made of the seed and
the picture's number, so the set is the same on every machine as far as Pillow and its JPEG writer are.
"""

import argparse
import errno
import json
import math
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rcnn.data import painting
from rcnn.data.painting import BACKGROUNDS, RGB, Canvas, Random
from rcnn.files import sync_folder

#: The two species, in the order of their labels 1 and 2.
CLASSES = ("daisy", "tulip")
#: Raised whenever the same count and seed give other pictures or boxes.
VERSION = 3
#: A bloom of which more than this share is hidden is marked difficult.
MAX_HIDDEN = 0.6

_MARKER = "flowers.json"
_TEMPORARY = ".VOC2007."
_TRAIN_SHARE = 5 / 7
_EMPTY_SHARE = 0.05


@dataclass(frozen=True)
class Bloom:
    """One annotated flower.

    Attributes:
        name: its species, one of :data:`CLASSES`.
        box: ``x1, y1, x2, y2`` whole pixels of the final image, continuous (``x2`` and ``y2`` exclusive): the tight
            box round the visible part of the bloom (petals and disc or cup), without stem and leaves.
        hidden: share 0..1 of the bloom that other things cover or that lies outside the image.
        truncated: whether a part lies outside the image.
    """

    name: str
    box: tuple[int, int, int, int]
    hidden: float
    truncated: bool


def draw(rng: Random, empty: bool = False) -> tuple[Image.Image, list[Bloom]]:
    """Draw one picture.

    Args:
        rng: the source of everything in it.
        empty: draw no daisy and no tulip.

    Returns:
        The RGB picture, 240 to 400 pixels a side, and its blooms (1 to 6, none where ``empty``), in no order. A bloom
        that ends up out of sight is not listed, and may leave the picture with fewer.
    """
    width, height = (int(v) for v in rng.integers(240, 401, 2))
    kind = BACKGROUNDS[rng.choice(len(BACKGROUNDS), p=(0.3, 0.18, 0.14, 0.18, 0.12, 0.08))]
    canvas = Canvas(painting.background(rng, kind, 2 * width, 2 * height))
    short = 2 * min(width, height)
    for _ in range(int(rng.integers(2 if empty else 0, 6))):
        _clutter(canvas, rng, short)
    placed = [] if empty else _plan(rng, 2 * width, 2 * height)
    totals = [_flower(canvas, rng, number, *flower, kind) for number, flower in enumerate(placed, start=1)]
    for _ in range(int(rng.integers(0, 3))):
        _clutter(canvas, rng, short * 0.7)
    _grass(canvas, rng, int(rng.integers(0, 14)) if kind in ("meadow", "bokeh", "soil") else 0)
    blooms = []
    for number, ((name, *_), total) in enumerate(zip(placed, totals, strict=True), start=1):
        seen = canvas.owner == number
        area = int(seen.sum())
        if area < 60:
            continue
        xs, ys = np.flatnonzero(seen.any(0)), np.flatnonzero(seen.any(1))
        box = (int(xs[0]) // 2, int(ys[0]) // 2, int(xs[-1]) // 2 + 1, int(ys[-1]) // 2 + 1)
        cut = bool(xs[0] == 0 or ys[0] == 0 or xs[-1] == 2 * width - 1 or ys[-1] == 2 * height - 1)
        blooms.append(Bloom(name, box, 1 - area / total, cut))
    return canvas.finish(rng), blooms


def _plan(rng: Random, width: int, height: int) -> list[tuple[str, float, float, float]]:
    """Species, place and size (canvas pixels) of each flower, from the farthest (smallest) to the nearest."""
    count = int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.16, 0.22, 0.22, 0.18, 0.12, 0.1]))
    mood = rng.random()
    tulips = 0.0 if mood < 0.3 else 1.0 if mood < 0.6 else 0.5
    short = min(width, height)
    top = 0.52 if count <= 2 else 0.42 if count <= 4 else 0.34
    sizes = np.sort(short * np.exp(rng.uniform(math.log(0.11), math.log(top), count)))
    placed: list[tuple[str, float, float, float]] = []
    for size in sizes.tolist():
        for _ in range(40):
            x, y = rng.uniform(0.06, 0.94) * width, rng.uniform(0.08, 0.86) * height
            apart = [math.hypot(x - q[1], y - q[2]) / (size + q[3]) for q in placed]
            if min(apart, default=1.0) > (0.46 if rng.random() < 0.6 else 0.27):
                name = CLASSES[int(rng.random() < tulips)]
                placed.append((name, x, y, size))
                break
    return placed


def _flower(canvas: Canvas, rng: Random, number: int, name: str, x: float, y: float, size: float, ground: str) -> int:
    """Paint one flower with its stem; returns the pixels that its bloom would cover if nothing hid it."""
    lying, low = ground == "wood", canvas.owner.shape[0] + size * 0.1
    lean = rng.uniform(-1.3, 1.3) if lying else rng.normal(0, 0.2)
    if name == "daisy":
        colour, alpha = painting.daisy(rng, size / 2)
        foot, thick, stem = (x, y), size * 0.028, rng.random() < 0.75
    else:
        colour, alpha = painting.tulip(rng, size, lean)
        foot = (x - math.sin(lean) * size * 0.47, y + math.cos(lean) * size * 0.47)
        thick, stem = size * 0.05, True
    tone = painting.green(rng)
    if stem:
        planted = ground in ("meadow", "soil") and rng.random() < 0.5
        reach = size * rng.uniform(1.2, 2.2)
        if not (lying or planted):
            reach = max(low - foot[1], 0) / max(math.cos(lean), 0.5)
        end = (foot[0] - math.sin(lean) * reach, foot[1] + math.cos(lean) * reach)
        bend = (foot[0] - math.sin(lean) * reach * 0.6 + rng.normal(0, 0.1) * size, foot[1] + reach * 0.5)
        path = painting.curve(foot, bend, end)
        if name == "tulip":
            for side in (-1, 1)[: int(rng.integers(1, 3))]:
                at = path[int(rng.integers(4, 11))]
                turn = -math.pi / 2 + side * rng.uniform(0.25, 0.7) + lean
                painting.leaf(canvas, rng, at[0], at[1], size * rng.uniform(0.7, 1.3), turn, tone)
        canvas.ribbon(path, np.full(len(path), max(thick, 1.5)), tone)
        if planted:  # a tuft hides where the stem enters the ground
            for turn in np.linspace(-2.6, -0.5, int(rng.integers(4, 8))) + rng.normal(0, 0.15):
                painting.leaf(canvas, rng, end[0], end[1] + thick, size * rng.uniform(0.2, 0.5), turn, tone)
    half = alpha.shape[0] / 2
    canvas.paint(
        colour, alpha, round(x - half), round(y - half), number, shadow=0 if ground == "sky" else rng.uniform(0.15, 0.4)
    )
    return int((alpha >= 0.5).sum())


def _clutter(canvas: Canvas, rng: Random, short: float) -> None:
    """Paint one thing that is neither a daisy nor a tulip."""
    height, width = canvas.owner.shape
    x, y = rng.uniform(0, width), rng.uniform(0.1, 1) * height
    size = short * rng.uniform(0.06, 0.22)
    kind = int(rng.choice(7, p=(0.12, 0.12, 0.13, 0.13, 0.24, 0.13, 0.13)))
    if kind == 0:
        tone = rng.uniform(110, 190)
        stone = painting.ball(rng, size / 2, (tone, tone * 0.97, tone * 0.92), rough=0.2)
        canvas.paint(*stone, round(x), round(y), shadow=0.4)
    elif kind == 1:
        berry: RGB = ((200, 30, 40), (70, 60, 150), (230, 140, 30), (90, 150, 60))[rng.integers(4)]
        canvas.paint(*painting.ball(rng, size / 3, berry), round(x), round(y), shadow=0.35)
    elif kind == 2:
        painting.mushroom(canvas, rng, x, y, size)
    elif kind == 3:
        painting.butterfly(canvas, rng, x, y, size)
    elif kind == 4:
        canvas.paint(*painting.rosette(rng, size / 2), round(x), round(y), shadow=0.3)
    else:
        dry: RGB = (rng.uniform(130, 200), rng.uniform(80, 130), rng.uniform(30, 60))
        tone_ = painting.green(rng) if kind == 5 else dry
        painting.leaf(canvas, rng, x, y, size * 1.4, rng.uniform(0, 2 * math.pi), tone_)


def _grass(canvas: Canvas, rng: Random, count: int) -> None:
    """Paint blades of grass in front of everything, from the lower edge upwards."""
    height, width = canvas.owner.shape
    for _ in range(count):
        x, tall = rng.uniform(0, width), rng.uniform(0.15, 0.5) * height
        path = painting.curve((x, height), (x, height - tall * 0.6), (x + rng.normal(0, 0.3) * tall, height - tall))
        canvas.ribbon(path, np.linspace(rng.uniform(3, 6), 0.6, len(path)), painting.green(rng))


def write(directory: str | os.PathLike[str], count: int = 280, seed: int = 0) -> Path:
    """Write the data set in VOC layout, or find it there.

    ``directory/VOC2007`` gets ``JPEGImages/000001.jpg`` and on, ``Annotations/000001.xml`` and on (1-based inclusive
    corners, as VOC has them), ``ImageSets/Main/train.txt`` (the first 5/7), ``val.txt`` (the rest) and
    ``trainval.txt``, and ``pascal_label_map.pbtxt``. About 5 % of the pictures have no flower. A bloom of which more
    than 60 % is hidden is marked difficult.

    The set is built beside ``VOC2007`` and renamed into place, so an interrupted run leaves no half of one, and two
    processes that start together end with one whole set. A folder that already holds the set of the same count, seed
    and version is left as it is.

    Args:
        directory: a folder that does not exist, is empty, or holds this set.
        count: pictures, 2 to 999999.
        seed: any integer from 0 up; another seed draws another set.

    Returns:
        ``directory`` as a path.

    Raises:
        ValueError: ``count`` or ``seed`` is out of range, or ``directory`` holds something else.
        OSError: from the file system.
    """
    if not 2 <= count <= 999999:
        raise ValueError(f"count must be 2 to 999999 pictures, got {count}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    directory = Path(directory)
    if _holds(directory, count, seed):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f"{_TEMPORARY}{secrets.token_hex(4)}.tmp"
    try:
        _write_voc(temporary, count, seed)
        os.rename(temporary, directory / "VOC2007")
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        taken = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES)
        if taken and _holds(directory, count, seed):  # another process was quicker
            return directory
        raise
    sync_folder(directory)
    return directory


def _identity(count: int, seed: int) -> dict[str, int]:
    return {"count": count, "seed": seed, "version": VERSION}


def _holds(directory: Path, count: int, seed: int) -> bool:
    """Whether the set is there already; False where there is room for it, an error where there is something else."""
    if not directory.exists():
        return False
    if not directory.is_dir():
        raise ValueError(f"{directory} must be a folder or not exist, got a file")
    if all(path.name.startswith(_TEMPORARY) for path in directory.iterdir()):  # of a run at work or killed
        return False
    try:
        found = json.loads((directory / "VOC2007" / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ValueError(f"{directory} must be empty or hold the flowers, got a folder with other files") from None
    expected = _identity(count, seed)
    if found != expected:
        raise ValueError(f"{directory} must hold the flowers of {expected}, got {found}: delete it or choose another")
    files = [f"JPEGImages/{n:06d}.jpg" for n in range(1, count + 1)]
    files += [f"Annotations/{n:06d}.xml" for n in range(1, count + 1)]
    files += [f"ImageSets/Main/{split}.txt" for split in ("train", "val", "trainval")] + ["pascal_label_map.pbtxt"]
    missing = [name for name in files if not (directory / "VOC2007" / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} must hold {len(files)} files of the flowers, got all but {len(missing)}, "
            f"for one VOC2007/{missing[0]}: delete the folder and write it again"
        )
    return True


def _text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8"))  # the same line ends on every system


def _write_voc(root: Path, count: int, seed: int) -> None:
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / name).mkdir(parents=True)
    empty = set(np.random.default_rng([seed, 0]).choice(count, round(count * _EMPTY_SHARE), replace=False).tolist())
    names = [f"{number:06d}" for number in range(1, count + 1)]
    for index, name in enumerate(names):
        image, blooms = draw(np.random.default_rng([seed, index + 1]), index in empty)
        image.save(root / "JPEGImages" / f"{name}.jpg", quality=92)
        _text(root / "Annotations" / f"{name}.xml", _annotation(name, image, blooms))
    train = min(max(1, round(count * _TRAIN_SHARE)), count - 1)
    for split, members in (("train", names[:train]), ("val", names[train:]), ("trainval", names)):
        text = "".join(f"{name}\n" for name in members)
        _text(root / "ImageSets" / "Main" / f"{split}.txt", text)
    items = "".join(f"item {{\n  id: {label}\n  name: '{name}'\n}}\n" for label, name in enumerate(CLASSES, start=1))
    _text(root / "pascal_label_map.pbtxt", items)
    _text(root / _MARKER, json.dumps(_identity(count, seed)) + "\n")


def _annotation(name: str, image: Image.Image, blooms: Sequence[Bloom]) -> str:
    objects = "".join(
        f"  <object>\n    <name>{bloom.name}</name>\n    <pose>Unspecified</pose>\n"
        f"    <truncated>{int(bloom.truncated)}</truncated>\n"
        f"    <difficult>{int(bloom.hidden > MAX_HIDDEN)}</difficult>\n"
        f"    <bndbox>\n      <xmin>{bloom.box[0] + 1}</xmin>\n      <ymin>{bloom.box[1] + 1}</ymin>\n"
        f"      <xmax>{bloom.box[2]}</xmax>\n      <ymax>{bloom.box[3]}</ymax>\n    </bndbox>\n  </object>\n"
        for bloom in blooms
    )
    return (
        f"<annotation>\n  <folder>VOC2007</folder>\n  <filename>{name}.jpg</filename>\n"
        f"  <source>\n    <database>rcnn flowers</database>\n  </source>\n"
        f"  <size>\n    <width>{image.width}</width>\n    <height>{image.height}</height>\n    <depth>3</depth>\n"
        f"  </size>\n  <segmented>0</segmented>\n{objects}</annotation>\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m rcnn.data.flowers DIR [--count N] [--seed S]``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rcnn.data.flowers", description="Write the flower data set.")
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder that is new, empty, or holds the set")
    parser.add_argument("--count", type=int, default=280, help="pictures (default: 280)")
    parser.add_argument("--seed", type=int, default=0, help="which set to draw (default: 0)")
    options = parser.parse_args(arguments)
    try:
        directory = write(options.directory, options.count, options.seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sets = directory / "VOC2007" / "ImageSets" / "Main"
    train, val = (len((sets / f"{split}.txt").read_text(encoding="utf-8").split()) for split in ("train", "val"))
    print(f"{directory}: {options.count} pictures of {' and '.join(CLASSES)} in VOC layout ({train} train, {val} val)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
