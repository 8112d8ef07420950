"""The generated flowers: layout, boxes, determinism, and a write that is whole or not there."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rcnn.data import flowers, open_dataset, painting
from rcnn.data.flowers import Bloom

COUNT = 20  # 5 % of it is one picture without a flower


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flowers.write(tmp_path_factory.mktemp("set") / "flowers", COUNT, seed=3)


def objects(path: Path) -> list[tuple[str, list[int], int, int]]:
    """(name, [xmin, ymin, xmax, ymax] as written, difficult, truncated) of each object of an annotation."""
    found = []
    for item in ElementTree.parse(path).iter("object"):
        corners = [int(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
        name, difficult, truncated = (item.findtext(tag, "") for tag in ("name", "difficult", "truncated"))
        found.append((name, corners, int(difficult), int(truncated)))
    return found


def names(root: Path, split: str) -> list[str]:
    return (root / "VOC2007" / "ImageSets" / "Main" / f"{split}.txt").read_text().split()


def test_layout(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == ["VOC2007"]
    everything = [f"{number:06d}" for number in range(1, COUNT + 1)]
    assert names(written, "trainval") == everything
    assert names(written, "train") == everything[:14]  # 5/7 of 20 is 14.3
    assert names(written, "val") == everything[14:]
    root = written / "VOC2007"
    assert sorted(path.stem for path in (root / "JPEGImages").glob("*.jpg")) == everything
    assert sorted(path.stem for path in (root / "Annotations").glob("*.xml")) == everything
    label_map = (root / "pascal_label_map.pbtxt").read_text()
    assert label_map == "item {\n  id: 1\n  name: 'daisy'\n}\nitem {\n  id: 2\n  name: 'tulip'\n}\n"


def test_annotations_agree_with_the_pictures(written: Path) -> None:
    counts = []
    for path in sorted((written / "VOC2007" / "Annotations").glob("*.xml")):
        root = ElementTree.parse(path).getroot()
        with Image.open(written / "VOC2007" / "JPEGImages" / root.findtext("filename", "")) as image:
            width, height = image.size
            assert image.mode == "RGB"
        assert (root.findtext("size/width"), root.findtext("size/height")) == (str(width), str(height))
        assert 240 <= width <= 400
        assert 240 <= height <= 400
        counts.append(len(objects(path)))
        for name, (x1, y1, x2, y2), difficult, truncated in objects(path):
            assert name in flowers.CLASSES
            assert 1 <= x1 < x2 <= width
            assert 1 <= y1 < y2 <= height
            assert difficult in (0, 1)
            assert truncated == (x1 == 1 or y1 == 1 or x2 == width or y2 == height)
    assert max(counts) <= 6
    assert counts.count(0) == 1
    assert {name for path in (written / "VOC2007" / "Annotations").glob("*.xml") for name, *_ in objects(path)} == {
        "daisy",
        "tulip",
    }


def test_the_voc_reader_reads_it(written: Path) -> None:
    dataset = open_dataset(written, "train")
    assert dataset.classes == ["daisy", "tulip"]
    assert dataset.problems == []
    assert len(dataset) == 14
    for record in dataset.records:
        expected = objects(written / "VOC2007" / "Annotations" / f"{record.path.stem}.xml")
        corners = np.array([box for _, box, _, _ in expected], np.float32).reshape(-1, 4) - [1, 1, 0, 0]
        np.testing.assert_array_equal(record.boxes, corners)
        assert record.labels.tolist() == [flowers.CLASSES.index(name) + 1 for name, *_ in expected]
        assert record.ignore.tolist() == [bool(difficult) for _, _, difficult, _ in expected]


def test_a_seed_gives_the_same_bytes_and_another_seed_other_pictures(written: Path, tmp_path: Path) -> None:
    again = flowers.write(tmp_path / "again", COUNT, seed=3)
    for path in written.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(written)).read_bytes(), path.name
    other = flowers.write(tmp_path / "other", 2, seed=4)
    name = "VOC2007/JPEGImages/000001.jpg"
    assert (written / name).read_bytes() != (other / name).read_bytes()


def test_boxes_are_tight_on_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    owners: list[np.ndarray] = []
    finish = painting.Canvas.finish

    def record(canvas: painting.Canvas, rng: np.random.Generator) -> Image.Image:
        owners.append(canvas.owner.copy())
        return finish(canvas, rng)

    monkeypatch.setattr(painting.Canvas, "finish", record)
    for seed in range(6):
        image, blooms = flowers.draw(np.random.default_rng([9, seed]))
        owner = owners[-1]
        assert owner.shape == (2 * image.height, 2 * image.width)
        expected = []
        for number in range(1, int(owner.max()) + 1):
            pixels = [(x // 2, y // 2) for y, x in zip(*np.nonzero(owner == number), strict=True)]
            if len(pixels) >= 60:
                xs, ys = [x for x, _ in pixels], [y for _, y in pixels]
                expected.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
        assert [bloom.box for bloom in blooms] == expected
        assert 1 <= len(blooms) <= 6
        assert all(0 <= bloom.hidden < 1 for bloom in blooms)


def test_empty_pictures_have_no_bloom() -> None:
    assert flowers.draw(np.random.default_rng(5), empty=True)[1] == []


def test_more_than_sixty_percent_hidden_is_difficult() -> None:
    image = Image.new("RGB", (300, 250))
    blooms = [Bloom("daisy", (0, 0, 10, 10), 0.6, True), Bloom("tulip", (5, 6, 50, 60), 0.61, False)]
    item = ElementTree.fromstring(flowers._annotation("000007", image, blooms))
    assert [node.findtext("difficult") for node in item.iter("object")] == ["0", "1"]
    assert [node.findtext("truncated") for node in item.iter("object")] == ["1", "0"]
    # 1-based inclusive corners: pixel columns 5 to 49 are 6 to 50.
    corners = [[node.findtext(f"bndbox/{s}") for s in ("xmin", "ymin", "xmax", "ymax")] for node in item.iter("object")]
    assert corners == [["1", "1", "10", "10"], ["6", "7", "50", "60"]]


def test_a_patch_owns_what_it_hides_by_half_and_its_shadow_owns_nothing() -> None:
    canvas = painting.Canvas(np.full((40, 60, 3), 100, np.float32))
    alpha = np.array([[1.0, 0.5, 0.49]], np.float32).repeat(3, 0)
    canvas.paint(np.full(3, 200, np.float32), alpha, 10, 20, owner=1, shadow=0.5)
    assert np.argwhere(canvas.owner == 1).tolist() == [[y, x] for y in (20, 21, 22) for x in (10, 11)]
    assert canvas.pixels[20, 10].tolist() == [200, 200, 200]
    assert (canvas.pixels < 100).any()  # the shadow
    canvas.paint(np.zeros(3, np.float32), np.ones((5, 5), np.float32), 8, 18)
    assert np.argwhere(canvas.owner == 1).tolist() == []
    for x, y in ((-4, 3), (58, 3), (3, -4), (3, 38), (-9, -9), (99, 99)):  # partly and wholly outside
        canvas.paint(np.zeros(3, np.float32), np.ones((5, 5), np.float32), x, y, owner=2)
    # Corners that stick out keep 1 x 5, 2 x 5, 5 x 1 and 5 x 2 pixels.
    assert int((canvas.owner == 2).sum()) == 5 + 10 + 5 + 10


@pytest.mark.parametrize("kind", painting.BACKGROUNDS)
def test_backgrounds_fill_the_canvas(kind: str) -> None:
    for seed in range(3):
        pixels = painting.background(np.random.default_rng(seed), kind, 322, 240)
        assert pixels.shape == (240, 322, 3)
        assert pixels.dtype == np.float32
        assert pixels.min() >= 0
        assert pixels.max() <= 255
        assert pixels.std() > 1


def test_a_whole_set_is_found_again(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowers, "draw", None)  # drawing would raise
    assert flowers.write(written, COUNT, seed=3) == written


@pytest.mark.parametrize("change", [{"count": 21}, {"seed": 4}])
def test_another_set_is_not_overwritten(written: Path, change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"must hold the flowers of .*, got .*: delete it or choose another$"):
        flowers.write(written, **{"count": COUNT, "seed": 3, **change})


def test_a_set_that_lost_files_is_not_taken_for_whole(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "set")
    (tmp_path / "set/VOC2007/JPEGImages/000004.jpg").unlink()
    with pytest.raises(ValueError, match=r"got all but 1, for one VOC2007/JPEGImages/000004\.jpg"):
        flowers.write(tmp_path / "set", COUNT, seed=3)


@pytest.mark.parametrize("name", ["notes.txt", "VOC2007/Annotations/a.xml", "VOC2007/flowers.json"])
def test_other_files_are_left_alone(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not json")
    with pytest.raises(ValueError, match="must be empty or hold the flowers, got a folder with other files"):
        flowers.write(tmp_path, 2)
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == [name]


def test_bad_arguments(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder or not exist, got a file"):
        flowers.write(tmp_path / "file")
    with pytest.raises(ValueError, match="count must be 2 to 999999 pictures, got 1"):
        flowers.write(tmp_path / "new", count=1)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        flowers.write(tmp_path / "new", seed=-1)
    assert not (tmp_path / "new").exists()


def test_an_interrupted_write_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, calls = flowers.draw, []

    def interrupted(rng: np.random.Generator, empty: bool) -> tuple[Image.Image, list[Bloom]]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(rng, empty)

    monkeypatch.setattr(flowers, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flowers.write(tmp_path / "set", 4)
    assert list((tmp_path / "set").iterdir()) == []
    monkeypatch.setattr(flowers, "draw", draw)
    (tmp_path / "set" / ".VOC2007.0badf00d.tmp" / "JPEGImages").mkdir(parents=True)  # as a killed run leaves it
    flowers.write(tmp_path / "set", 4)
    assert len(names(tmp_path / "set", "trainval")) == 4


def test_two_writers_end_with_one_whole_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flowers.write(tmp_path / "first", 2)
    rename = os.rename

    def late(source: Path, target: Path) -> None:  # the other process renames just before this one
        shutil.copytree(tmp_path / "first" / "VOC2007", target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    flowers.write(tmp_path / "set", 2)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["VOC2007"]
    assert json.loads((tmp_path / "set/VOC2007/flowers.json").read_text())["count"] == 2


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "rcnn.data.flowers", str(tmp_path / "set"), "--count", "3", "--seed", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'set'}: 3 pictures of daisy and tulip in VOC layout (2 train, 1 val)\n"
    assert flowers.main([str(tmp_path / "set"), "--count", "4", "--seed", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
