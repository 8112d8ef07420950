"""The Pascal VOC layout: ``Annotations/NAME.xml``, ``JPEGImages/NAME.jpg``, ``ImageSets/Main/SPLIT.txt``.

Corners in VOC files count from 1 and include both ends; they become continuous as (xmin - 1, ymin - 1, xmax, ymax), so
that xmax - xmin is the number of pixels. ``one_based=False`` takes them as they are.

An image set lists one name per line. A second column (-1, 0 or 1, as in the development kit's ``cat_train.txt``) tells
whether the image shows that class, and is not used: such a file lists the images of the split, negatives included,
and detection takes what is in them from their annotations.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

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
from rcnn.images import SUFFIXES

LABEL_MAP = "pascal_label_map.pbtxt"


def voc_root(root: "str | Path") -> Path | None:
    """The folder that holds the VOC layout, ``root`` or ``root/VOC2007``; ``None`` if neither does."""
    # Not by Annotations: where file names ignore case, COCO's annotations has that name too.
    for folder in (Path(root), Path(root) / "VOC2007"):
        if (folder / "JPEGImages").is_dir() or (folder / "ImageSets").is_dir():
            return folder
    return None


class VOCDataset(DetectionDataset):
    """A data set in VOC layout.

    The classes are, in this order of preference: ``classes``; the items of ``pascal_label_map.pbtxt`` in ``root`` or
    its ``VOC2007`` by rising id; the sorted names that occur in the annotations of all image sets together, so that
    every split gets the same labels. Objects marked difficult become ignore regions. A missing ``difficult`` is 0.
    Everything is checked when the data set is opened, but for damage behind an image's header.

    Args:
        root: folder with ``Annotations``, ``JPEGImages`` and ``ImageSets``, or with ``VOC2007`` that has them.
        split: image set, the name of a file in ``ImageSets/Main`` without ``.txt``.
        classes: names of the foreground classes in the order of their labels.
        one_based: corners count from 1 and include both ends, the format's rule.
        strict: raise at the first bad object or image instead of skipping and reporting it.

    Raises:
        DataError: a folder, image set, annotation or image is missing, a file cannot be parsed or names a file outside
            the data folder, an object's class is unknown, all boxes of an image look relative, nothing usable is left.

    Source:
        Everingham et al., The Pascal Visual Object Classes Challenge 2007 (VOC2007) Development Kit.
    """

    def __init__(
        self,
        root: "str | Path",
        split: str,
        classes: Sequence[str] | None = None,
        *,
        one_based: bool = True,
        strict: bool = False,
    ) -> None:
        if not Path(root).is_dir():
            raise DataError(f"{root}: expected a data folder, but there is none")
        folder = voc_root(root)
        if folder is None:
            raise DataError(
                f"{root}: expected the folders Annotations, JPEGImages and ImageSets/Main, here or in VOC2007, "
                f"got neither of the last two"
            )
        for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
            if not (folder / part).is_dir():
                raise DataError(f"{folder / part}: expected this folder of the VOC layout, but there is none")
        self.root = folder
        self._annotations: dict[str, Element] = {}
        collector = Collector(strict)
        names = self._names(self._split_file(split), collector)
        categories: dict[int, int] | None = None
        map_file = next((f for f in (Path(root) / LABEL_MAP, folder / LABEL_MAP) if f.is_file()), None)
        if classes is not None:
            names_of_classes = check_classes(classes, "classes")
        elif map_file is not None:
            by_id = read_label_map(map_file)
            names_of_classes = list(by_id.values())
            categories = dict(enumerate(by_id, 1))
        else:
            names_of_classes = self._find_classes(self._split_file(split), set(names))
        labels = {name: k for k, name in enumerate(names_of_classes, 1)}
        files = _ImageFiles(folder / "JPEGImages")
        below_one = 0
        for name in names:
            source_file = self._annotation_file(name)
            annotation = self._annotations.pop(name, None)
            if annotation is None:
                annotation = read_annotation(source_file)
            path = files.find(name, annotation.findtext("filename"), source_file)
            objects = [
                _object(item, f"{source_file}: object {i}", labels, 1.0 if one_based else 0.0)
                for i, item in enumerate(annotation.findall("object"), 1)
            ]
            collector.add(path, name, objects, _declared_size(annotation), str(source_file))
            below_one += one_based and any(o.problem is None and min(o.box) == 0 for o in objects)
        collector.finish(str(self._split_file(split)))
        if below_one:
            collector.problems.append(
                f"{folder / 'Annotations'}: expected corners that count from 1, got 0 in {below_one} files; "
                f"if the corners count from 0, set one_based to false"
            )
        del self._annotations
        super().__init__(
            f"{Path(root).resolve().name} {split}",
            names_of_classes,
            collector.records,
            collector.problems,
            categories,
            strict,
        )

    def _split_file(self, split: str) -> Path:
        folder = self.root / "ImageSets" / "Main"
        file = inside(folder, f"{split}.txt", "split")
        if not file.is_file():
            found = ", ".join(sorted(f.stem for f in folder.glob("*.txt"))) or "no image set at all"
            raise DataError(f"{folder}: expected the image set {split}.txt, got {found}")
        return file

    def _names(self, file: Path, collector: Collector | None = None) -> list[str]:
        """Image names of an image set, each once."""
        names: dict[str, None] = {}
        for number, line in enumerate(_text(file).splitlines(), 1):
            name = line.strip()
            if not name:
                continue
            columns = name.rsplit(None, 1)
            # A name may hold spaces, even end in " 1": where an annotation has the whole line as its name, it is one.
            if len(columns) == 2 and not self._annotation_file(name, f"{file}: line {number}").is_file():
                if columns[1] not in ("-1", "0", "1", "+1"):
                    raise DataError(
                        f"{file}: line {number}: expected an image name, or a name and -1, 0 or 1, got {name!r}"
                    )
                name = columns[0]
            self._annotation_file(name, f"{file}: line {number}")
            if name in names and collector is not None:
                collector.report(f"{file}: line {number}: expected each image once, got {name!r} again; line skipped")
            names[name] = None
        return list(names)

    def _annotation_file(self, name: str, source: str = "") -> Path:
        return inside(self.root / "Annotations", f"{name}.xml", source)

    def _find_classes(self, chosen: Path, keep: set[str]) -> list[str]:
        """Class names in the annotations of all image sets; those of the images in ``keep`` stay for later use."""
        found: set[str] = set()
        seen: set[str] = set()
        for file in sorted((self.root / "ImageSets" / "Main").glob("*.txt")):
            try:
                names = self._names(file)
            except DataError:
                if file == chosen:
                    raise
                continue  # some other text file
            for name in names:
                source = self._annotation_file(name)
                if name in seen or not source.is_file():
                    continue
                seen.add(name)
                annotation = read_annotation(source)
                found.update((item.findtext("name") or "").strip() for item in annotation.findall("object"))
                if name in keep:
                    self._annotations[name] = annotation
        found.discard("")
        if not found:
            raise DataError(f"{self.root / 'Annotations'}: expected at least one object with a class name, got none")
        return check_classes(sorted(found), str(self.root / "Annotations"))


def read_annotation(path: Path) -> Element:
    """The ``<annotation>`` element of a VOC file.

    A document type declaration is refused, so no entity is ever expanded and no other file is opened.

    Raises:
        DataError: the file is missing, does not parse, has a document type, or holds something else.
    """
    if not path.is_file():
        raise DataError(f"{path}: expected an annotation file, but there is none")
    builder = TreeBuilder()

    def refuse(*_: object) -> None:
        raise DataError(f"{path}: expected an annotation without DOCTYPE or ENTITY, got one; it is not read for safety")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    parser.EntityDeclHandler = refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except expat.ExpatError as error:
        raise DataError(f"{path}: expected an XML annotation, but it does not parse ({error})") from None
    except (LookupError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: expected an XML annotation, but its encoding is not known ({error})") from None
    root: Element = builder.close()
    if root.tag != "annotation":
        raise DataError(f"{path}: expected an <annotation> element, got <{root.tag}>")
    return root


def read_label_map(path: Path) -> dict[int, str]:
    """Class names by id from a ``.pbtxt`` of items such as ``item { id: 1 name: 'dog' }``, by rising id.

    Raises:
        DataError: no item, an item without id or name, id 0 or less, a repeated id or name.
    """
    text = re.sub(r"#[^\n]*", "", _text(path))
    by_id: dict[int, str] = {}
    quoted = r"'[^'\n]*'|\"[^\"\n]*\""
    for number, match in enumerate(re.finditer(rf"item\s*:?\s*\{{((?:{quoted}|[^{{}}'\"])*)\}}", text), 1):
        id_ = re.search(r"\bid\s*:\s*(-?\d+)", match[1])
        name = re.search(rf"\bname\s*:\s*({quoted})", match[1])
        if id_ is None or name is None:
            raise DataError(
                f"{path}: item {number}: expected an id and a quoted name, got {' '.join(match[1].split())!r}"
            )
        key = int(id_[1])
        if key < 1:
            raise DataError(f"{path}: item {number}: expected an id from 1 on (label 0 is the background), got {key}")
        if key in by_id:
            raise DataError(f"{path}: item {number}: expected each id once, got {key} again")
        by_id[key] = name[1][1:-1]
    by_id = dict(sorted(by_id.items()))
    return dict(zip(by_id, check_classes(list(by_id.values()), str(path)), strict=True))


class _ImageFiles:
    """Image files of a folder by their names without ending."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, name: str, filename: str | None, source: Path) -> Path:
        """``NAME.jpg``, else NAME with another ending, else the annotation's own file name.

        Raises:
            DataError: there is none, or ``filename`` leads out of the folder.
        """
        named = (
            inside(self.folder, filename.strip(), f"{source}: <filename>") if filename and filename.strip() else None
        )
        path = inside(self.folder, f"{name}.jpg", str(source))
        if path.is_file():
            return path
        folder = path.parent
        if folder not in self._listed:
            files = sorted(folder.iterdir()) if folder.is_dir() else []
            self._listed[folder] = {f.stem: f for f in reversed(files) if f.suffix.lower() in SUFFIXES}
        other = self._listed[folder].get(path.stem)
        if other is not None:
            return other
        if named is not None and named.is_file():
            return named
        raise DataError(f"{path}: expected the image of {source}, but there is none")


