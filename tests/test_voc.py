"""The VOC reader: what it takes, what it reports, what it refuses."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.data import DataError, VOCDataset, open_dataset
from rcnn.data.voc import read_label_map

BCCD = Path(os.environ.get("RCNN_BCCD", Path(__file__).parents[2] / "shared" / "data" / "bccd"))
needs_bccd = pytest.mark.skipif(
    not BCCD.is_dir(), reason="set RCNN_BCCD to the folder of the BCCD data set (VOC layout) to run this"
)

CAT = ("cat", (11, 21, 30, 40))
DOG = ("dog", (1, 1, 64, 48))


def xml(*objects, size=(64, 48), filename=None):
    """Annotation text; an object is (name, (xmin, ymin, xmax, ymax)[, further elements])."""
    parts = ["<annotation>"]
    if filename is not None:
        parts.append(f"<filename>{filename}</filename>")
    if size is not None:
        parts.append(f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>")
    for name, box, *more in objects:
        corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        parts.append(f"<object><name>{name}</name>{''.join(more)}<bndbox>{corners}</bndbox></object>")
    return "\n".join([*parts, "</annotation>"])


def write(root, images, split="train", lines=None):
    """Write images (name -> annotation text) of 64 x 48 pixels as a VOC folder; returns it."""
    for part in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / part).mkdir(parents=True, exist_ok=True)
    for name, text in images.items():
        (root / "Annotations" / f"{name}.xml").write_text(text)
        Image.new("RGB", (64, 48), (90, 120, 30)).save(root / "JPEGImages" / f"{name}.jpg")
    (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(lines if lines is not None else images) + "\n")
    return root


def refused(root, match, split="train", **settings):
    """The whole message, one sentence that matches."""
    with pytest.raises(DataError, match=match) as caught:
        VOCDataset(root, split, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_boxes_labels_and_classes(tmp_path):
    root = write(tmp_path / "pets", {"a": xml(DOG, CAT), "b": xml()})
    data = VOCDataset(root, "train")
    assert data.classes == ["cat", "dog"] and data.categories == {1: 1, 2: 2} and data.problems == []
    assert data.name == "pets train" and len(data) == 2
    a, b = data.records
    assert a.boxes.tolist() == [[0, 0, 64, 48], [10, 20, 30, 40]] and a.boxes.dtype == np.float32
    assert a.labels.tolist() == [2, 1] and a.labels.dtype == np.int64
    assert a.areas.tolist() == [64 * 48, 400] and a.ignore.tolist() == [False, False]
    assert (a.image_id, a.width, a.height, a.path) == ("a", 64, 48, root / "JPEGImages" / "a.jpg")
    assert b.boxes.shape == (0, 4) and b.labels.shape == (0,)  # an image without objects is kept
    assert data.read(0).shape == (48, 64, 3)


def test_corners_can_be_taken_as_they_are(tmp_path):
    root = write(tmp_path, {"a": xml(("cat", (0, 0, 30, 40.5)))})
    data = VOCDataset(root, "train", one_based=False)
    assert data.records[0].boxes.tolist() == [[0, 0, 30, 40.5]] and data.problems == []
    data = VOCDataset(root, "train")  # corners of 0 cannot count from 1: said once, the box stays inside
    assert data.records[0].boxes.tolist() == [[0, 0, 30, 40.5]]
    assert len(data.problems) == 1 and "count from 1, got 0 in 1 files" in data.problems[0]


def test_in_a_folder_voc2007(tmp_path):
    write(tmp_path / "VOC2007", {"a": xml(CAT)})
    assert open_dataset(tmp_path, "train").classes == ["cat"]


def test_difficult_is_ignored_and_its_absence_is_not(tmp_path):
    hard, easy, blank = (f"<difficult>{v}</difficult>" for v in ("1", "0", ""))
    root = write(tmp_path, {"a": xml((*CAT, hard), (*CAT, easy), (*CAT, blank), CAT)})
    assert VOCDataset(root, "train").records[0].ignore.tolist() == [True, False, False, False]


def test_parts_of_an_object_are_not_objects(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    data = VOCDataset(write(tmp_path, {"a": xml((*CAT, part))}), "train")
    assert data.classes == ["cat"] and data.records[0].boxes.tolist() == [[10, 20, 30, 40]]


def test_classes_agree_between_splits(tmp_path):
    write(tmp_path, {"a": xml(DOG)}, "train")
    write(tmp_path, {"b": xml(CAT)}, "val")
    assert VOCDataset(tmp_path, "train").classes == VOCDataset(tmp_path, "val").classes == ["cat", "dog"]
    assert VOCDataset(tmp_path, "train").records[0].labels.tolist() == [2]
    assert VOCDataset(tmp_path, "val", ["dog", "cat"]).records[0].labels.tolist() == [2]


@pytest.mark.parametrize("below", ["", "VOC2007"])
def test_label_map_gives_order_and_ids(tmp_path, below):
    write(tmp_path / "VOC2007", {"a": xml(CAT, DOG)})
    text = "# ours\nitem {\n  id: 7\n  name: 'cat'\n}\nitem {\n  name: \"dog\"\n  id: 3\n}\n"
    (tmp_path / below / "pascal_label_map.pbtxt").write_text(text)
    data = VOCDataset(tmp_path, "train")
    assert data.classes == ["dog", "cat"] and data.categories == {1: 3, 2: 7}
    assert data.records[0].labels.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "at least one class"),
        ("item { id: 0 name: 'cat' }", r"label 0 is the background\), got 0"),
        ("item { id: 1 name: 'background' }", "got 'background'"),
        ("item { name: 'cat' }", "item 1: expected an id"),
        ("item { id: 1 name: 'cat' } item { id: 1 name: 'dog' }", "item 2: expected each id once, got 1"),
        ("item { id: 1 name: 'cat' } item { id: 2 name: 'cat' }", "each class once, got 'cat'"),
    ],
)
def test_bad_label_maps(tmp_path, text, match):
    write(tmp_path, {"a": xml(CAT)})
    (tmp_path / "pascal_label_map.pbtxt").write_text(text)
    assert "pascal_label_map.pbtxt" in refused(tmp_path, match)


def test_label_map_names_may_hold_braces(tmp_path):
    (tmp_path / "m.pbtxt").write_text("item { id: 1 name: 'a}b' display_name: 'x' }")
    assert read_label_map(tmp_path / "m.pbtxt") == {1: "a}b"}


def test_image_sets_of_two_columns_and_names_with_spaces(tmp_path):
    images = {name: xml(CAT) for name in ("a", "b", "c", "my pet", "pet 1")}
    root = write(tmp_path, images, "cat_train", ["a  1", "b -1", "c 0", "my pet", "pet 1", ""])
    data = VOCDataset(root, "cat_train")
    assert [r.image_id for r in data.records] == list(images)
    (root / "ImageSets/Main/bad.txt").write_text("a 2\n")
    refused(root, "bad.txt: line 1: expected an image name, or a name and -1, 0 or 1, got 'a 2'", "bad")


def test_an_image_listed_twice_is_used_once(tmp_path):
    root = write(tmp_path, {"a": xml(CAT), "b": xml()}, lines=["a", "b", "a"])
    data = VOCDataset(root, "train")
    assert [r.image_id for r in data.records] == ["a", "b"]
    assert len(data.problems) == 1 and "train.txt: line 3" in data.problems[0]


def test_other_image_files(tmp_path):
    root = write(tmp_path, {"a": xml(CAT), "b.2": xml(CAT), "c": xml(CAT, filename="other.JPG")})
    for old, new in (("a.jpg", "a.PNG"), ("b.2.jpg", "b.2.png"), ("c.jpg", "other.JPG")):
        (root / "JPEGImages" / old).rename(root / "JPEGImages" / new)
    assert [r.path.name for r in VOCDataset(root, "train").records] == ["a.PNG", "b.2.png", "other.JPG"]


def test_the_files_own_size_wins_and_exif_turns_it(tmp_path):
    root = write(
        tmp_path, {"a": xml(CAT, size=(100, 100)), "b": xml(("cat", (1, 1, 48, 64))), "c": xml(CAT, size=None)}
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(root / "JPEGImages" / "b.jpg", exif=exif)
    data = VOCDataset(root, "train")
    a, b, _ = data.records
    assert (a.width, a.height) == (64, 48) and (b.width, b.height) == (48, 64)
    assert b.boxes.tolist() == [[0, 0, 48, 64]] and data.read(1).shape == (64, 48, 3)
    assert len(data.problems) == 2
    assert "a.xml: expected the size of a.jpg, 64 x 48 pixels, got 100 x 100" in data.problems[0]
    assert "EXIF" in data.problems[1]


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((30, 21, 30, 40), "an empty box (30, 21, 30, 40)"),  # one pixel wide by the raw corners: degenerate
        ((11, 40, 30, 40), "an empty box (11, 40, 30, 40)"),
        ((30, 21, 11, 40), "a reversed box (30, 21, 11, 40)"),
        (("nan", 21, 30, 40), "four finite numbers, got (nan, 21, 30, 40)"),
        ((11, 21, "inf", 40), "four finite numbers"),
        ((11, 21, 30, "forty"), "a number as <ymax> in <bndbox>, got 'forty'"),
        ((70, 21, 90, 40), "inside the image of 64 x 48 pixels, got (70, 21, 90, 40)"),
        ((-20, -20, -1, -1), "inside the image of 64 x 48 pixels"),
    ],
)
def test_a_bad_box_is_named_and_skipped(tmp_path, box, words):
    root = write(tmp_path, {"a": xml(CAT, ("cat", box), DOG)})
    data = VOCDataset(root, "train")
    assert data.records[0].labels.tolist() == [1, 2]
    (problem,) = data.problems
    assert problem.startswith(f"{root / 'Annotations' / 'a.xml'}: object 2: expected ") and words in problem
    assert problem.endswith("object skipped")
    refused(root, "a.xml: object 2: expected", strict=True)


def test_an_object_without_box_or_name_is_skipped(tmp_path):
    text = xml(CAT).replace("</annotation>", "<object><name>cat</name></object><object/></annotation>")
    data = VOCDataset(write(tmp_path, {"a": text}), "train")
    assert len(data.records[0].labels) == 1
    assert "object 2: expected a number as <xmin> in <bndbox>, got none" in data.problems[0]
    assert "object 3" in data.problems[1]


def test_overhang_is_clipped_and_reported_beyond_one_pixel(tmp_path):
    root = write(tmp_path, {"a": xml(("cat", (1, 1, 65, 49)), ("cat", (-9, 21, 90, 40)))})
    data = VOCDataset(root, "train")
    assert data.records[0].boxes.tolist() == [[0, 0, 64, 48], [0, 20, 64, 40]]
    assert data.records[0].areas.tolist() == [64 * 48, 64 * 20]
    (problem,) = data.problems
    assert "a.xml: object 2" in problem and "(-9, 21, 90, 40); box clipped" in problem


def test_relative_corners_are_refused(tmp_path):
    root = write(tmp_path, {"a": xml(("cat", (0.1, 0.2, 0.5, 0.9)))})
    for one_based in (True, False):
        message = refused(root, "a.xml: object 1: expected corners in pixels", one_based=one_based)
        assert "(0.1, 0.2, 0.5, 0.9), which look relative" in message


def test_nothing_usable_is_refused(tmp_path):
    root = write(tmp_path, {"a": xml(("cat", (30, 40, 11, 21)))})
    refused(root, "at least one usable object, but all 1 are bad, the first: .*a.xml: object 1")
    (root / "JPEGImages" / "a.jpg").write_bytes(b"")
    refused(root, "at least one image, but all 1 are bad, the first: .*a.jpg")


def test_missing_things(tmp_path):
    refused(tmp_path / "none", "none: expected a data folder")
    (tmp_path / "Annotations").mkdir()
    refused(tmp_path, "expected the folders Annotations, JPEGImages and ImageSets/Main")
    root = write(tmp_path, {"a": xml(CAT), "b": xml(CAT)})
    write(tmp_path, {"c": xml(CAT)}, "val")
    refused(root, "expected the image set trian.txt, got train, val", "trian")
    refused(root, "expected a file name inside", "../../etc/passwd")
    (root / "JPEGImages" / "b.jpg").unlink()
    refused(root, r"b.jpg: expected the image of .*b.xml, but there is none")
    (root / "Annotations" / "b.xml").unlink()
    refused(root, "b.xml: expected an annotation file, but there is none")
    (root / "ImageSets/Main/train.txt").write_text("\n\n")
    refused(root, "train.txt: expected at least one image, but it lists none")
    (root / "ImageSets/Main/train.txt").write_bytes(b"\xff\xfe\xfa")
    refused(root, "train.txt: expected UTF-8 text")
    for part in ("JPEGImages", "ImageSets"):
        (root / part).rename(root / f"no{part}")
        refused(root, f"{part}.*: expected this folder of the VOC layout")
        (root / f"no{part}").rename(root / part)


def test_annotation_that_is_none(tmp_path):
    root = write(tmp_path, {"a": xml(CAT)})
    file = root / "Annotations" / "a.xml"
    for content, match in [
        (b"<annotation><object>", "a.xml: expected an XML annotation, but it does not parse"),
        (b"", "a.xml: expected an XML annotation, but it does not parse"),
        (b"<html></html>", "a.xml: expected an <annotation> element, got <html>"),
        (b"<?xml version='1.0' encoding='klingon'?><annotation/>", "a.xml: expected an XML annotation"),
        (b"<?xml version='1.0' encoding='hex'?><annotation/>", "a.xml: expected an XML annotation"),
        (b"<annotation>\0</annotation>", "a.xml: expected an XML annotation"),
    ]:
        file.write_bytes(content)
        refused(root, match)


@pytest.mark.parametrize(
    "doctype",
    [
        '<!DOCTYPE a [<!ENTITY x "aaaaaaaaaa"><!ENTITY y "&x;&x;&x;&x;&x;&x;&x;&x;">]>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE a SYSTEM "http://example.com/a.dtd">',
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_never_read(tmp_path, doctype, encoding):
    root = write(tmp_path, {"a": xml(CAT)})
    text = f"<?xml version='1.0' encoding='{encoding}'?>{doctype}{xml(CAT)}"
    (root / "Annotations" / "a.xml").write_bytes(text.encode(encoding))
    refused(root, "a.xml: expected an annotation without DOCTYPE or ENTITY")


def test_unknown_class(tmp_path):
    root = write(tmp_path, {"a": xml(CAT, DOG)})
    refused(root, "a.xml: object 2: expected a class among cat, bird, got 'dog'", classes=["cat", "bird"])
    refused(root, "expected foreground classes only", classes=["background", "cat"])
    write(root, {"a": xml(("background", (1, 1, 9, 9)))})
    refused(root, r"Annotations: expected foreground classes only \(label 0 is the background\)")
    write(root, {"a": xml()})
    refused(root, "Annotations: expected at least one object with a class name")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..\\secret", "C:\\secret", "sub/../../secret"])
def test_names_that_climb_out(tmp_path, name):
    root = write(tmp_path, {"a": xml(CAT, filename=f"{name}.jpg")})
    refused(root, r"a.xml: <filename>: expected a file name inside .*JPEGImages")
    write(root, {"a": xml(CAT)}, lines=["a", name])
    refused(root, "train.txt: line 2: expected a file name inside .*Annotations")


def test_an_unreadable_image_is_skipped_and_named(tmp_path):
    root = write(tmp_path, {name: xml(CAT) for name in "abc"})
    (root / "JPEGImages" / "b.jpg").write_bytes(b"")
    data = VOCDataset(root, "train")
    assert [r.image_id for r in data.records] == ["a", "c"]
    (problem,) = data.problems
    assert "b.jpg: expected an image, but the file has zero bytes; image skipped" in problem
    refused(root, "b.jpg: expected an image", strict=True)


def test_open_dataset_refuses_other_folders(tmp_path):
    with pytest.raises(DataError, match="expected a VOC folder .* or a COCO folder .*, got neither"):
        open_dataset(tmp_path, "train")
    with pytest.raises(DataError, match="expected a data folder, but there is none"):
        open_dataset(tmp_path / "none", "train")


@needs_bccd
def test_bccd():
    counts = {}
    for split in ("train", "val", "test"):
        data = open_dataset(BCCD, split)
        assert data.classes == ["Platelets", "RBC", "WBC"]
        counts[split] = (len(data), sum(len(r.labels) for r in data.records), len(data.problems))
    # 4888 objects stand in the files, two of them degenerate
    assert counts == {"train": (205, 2804, 1), "val": (87, 1137, 1), "test": (72, 945, 0)}
    (problem,) = open_dataset(BCCD, "train").problems
    assert "BloodImage_00343.xml: object 4: " in problem
    (problem,) = open_dataset(BCCD, "val").problems
    assert "BloodImage_00338.xml: object 13: " in problem
