"""The COCO reader and the export: what it takes, what it reports, what it refuses."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.data import COCODataset, DataError, DetectionDataset, Record, open_dataset, to_coco

BCCD = Path(os.environ.get("RCNN_BCCD", Path(__file__).parents[2] / "shared" / "data" / "bccd"))
needs_bccd = pytest.mark.skipif(
    not BCCD.is_dir(), reason="set RCNN_BCCD to the folder of the BCCD data set (VOC layout) to run this"
)


def content(**changes):
    """A file of three images of 64 x 48 pixels, the second without annotations, and sparse category ids."""
    base = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in (30, 10, 20)],
        "categories": [{"id": 90, "name": "dog"}, {"id": 7, "name": "cat"}, {"id": 0, "name": "owl"}],
        "annotations": [
            {"id": 1, "image_id": 30, "category_id": 90, "bbox": [0, 0, 64, 48], "area": 100.5, "iscrowd": 0},
            {"id": 2, "image_id": 20, "category_id": 7, "bbox": [1.5, 2, 10, 20], "iscrowd": 1},
            {"id": 3, "image_id": 30, "category_id": 0, "bbox": [5, 6, 7, 8]},
        ],
    }
    return base | changes


def write(root, data=None, file="annotations/instances_train2017.json", images="images/train2017"):
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(data if isinstance(data, str) else json.dumps(content() if data is None else data))
    (root / images).mkdir(parents=True, exist_ok=True)
    for i in (10, 20, 30):
        Image.new("RGB", (64, 48), (9, 9, 9)).save(root / images / f"{i}.jpg")
    return root


def refused(root, match, split="train", **settings):
    with pytest.raises(DataError, match=match) as caught:
        COCODataset(root, split, **settings)
    assert "\n" not in str(caught.value)


def with_annotation(**changes):
    """The content with its second annotation changed."""
    data = content()
    data["annotations"][1] |= changes
    return data


def test_boxes_labels_and_ids(tmp_path):
    data = COCODataset(write(tmp_path), "train")
    assert data.classes == ["owl", "cat", "dog"] and data.categories == {1: 0, 2: 7, 3: 90}
    assert [r.image_id for r in data.records] == [30, 10, 20] and data.problems == []
    first, empty, crowd = data.records
    assert first.boxes.tolist() == [[0, 0, 64, 48], [5, 6, 12, 14]] and first.labels.tolist() == [3, 1]
    assert first.areas.tolist() == [100.5, 56] and first.ignore.tolist() == [False, False]
    assert empty.boxes.shape == (0, 4)
    assert crowd.boxes.tolist() == [[1.5, 2, 11.5, 22]] and crowd.ignore.tolist() == [True]
    assert data.read(0).shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("file", "images", "split"),
    [
        ("annotations/instances_train.json", "images/train", "train"),
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("annotations/instances_train2017.json", "images", "train2017"),
        ("data/annotations/instances_train2014.json", "data/images/train2014", "train"),
        ("train/_annotations.coco.json", "train", "train"),
        ("valid/_annotations.coco.json", "valid", "val"),
    ],
)
def test_layouts(tmp_path, file, images, split):
    data = open_dataset(write(tmp_path, None, file, images), split)
    assert isinstance(data, COCODataset) and len(data) == 3
    assert data.records[0].path == tmp_path / images / "30.jpg"


def test_splits_that_are_not_there(tmp_path):
    write(tmp_path)
    refused(tmp_path, "expected an annotation file for split 'val', got train2017", "val")
    write(tmp_path, None, "annotations/instances_train2014.json")
    refused(tmp_path, "exactly one annotation file for split 'train', got train2014, train2017")
    assert len(COCODataset(tmp_path, "train2017")) == 3
    refused(tmp_path / "none", "none: expected a data folder")


def test_given_classes_decide_the_labels(tmp_path):
    write(tmp_path)
    data = COCODataset(tmp_path, "train", ["dog", "cat", "owl", "bee"])
    assert data.records[0].labels.tolist() == [1, 3] and data.categories == {1: 90, 2: 7, 3: 0, 4: 91}
    refused(tmp_path, "annotation 2: expected a class among dog, owl, got 'cat'", classes=["dog", "owl"])


def test_roboflows_group_is_no_class(tmp_path):
    categories = [
        {"id": 0, "name": "pets", "supercategory": "none"},
        {"id": 1, "name": "cat", "supercategory": "pets"},
    ]
    data = COCODataset(write(tmp_path, content(categories=categories, annotations=[])), "train")
    assert data.classes == ["cat"] and data.categories == {1: 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bbox": [1, 2, float("nan"), 4]}, "expected four finite numbers as bbox, got [1, 2, nan, 4]"),
        ({"bbox": [1, 2, float("inf"), 4]}, "expected four finite numbers as bbox"),
        ({"bbox": [1, 2, 10**400, 4]}, "too large"),
        ({"bbox": [1, 2, -3, 4]}, "expected a bbox of positive width and height, got [1, 2, -3, 4]"),
        ({"bbox": [1, 2, 0, 4]}, "expected a bbox of positive width and height"),
        ({"bbox": [70, 2, 5, 4]}, "expected a box inside the image of 64 x 48 pixels"),
        ({"bbox": [1, 2, 3]}, "expected four numbers x, y, width, height as bbox, got [1, 2, 3]"),
        ({"bbox": ["1", 2, 3, 4]}, "expected four numbers"),
        ({"bbox": None}, "expected four numbers x, y, width, height as bbox, got None"),
        ({"iscrowd": 2}, "expected 0 or 1 as iscrowd, got 2"),
    ],
)
def test_a_bad_object_is_named_and_skipped(tmp_path, changes, words):
    root = write(tmp_path, with_annotation(**changes))
    data = COCODataset(root, "train")
    assert [len(r.labels) for r in data.records] == [2, 0, 0]
    (problem,) = data.problems
    assert problem.startswith(f"{root / 'annotations/instances_train2017.json'}: annotation 2: expected")
    assert words in problem
    refused(root, "annotation 2: expected", strict=True)


def test_overhang_is_clipped_and_a_bad_area_replaced(tmp_path):
    data = COCODataset(write(tmp_path, with_annotation(bbox=[-10, 2, 20, 20], area=-1)), "train")
    assert data.records[2].boxes.tolist() == [[0, 2, 10, 22]] and data.records[2].areas.tolist() == [200]
    assert "annotation 2" in data.problems[0] and data.problems[0].endswith("box clipped")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("{", "expected JSON, but it does not parse"),
        ("[" * 100_000, "expected JSON, but it does not parse"),
        ("[]", "expected a JSON object, got list"),
        ({}, "expected a list 'images', got none"),
        (content(annotations={}), "expected a list 'annotations', got dict"),
        (content(images=[3]), "images 1: expected a JSON object, got 3"),
        (content(images=[]), "annotation 1: expected the id of an image in this file, got image_id 30"),
        (content(images=[], annotations=[]), "expected at least one image, but it lists none"),
        (
            content(categories=[{"id": 7, "name": "cat"}]),
            "annotation 1: expected the id of a category in this file, got category_id 90",
        ),
        (content(categories=[], annotations=[]), "expected at least one class"),
        (content(categories=[{"id": 1, "name": "background"}]), "expected foreground classes only"),
        (content(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "category 2: .* each category id once"),
        (content(categories=[{"id": 1, "name": 5}]), "category 1: expected a string as name, got 5"),
        (content(categories=[{"id": "1", "name": "a"}]), "category 1: expected an integer as id, got '1'"),
        (content(images=[{"id": 1, "file_name": None}]), "image 1: expected a string as file_name, got None"),
        (content(images=[{"id": True, "file_name": "10.jpg"}]), "image 1: expected an integer as id, got True"),
        (content(images=content()["images"] * 2), "image 4: expected each image id once, got 30 again"),
        (content(images=[{"id": 30, "file_name": "../../x.jpg"}]), "image 1: expected a file name inside"),
        (content(images=[{"id": 30, "file_name": "/etc/x.jpg"}]), "image 1: expected a file name inside"),
        (content(images=[{"id": 30, "file_name": "x.jpg"}]), "image 1: expected x.jpg in .*train2017.* or .*images"),
        (with_annotation(image_id=99), "annotation 2: expected the id of an image in this file, got image_id 99"),
        (with_annotation(image_id=None), "annotation 2: expected an integer as image_id, got none"),
        (with_annotation(category_id=5), "annotation 2: expected the id of a category in this file, got category_id 5"),
        (with_annotation(category_id="cat"), "annotation 2: expected an integer as category_id, got 'cat'"),
        (with_annotation(bbox=[0.1, 0.2, 0.3, 0.4]), "annotation 2: .*which look relative"),
    ],
)
def test_files_that_are_refused(tmp_path, data, match):
    write(tmp_path, data)
    refused(tmp_path, f"instances_train2017.json.*{match}")


def test_a_bad_image_is_skipped_and_a_wrong_size_reported(tmp_path):
    data = content()
    data["images"][2]["width"] = 640
    write(tmp_path, data)
    (tmp_path / "images/train2017/10.jpg").write_bytes(b"")
    dataset = COCODataset(tmp_path, "train")
    assert [r.image_id for r in dataset.records] == [30, 20]
    assert "10.jpg: expected an image, but the file has zero bytes; image skipped" in dataset.problems[0]
    assert "image 3: expected the size of 20.jpg, 64 x 48 pixels, got 640 x 48" in dataset.problems[1]
    assert dataset.records[1].width == 64


def test_export_reads_back_the_same(tmp_path):
    data = COCODataset(write(tmp_path), "train")
    exported = to_coco(data)
    assert [i["id"] for i in exported["images"]] == [30, 10, 20]
    assert [a["id"] for a in exported["annotations"]] == [1, 2, 3]
    assert [c["id"] for c in exported["categories"]] == [0, 7, 90]
    write(tmp_path, exported)
    same(COCODataset(tmp_path, "train"), data)


def test_export_of_named_images(tmp_path):
    def record(path, name):
        none = np.zeros(0)
        return Record(tmp_path / path, name, 64, 48, none.reshape(0, 4), none.astype(int), none.astype(bool), none)

    exported = to_coco(DetectionDataset("x", ["cat"], [record("a/1.jpg", "one"), record("b/1.jpg", "two")]))
    assert [(i["id"], i["file_name"]) for i in exported["images"]] == [(0, "a/1.jpg"), (1, "b/1.jpg")]
    assert to_coco(DetectionDataset("x", ["cat"], [])) == {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }


def same(first, second):
    assert first.classes == second.classes and len(first) == len(second)
    for a, b in zip(first.records, second.records, strict=True):
        assert (a.path.name, a.width, a.height) == (b.path.name, b.width, b.height)
        for name in ("boxes", "labels", "ignore", "areas"):
            x, y = getattr(a, name), getattr(b, name)
            np.testing.assert_array_equal(x, y)
            assert x.dtype == y.dtype


@needs_bccd
def test_bccd_through_the_coco_reader(tmp_path):
    for split in ("train", "val", "test"):
        data = open_dataset(BCCD, split)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(to_coco(data)))
        if not (tmp_path / "images").exists():
            (tmp_path / "images").symlink_to((BCCD / "JPEGImages").resolve())
        read = open_dataset(tmp_path, split)
        assert isinstance(read, COCODataset) and read.problems == []
        same(read, data)
