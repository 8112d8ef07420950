"""The COCO format: one JSON file of images, annotations and categories per split.

Found are ``annotations/instances_SPLIT.json`` (in the data folder or its ``data``; ``train`` also finds
``instances_train2017.json``) with images in ``images/SPLIT``, ``SPLIT`` or ``images``, and
``SPLIT/_annotations.coco.json`` with images beside it (``val`` also finds ``valid``).
"""

import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rcnn.data.dataset import (
    Collector,
    DataError,
    DetectionDataset,
    RawObject,
    box_problem,
    check_classes,
    inside,
    unknown_class,
)


def coco_annotations(root: "str | Path") -> dict[str, Path]:
    """Annotation files of a COCO data folder by split, as ``{"train2017": .../instances_train2017.json}``."""
    root = Path(root)
    found: dict[str, Path] = {}
    for file in sorted(root.glob("*/_annotations.coco.json")):
        found[file.parent.name] = file
    for base in (root / "data", root):
        for file in sorted(base.glob("annotations/instances_*.json")):
            found[file.stem.removeprefix("instances_")] = file
    return found


class COCODataset(DetectionDataset):
    """A data set in COCO format.

    Labels 1..K follow the categories by rising id, whatever gaps the ids have; ``categories`` maps back. ``iscrowd``
    objects become ignore regions. Images without annotations are kept. Everything is checked when the data set is
    opened, but for damage behind an image's header.

    Args:
        root: data folder.
        split: as in the annotation file's name, with or without the year: ``train``, ``val2017``.
        classes: names of the foreground classes in the order of their labels; default: the file's categories.
        strict: raise at the first bad object or image instead of skipping and reporting it.

    Raises:
        DataError: a folder, annotation file or image is missing, the file does not parse or names a file outside the
            data folder, ids are repeated or refer to nothing, a value has the wrong type, all boxes of an image look
            relative, or nothing usable is left.

    Source:
        https://cocodataset.org/#format-data
    """

    def __init__(
        self, root: "str | Path", split: str, classes: Sequence[str] | None = None, *, strict: bool = False
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"{root}: expected a data folder, but there is none")
        name, file = _find_split(root, split)
        content = _read(file)
        names, by_id, categories = _categories(content["categories"], classes, file)
        objects = _objects(content["annotations"], by_id, names, file)
        collector = Collector(strict)
        folders = _image_folders(name, file)
        known: set[int] = set()
        for number, image in enumerate(content["images"], 1):
            where = f"{file}: image {number}"
            image_id, file_name = _integer(image, "id", where), image.get("file_name")
            if not isinstance(file_name, str):
                raise DataError(f"{where}: expected a string as file_name, got {file_name!r}")
            if image_id in known:
                raise DataError(f"{where}: expected each image id once, got {image_id} again")
            known.add(image_id)
            path = _image_path(folders, file_name, where)
            height, width = image.get("height"), image.get("width")
            declared = None
            if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
                declared = (height, width)
            collector.add(path, image_id, objects.pop(image_id, []), declared, where)
        if objects:
            image_id, orphans = next(iter(objects.items()))
            raise DataError(f"{orphans[0].where}: expected the id of an image in this file, got image_id {image_id}")
        collector.finish(str(file))
        super().__init__(
            f"{root.resolve().name} {split}", names, collector.records, collector.problems, categories, strict
        )


