"""Pictures of results: boxes, labels, sheets, files and curves."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rcnn import viz


def grey(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 90, np.uint8)


def pixels_of(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """(H, W) bool: where a picture has exactly a colour."""
    return (np.asarray(picture) == np.array(colour, np.uint8)).all(-1)


def test_box_lies_where_it_should() -> None:
    picture = viz.draw_boxes(grey(200, 300), [[40, 60, 140, 160]], ["a"], classes=["a"])
    assert picture.mode == "RGB"
    assert picture.size == (300, 200)
    found = pixels_of(picture, viz.PALETTE[0])
    # Lines of 2 pixels, inwards from the box's first and last: rows 60, 61, 158, 159 and columns 40, 41, 138, 139.
    assert found[60:62, 80:140].all()
    assert found[158:160, 40:140].all()
    assert found[60:160, 40:42].all()
    assert found[60:160, 138:140].all()
    assert not found[64:156, 44:136].any()
    assert not found[160:].any()
    assert not found[:, 140:].any()


def test_the_image_is_not_changed() -> None:
    image = grey(100, 100)
    viz.draw_boxes(image, [[10, 20, 90, 90]], ["a"], [0.5])
    assert (image == 90).all()


def test_no_boxes() -> None:
    for boxes in ([], np.zeros((0, 4), np.float32)):
        assert (np.asarray(viz.draw_boxes(grey(50, 60), boxes, [], [])) == 90).all()


@pytest.mark.parametrize("height, width", [(1, 1), (8, 300), (20, 20), (64, 48), (240, 320), (1500, 2000)])
def test_labels_stay_inside_images_of_any_size(monkeypatch: pytest.MonkeyPatch, height: int, width: int) -> None:
    filled: list[tuple[float, float, float, float]] = []
    written: list[tuple[float, float, float, float]] = []
    rectangle, text = ImageDraw.ImageDraw.rectangle, ImageDraw.ImageDraw.text

    def record_rectangle(self: Any, xy: Any, *args: Any, **options: Any) -> None:
        if "fill" in options:
            filled.append(xy)
        rectangle(self, xy, *args, **options)

    def record_text(self: Any, xy: Any, words: str, *args: Any, **options: Any) -> None:
        written.append(self.textbbox(xy, words, font=options["font"]) if words else (*xy, *xy))
        text(self, xy, words, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", record_rectangle)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_text)
    w, h = width, height
    boxes = [[0, 0, w, h], [0, 0, w / 3, h / 3], [w * 0.9, h * 0.9, w, h], [-50, -50, w + 50, h + 50], [w, h, w, h]]
    boxes += [[w * 0.9, 0, w, h * 0.05], [0, h * 0.95, w * 0.05, h]]
    names = ["cat", "a class with quite a long name, longer than small images are wide", "", "dog", "x", "y", "z"]
    picture = viz.draw_boxes(grey(height, width), boxes, names, np.linspace(0.99, 0.1, 7))
    assert picture.size == (width, height)
    assert len(filled) == len(written) == 7
    for (a1, b1, a2, b2), (c1, d1, c2, d2) in zip(filled, written, strict=True):
        assert a1 >= 0
        assert b1 >= 0
        if height >= 20 and width >= 20:  # smaller than that, a letter does not fit
            assert a2 < width
            assert b2 < height
            assert a1 <= c1
            assert c2 <= a2 + 1
            assert b1 <= d1
            assert d2 <= b2 + 1


def test_letters_grow_with_the_image() -> None:
    def label_height(side: int) -> int:
        box = [[0, side / 2, side, side]]
        label = pixels_of(viz.draw_boxes(grey(side, side), box, ["a"], classes=["a"]), viz.PALETTE[0])[: side // 2 - 4]
        return int(label.any(1).sum())

    assert label_height(200) >= 11
    assert label_height(2000) > 4 * label_height(200)


def test_labels_dodge_each_other() -> None:
    box = [50, 50, 150, 150]
    one = pixels_of(viz.draw_boxes(grey(200, 200), [box], ["a"], [0.9], ["a", "b"]), viz.PALETTE[0])
    both = viz.draw_boxes(grey(200, 200), [box, box], ["b", "a"], [0.5, 0.9], ["a", "b"])
    above = one[:48]  # the label over the box, where the highest score stays
    assert above.sum() > 100
    assert (pixels_of(both, viz.PALETTE[0])[:48] == above).all()


def test_a_large_box_does_not_hide_a_small_one() -> None:
    boxes = [[20, 20, 60, 60], [20, 20, 180, 180]]
    for order in ([0, 1], [1, 0]):
        names = [["small", "large"][k] for k in order]
        picture = viz.draw_boxes(grey(200, 200), [boxes[k] for k in order], names, classes=["small", "large"])
        assert pixels_of(picture, viz.PALETTE[0])[30:60, 20].all()


def test_scores_and_torch_tensors() -> None:
    torch = pytest.importorskip("torch")
    boxes, scores = torch.tensor([[10.0, 30.0, 80.0, 90.0]]), torch.tensor([0.756])
    picture = viz.draw_boxes(grey(100, 100), boxes, ["cat"], scores)
    same = viz.draw_boxes(grey(100, 100), boxes.numpy(), ["cat 0.76"])
    # The same label in the colour of another name: compare where the letters are.
    assert (pixels_of(picture, (0, 0, 0)) == pixels_of(same, (0, 0, 0))).all()


@pytest.mark.parametrize(
    "image, boxes, names, scores, message",
    [
        (np.zeros((4, 4), np.uint8), [], [], None, r"image must be a \(H, W, 3\) uint8 array, got \(4, 4\) uint8"),
        (np.zeros((4, 4, 3)), [], [], None, r"image must be a \(H, W, 3\) uint8 array, got \(4, 4, 3\) float64"),
        ("a.jpg", [], [], None, r"image must be a \(H, W, 3\) uint8 array, got str"),
        (grey(4, 4), [[1, 2, 3, 4, 5]], ["a"], None, r"boxes must have shape \(N, 4\), got \(1, 5\)"),
        (grey(4, 4), [1, 2, 3, 4], ["a"], None, r"boxes must have shape \(N, 4\), got \(4,\)"),
        (grey(4, 4), [[1, 2, 3, np.nan]], ["a"], None, "boxes must be finite numbers, got NaN or infinity"),
        (grey(4, 4), [[1, 2, 3, 4]], [], None, "names must be one per box, got 0 for 1 boxes"),
        (grey(4, 4), [[1, 2, 3, 4]], ["a"], [0.1, 0.2], r"scores must have shape \(1,\), got \(2,\)"),
    ],
)
def test_bad_input(image: Any, boxes: Any, names: Any, scores: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        viz.draw_boxes(image, boxes, names, scores)


def test_colours_are_stable_and_distinct() -> None:
    classes = [f"class {k}" for k in range(12)]
    assert len({viz.class_colour(name, classes) for name in classes}) == 12
    assert viz.class_colour("class 1", classes) == viz.PALETTE[1]
    assert viz.class_colour("class 11", classes) == viz.class_colour("class 11")  # of the name alone
    others = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dog", "person"]
    others += ["daisy", "tulip", "RBC", "WBC", "Platelets"]
    assert len({viz.class_colour(name) for name in others}) == len(others)


def test_contact_sheet() -> None:
    wide, tall = Image.new("RGB", (200, 100), (255, 0, 0)), Image.new("RGB", (50, 100), (0, 0, 255))
    sheet = viz.contact_sheet([wide, tall, tall], 2, width=605)
    # The gap is 3. Row 1: 602 pixels for 200:100 and 50:100 give a height of 602 / 2.5 = 241; row 2: half of 602 for
    # one 50:100 gives 602.
    assert sheet.size == (605, 241 + 3 + 602)
    assert sheet.getpixel((481, 10)) == (255, 0, 0)
    assert sheet.getpixel((483, 10)) == (255, 255, 255)
    assert sheet.getpixel((487, 10)) == (0, 0, 255)
    assert sheet.getpixel((10, 242)) == (255, 255, 255)
    assert sheet.getpixel((300, 800)) == (0, 0, 255)
    assert sheet.getpixel((302, 800)) == (255, 255, 255)


def test_contact_sheet_of_any_mode_and_any_number() -> None:
    for count in (1, 2, 5):
        for mode in ("L", "RGBA", "P"):
            sheet = viz.contact_sheet([Image.new(mode, (30, 40))] * count, 3, width=120)
            assert (sheet.mode, sheet.width) == ("RGB", 120)
    with pytest.raises(ValueError, match="images must hold at least one picture, got none"):
        viz.contact_sheet([], 3)
    with pytest.raises(ValueError, match="columns must be 1 or more, got 0"):
        viz.contact_sheet([Image.new("RGB", (3, 3))], 0)


@pytest.mark.parametrize("ending, kind", [(".jpg", "JPEG"), (".JPEG", "JPEG"), (".png", "PNG")])
def test_save(tmp_path: Path, ending: str, kind: str) -> None:
    viz.save(Image.new("RGB", (20, 10), (250, 0, 0)), tmp_path / f"a{ending}")
    assert os.listdir(tmp_path) == [f"a{ending}"]
    with Image.open(tmp_path / f"a{ending}") as read:
        assert (read.format, read.size) == (kind, (20, 10))


@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_save_needs_a_known_ending(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must end in .jpg, .png or another picture format's ending, got"):
        viz.save(Image.new("RGB", (20, 10)), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_no_matplotlib_no_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viz, "find_spec", lambda name: None)
    rows = [{"epoch": 1, "loss": 2.0}]
    assert viz.plot_curves(rows, {}, tmp_path / "plots") == []
    assert not (tmp_path / "plots").exists()


def test_import_brings_no_matplotlib() -> None:
    code = "import sys, rcnn.viz; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib (the extra plots) is not installed"
)


@needs_matplotlib
def test_plots_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(
        "epoch,step,loss,loss_classifier,val_loss,val_loss_classifier,AP,AP50,VOC_AP\n"
        "1,25,2.0,1.5,,,,,\n2,50,1.5,1.1,1.7,1.2,0.1,0.3,0.31\n3,75,1.2,nan,1.6,1.1,0.2,0.5,0.52\n"
    )
    curves = {"daisy": (np.array([0, 0.5, 1]), np.array([1, 0.9, 0.6])), "tulip": (np.array([]), np.array([]))}
    written = viz.plot_run(tmp_path / "results.csv", curves, tmp_path / "run" / "plots")
    assert [path.name for path in written] == ["loss.png", "ap.png", "precision_recall.png"]
    assert sorted(os.listdir(tmp_path / "run" / "plots")) == ["ap.png", "loss.png", "precision_recall.png"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.size == (840, 540)
            assert np.asarray(picture.convert("L")).std() > 5


@needs_matplotlib
def test_plots_leave_pyplot_alone(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from rcnn import viz
assert viz.plot_curves([{"epoch": 1, "AP": 0.5}], {}, Path(sys.argv[1]))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[1], check=True)


@needs_matplotlib
def test_a_plot_without_points_is_not_drawn(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "loss": None, "AP": ""}, {"epoch": "", "loss": 3.0, "AP": "oops"}]
    assert viz.plot_curves(rows, {"a": ([], [])}, tmp_path / "plots") == []
    assert viz.plot_run(tmp_path / "missing.csv", {}, tmp_path / "plots") == []
    assert [path.name for path in viz.plot_curves([{"epoch": 1, "AP": 0.5}], {}, tmp_path / "plots")] == ["ap.png"]


def test_the_columns_of_a_line() -> None:
    rows: list[dict[str, Any]] = [
        {"epoch": 1, "loss": 2},
        {"epoch": "2", "loss": "1.5"},
        {"epoch": 3, "loss": ""},
        {"epoch": 4},
        {"epoch": 5, "loss": float("inf")},
        {"epoch": 6, "loss": 0.5},
    ]
    assert viz._line(rows, "loss") == ([1.0, 2.0, 6.0], [2.0, 1.5, 0.5])