def _object(item: Element, where: str, labels: dict[str, int], shift: float) -> RawObject:
    name = (item.findtext("name") or "").strip()
    difficult = (item.findtext("difficult") or "0").strip() or "0"
    problem = None
    box: list[float] = []
    for corner in ("xmin", "ymin", "xmax", "ymax"):
        text = item.findtext(f"bndbox/{corner}")
        try:
            box.append(float(text or ""))
        except ValueError:
            got = "none" if text is None else repr(text)
            problem = problem or f"expected a number as <{corner}> in <bndbox>, got {got}"
            box.append(0.0)
    if not name:
        problem = problem or "expected a class as <name>, got none"
    elif name not in labels:
        unknown_class(where, name, list(labels))
    if difficult not in ("0", "1"):
        problem = problem or f"expected 0 or 1 as <difficult>, got {difficult!r}"
    problem = problem or box_problem(box)
    return RawObject(
        where, (box[0], box[1], box[2], box[3]), labels.get(name, 0), difficult == "1", shift=shift, problem=problem
    )


def _declared_size(annotation: Element) -> tuple[int, int] | None:
    """Height and width by the annotation; ``None`` if missing, not numbers or zero, as some tools leave them."""
    try:
        height, width = (int(float(annotation.findtext(f"size/{side}") or 0)) for side in ("height", "width"))
    except (ValueError, OverflowError):
        return None
    return (height, width) if height > 0 and width > 0 else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8 text, got other bytes") from None