def to_coco(dataset: DetectionDataset) -> dict[str, Any]:
    """Ground truth of a data set as the content of a COCO annotation file.

    Image ids are the records' own where all are integers, else their positions. Category ids are the data set's own.
    Ignore regions get ``iscrowd`` 1. Annotation ids count from 1: pycocotools takes an object of id 0 for unmatched.

    Args:
        dataset: any data set.

    Returns:
        A dict of plain numbers, strings, lists and dicts with ``images``, ``annotations`` and ``categories``;
        ``file_name`` is relative to the folder that all images share.
    """
    own = all(isinstance(record.image_id, int) for record in dataset.records)
    folder = os.path.commonpath([record.path.absolute().parent for record in dataset.records]) if len(dataset) else ""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, record in enumerate(dataset.records):
        image_id = record.image_id if own else index
        file_name = record.path.absolute().relative_to(folder).as_posix()
        images.append({"id": image_id, "file_name": file_name, "width": record.width, "height": record.height})
        rows = zip(
            record.boxes.tolist(), record.labels.tolist(), record.ignore.tolist(), record.areas.tolist(), strict=True
        )
        for (x1, y1, x2, y2), label, ignore, area in rows:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": dataset.categories[label],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(ignore),
                }
            )
    categories = [{"id": dataset.categories[k], "name": name} for k, name in enumerate(dataset.classes, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _find_split(root: Path, split: str) -> tuple[str, Path]:
    """Full name and annotation file of a split."""
    found = coco_annotations(root)
    years = [name for name in found if re.fullmatch(re.escape(split) + r"\d+", name)]
    for name in (split, *(years if len(years) == 1 else ()), *(("valid",) if split == "val" else ())):
        if name in found:
            return name, found[name]
    expected = "exactly one annotation file" if years else "an annotation file"
    raise DataError(
        f"{root}: expected {expected} for split {split!r}, got {', '.join(years or sorted(found)) or 'no split at all'}"
    )


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: expected JSON, but it does not parse ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected a JSON object, got {type(content).__name__}")
    for part in ("images", "annotations", "categories"):
        items = content.get(part)
        if not isinstance(items, list):
            got = "none" if items is None else type(items).__name__
            raise DataError(f"{file}: expected a list {part!r}, got {got}")
        for number, item in enumerate(items, 1):
            if not isinstance(item, dict):
                raise DataError(f"{file}: {part} {number}: expected a JSON object, got {item!r}")
    return content


def _categories(
    items: list[dict[str, Any]], classes: Sequence[str] | None, file: Path
) -> tuple[list[str], dict[int, str], dict[int, int]]:
    """Class names; name of each category id; label to category id."""
    by_id: dict[int, str] = {}
    for number, item in enumerate(items, 1):
        where = f"{file}: category {number}"
        key, name = _integer(item, "id", where), item.get("name")
        if not isinstance(name, str):
            raise DataError(f"{where}: expected a string as name, got {name!r}")
        if key in by_id:
            raise DataError(f"{where}: expected each category id once, got {key} again")
        by_id[key] = name.strip()
    by_id = dict(sorted(by_id.items()))
    # Roboflow's exports begin with a category of id 0 that only groups the others and labels nothing.
    group = next((i for i in items if i["id"] == 0 and i.get("supercategory") == "none"), None)
    if group is not None and any(i.get("supercategory") == group["name"] for i in items):
        del by_id[0]
    names = check_classes(list(by_id.values()), str(file)) if classes is None else check_classes(classes, "classes")
    id_of = {name: key for key, name in by_id.items()}
    free = itertools.count(max(by_id, default=0) + 1)
    categories = {label: id_of[name] if name in id_of else next(free) for label, name in enumerate(names, 1)}
    return names, by_id, categories


def _objects(
    items: list[dict[str, Any]], by_id: dict[int, str], names: list[str], file: Path
) -> dict[int, list[RawObject]]:
    """Objects of each image by its id, in the file's order."""
    objects: dict[int, list[RawObject]] = {}
    labels = {name: label for label, name in enumerate(names, 1)}
    for number, item in enumerate(items, 1):
        where = f"{file}: annotation {item['id']}" if "id" in item else f"{file}: annotation number {number}"
        image_id, category = _integer(item, "image_id", where), _integer(item, "category_id", where)
        if category not in by_id:
            raise DataError(f"{where}: expected the id of a category in this file, got category_id {category}")
        if by_id[category] not in labels:
            unknown_class(where, by_id[category], names)
        box, problem = _box(item.get("bbox"))
        crowd, area = item.get("iscrowd", 0), item.get("area", -1)
        if crowd not in (0, 1):
            problem = problem or f"expected 0 or 1 as iscrowd, got {crowd!r}"
        if not _is_number(area) or not 0 <= area < math.inf:
            area = None
        objects.setdefault(image_id, []).append(
            RawObject(where, box, labels[by_id[category]], crowd == 1, area, problem=problem)
        )
    return objects


def _box(bbox: Any) -> tuple[tuple[float, float, float, float], str | None]:
    """Corners of ``[x, y, width, height]``, and what is wrong with it."""
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_number(v) for v in bbox):
        return (0.0, 0.0, 0.0, 0.0), f"expected four numbers x, y, width, height as bbox, got {bbox!r}"
    try:
        x, y, width, height = (float(v) for v in bbox)
    except OverflowError:
        return (0.0, 0.0, 0.0, 0.0), "expected four finite numbers as bbox, got one that is too large"
    box = (x, y, x + width, y + height)
    if width <= 0 or height <= 0:
        return box, f"expected a bbox of positive width and height, got {bbox!r}"
    return box, f"expected four finite numbers as bbox, got {bbox!r}" if box_problem(box) else None


def _image_folders(name: str, file: Path) -> list[Path]:
    """Where the images of an annotation file can be, likeliest first."""
    if file.name == "_annotations.coco.json":
        return [file.parent]
    base = file.parent.parent
    return [base / "images" / name, base / name, base / "images"]


def _image_path(folders: list[Path], file_name: str, where: str) -> Path:
    for folder in folders:
        path = inside(folder, file_name, where)
        if path.is_file():
            return path
    raise DataError(f"{where}: expected {file_name} in {' or '.join(map(str, folders))}, but there is none")


def _integer(item: dict[str, Any], key: str, where: str) -> int:
    value = item.get(key)
    if type(value) is not int:
        raise DataError(f"{where}: expected an integer as {key}, got {'none' if value is None else repr(value)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
