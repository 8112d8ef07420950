"""What every data set is: records with boxes, class names, and a list of what was wrong with the files.

A reader (:mod:`rcnn.data.voc`, :mod:`rcnn.data.coco`) raises :class:`DataError` at once for what makes the whole data
set doubtful: a missing file, an annotation that cannot be parsed, an unknown class. A single bad object or image is
skipped and named in ``problems``, or raised too if ``strict``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NoReturn

import numpy as np

from rcnn.images import ImageError, image_size, read_image


class DataError(ValueError):
    """A data set that cannot be used; the message names the file and what was expected in it."""


@dataclass(frozen=True, eq=False)
class Record:
    """One image and its ground truth.

    Attributes:
        path: image file.
        image_id: what identifies the image in exports: COCO id, or VOC name.
        width: pixels, after EXIF orientation.
        height: pixels, after EXIF orientation.
        boxes: ``(n, 4)`` float32, x1, y1, x2, y2 in continuous pixels, inside the image, of positive area.
        labels: ``(n,)`` int64, 1..K.
        ignore: ``(n,)`` bool, true for COCO crowds and VOC's difficult objects: neither object nor background.
        areas: ``(n,)`` float32, square pixels; of the object's mask where the format gives it, else of the box.
    """

    path: Path
    image_id: int | str
    width: int
    height: int
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    areas: np.ndarray


class DetectionDataset:
    """Images with boxes.

    Args:
        name: for tables and messages, as "bccd train".
        classes: names of the K foreground classes; label k is ``classes[k - 1]``.
        records: one per image, in the order of the image set.
        problems: one sentence for each object or image that was skipped or changed, with its file.
        categories: label to the id that the data set's own files use; default: the label itself.
        strict: a bad image raises when it is read instead of being replaced.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        records: list[Record],
        problems: list[str] | None = None,
        categories: dict[int, int] | None = None,
        strict: bool = False,
    ) -> None:
        self.name = name
        self.classes = list(classes)
        self.records = records
        self.problems = problems if problems is not None else []
        self.categories = categories if categories is not None else {k: k for k in range(1, len(classes) + 1)}
        self.strict = strict

    def __len__(self) -> int:
        return len(self.records)

    def read(self, index: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """Pixels of image ``index``, ``(H, W, 3)`` uint8 RGB.

        Args:
            index: row of ``records``.
            at_least: height and width that are enough; see :func:`rcnn.images.read_image`.

        Raises:
            ImageError: the file cannot be read, or is no longer the size that it had when the data set was opened.
        """
        record = self.records[index]
        array = read_image(record.path, at_least)
        factors = (1,) if at_least is None else (1, 2, 4, 8)
        if array.shape[:2] not in [(-(-record.height // f), -(-record.width // f)) for f in factors]:
            raise ImageError(
                f"{record.path}: expected {record.width} x {record.height} pixels as when the data set was opened, "
                f"got {array.shape[1]} x {array.shape[0]}"
            )
        return array

    def __repr__(self) -> str:
        objects = sum(len(r.labels) for r in self.records)
        return f"{self.name}: {len(self)} images, {objects} objects, classes {', '.join(self.classes)}"


@dataclass
class RawObject:
    """An object as its annotation file gives it, before any check.

    Args:
        where: file and number or id of the object, for messages.
        box: x1, y1, x2, y2 as the file has them, pixels.
        label: 1..K.
        ignore: crowd or difficult.
        area: square pixels; ``None``: that of the box.
        shift: subtracted from x1 and y1 to get continuous corners: 1 where the file counts pixels from 1.
        problem: what already rules the object out, if anything does.
    """

    where: str
    box: tuple[float, float, float, float]
    label: int
    ignore: bool
    area: float | None = None
    shift: float = 0.0
    problem: str | None = None


class Collector:
    """Turns raw objects into records and keeps account of what was wrong.

    Args:
        strict: raise at the first problem.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.problems: list[str] = []
        self.records: list[Record] = []
        self._objects = 0
        self._images = 0

    def report(self, sentence: str) -> None:
        """Note a problem, or raise it.

        Raises:
            DataError: if strict.
        """
        if self.strict:
            raise DataError(sentence.removesuffix("; image skipped").removesuffix("; object skipped"))
        self.problems.append(sentence)

    def add(
        self, path: Path, image_id: int | str, objects: list[RawObject], declared: tuple[int, int] | None, source: str
    ) -> None:
        """Check one image and its objects and append their record.

        Boxes are clipped to the image; overhang beyond one pixel (more than a rounding) is reported. Objects that are
        empty, reversed, not finite or outside the image are skipped and reported, and so is an image whose header
        cannot be read.

        Args:
            path: image file, which exists.
            image_id: for :class:`Record`.
            objects: of this image.
            declared: height and width by the annotation; ``None``: not given.
            source: annotation file, for messages.

        Raises:
            DataError: all boxes of the image lie in 0..1, so they look relative; or any problem if strict.
        """
        self._images += 1
        try:
            height, width = image_size(path)
        except ImageError as error:
            self.report(f"{error}; image skipped")
            return
        if declared is not None and declared != (height, width):
            turned = ", its sides swapped (EXIF orientation?)" if declared == (width, height) else ""
            self.report(
                f"{source}: expected the size of {path.name}, {width} x {height} pixels, "
                f"got {declared[1]} x {declared[0]}{turned}; the image's own size is used"
            )
        _refuse_relative(objects, height, width)
        boxes, labels, ignore, areas = [], [], [], []
        for item in objects:
            box = self._checked(item, height, width)
            if box is not None:
                boxes.append(box)
                labels.append(item.label)
                ignore.append(item.ignore)
                areas.append((box[2] - box[0]) * (box[3] - box[1]) if item.area is None else item.area)
        self._objects += len(objects)
        self.records.append(
            Record(
                path,
                image_id,
                width,
                height,
                np.array(boxes, np.float32).reshape(-1, 4),
                np.array(labels, np.int64),
                np.array(ignore, bool),
                np.array(areas, np.float32),
            )
        )

    def finish(self, source: str) -> None:
        """Refuse a data set of which nothing usable is left.

        Args:
            source: the image set's file, for messages.

        Raises:
            DataError: no image, or no object though the files have some.
        """
        if not self.records:
            detail = f"all {self._images} are bad, the first: {self.problems[0]}" if self._images else "it lists none"
            raise DataError(f"{source}: expected at least one image, but {detail}")
        if self._objects and not any(len(r.labels) for r in self.records):
            raise DataError(
                f"{source}: expected at least one usable object, but all {self._objects} are bad, "
                f"the first: {self.problems[0]}"
            )

    def _checked(self, item: RawObject, height: int, width: int) -> tuple[float, float, float, float] | None:
        box = (item.box[0] - item.shift, item.box[1] - item.shift, item.box[2], item.box[3])
        problem = item.problem or box_problem(item.box)
        x1, y1, x2, y2 = clipped = (
            min(max(box[0], 0.0), width),
            min(max(box[1], 0.0), height),
            max(min(box[2], width), 0.0),
            max(min(box[3], height), 0.0),
        )
        if problem is None and not (np.float32(x1) < np.float32(x2) and np.float32(y1) < np.float32(y2)):
            problem = f"expected a box inside the image of {width} x {height} pixels, got {_text(item.box)}"
        if problem is not None:
            self.report(f"{item.where}: {problem}; object skipped")
            return None
        if max(abs(a - b) for a, b in zip(box, clipped, strict=True)) > 1:
            self.report(
                f"{item.where}: expected a box inside the image of {width} x {height} pixels, "
                f"got {_text(item.box)}; box clipped"
            )
        return clipped


def box_problem(box: Sequence[float]) -> str | None:
    """What is wrong with corners x1, y1, x2, y2 whatever the image, in words; ``None`` if nothing is."""
    if not all(math.isfinite(v) for v in box):
        return f"expected four finite numbers, got {_text(box)}"
    if box[0] > box[2] or box[1] > box[3]:
        return f"expected xmin < xmax and ymin < ymax, got a reversed box {_text(box)}"
    if box[0] == box[2] or box[1] == box[3]:
        return f"expected xmin < xmax and ymin < ymax, got an empty box {_text(box)}"
    return None


def inside(folder: Path, name: str, source: str) -> Path:
    """``folder / name``, for a name that a file of the data set gives.

    The check is on the name alone: links inside the folder are followed wherever the owner of the data let them lead.

    Args:
        folder: which the path must not leave.
        name: relative path.
        source: file that gives the name, for the message.

    Raises:
        DataError: the name is empty, absolute (on any system) or climbs out with ``..``.
    """
    windows = PureWindowsPath(name)
    climbs = ".." in windows.parts or windows.drive or windows.root or PurePosixPath(name).is_absolute()
    if climbs or "\0" in name or not windows.parts:
        raise DataError(f"{source}: expected a file name inside {folder}, got {name!r}")
    return folder / name


def check_classes(classes: Sequence[str], source: str) -> list[str]:
    """Foreground class names, each once and none of them background.

    Args:
        classes: names in the order of their labels 1..K.
        source: file or argument that gives them, for messages.

    Raises:
        DataError: none, an empty or a repeated name, or the background among them.
    """
    names = [str(name).strip() for name in classes]
    if not names:
        raise DataError(f"{source}: expected at least one class, got none")
    for i, name in enumerate(names):
        if not name:
            raise DataError(f"{source}: expected a name for class {i + 1}, got an empty one")
        if name.lower() in ("background", "__background__"):
            raise DataError(f"{source}: expected foreground classes only (label 0 is the background), got {name!r}")
        if name in names[:i]:
            raise DataError(f"{source}: expected each class once, got {name!r} twice")
    return names


def unknown_class(where: str, name: object, classes: Sequence[str]) -> NoReturn:
    """Raise the sentence for an object of a class that the data set does not have."""
    raise DataError(f"{where}: expected a class among {', '.join(classes)}, got {name!r}")


def _refuse_relative(objects: list[RawObject], height: int, width: int) -> None:
    sound = [o for o in objects if o.problem is None and box_problem(o.box) is None]
    if sound and min(height, width) > 2 and all(0 <= v <= 1 for o in sound for v in o.box):
        raise DataError(
            f"{sound[0].where}: expected corners in pixels of an image of {width} x {height}, "
            f"got {_text(sound[0].box)}, which look relative to the image's size (0..1)"
        )


def _text(box: Sequence[float]) -> str:
    return "(" + ", ".join(f"{v:g}" for v in box) + ")"
