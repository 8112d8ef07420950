"""Images: every kind of file becomes RGB bytes, or one sentence that names it."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from rcnn.images import (
    PADDING,
    ImageError,
    image_size,
    read_image,
    resize,
    stack,
    target_size,
    to_array,
)

RNG = np.random.default_rng(0)
#: 2 rows, 3 columns, all pixels different.
SMALL = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 10


def picture(height=24, width=40):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(width, height, data=b""):
    """A PNG file of any claimed size."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def test_rgb_comes_back_as_written(tmp_path):
    array = picture()
    Image.fromarray(array).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read.dtype == np.uint8 and read.flags.writeable
    np.testing.assert_array_equal(read, array)
    assert image_size(str(tmp_path / "a.png")) == (24, 40)


@pytest.mark.parametrize("ending", ["jpg", "bmp", "gif", "tif", "webp", "ppm", "jp2"])
def test_formats(tmp_path, ending):
    Image.new("RGB", (7, 5), (200, 100, 50)).save(tmp_path / f"a.{ending}")
    array = read_image(tmp_path / f"a.{ending}")
    assert array.shape == (5, 7, 3)
    assert np.abs(array.astype(int) - (200, 100, 50)).max() <= 6  # lossy at default quality, in a flat image


def test_grey_palette_and_one_bit(tmp_path):
    grey = picture()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[:, :, None], 3, 2))

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), [[[255, 0, 0], [0, 0, 255]]])

    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bit.png")
    np.testing.assert_array_equal(read_image(tmp_path / "bit.png"), [[[255] * 3, [0] * 3]])


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(read_image(tmp_path / "rgba.png"), [[[10, 20, 30], [255, 255, 255]]])

    Image.merge("LA", (Image.new("L", (1, 1), 40), Image.new("L", (1, 1), 0))).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_image(tmp_path / "la.png"), [[[255, 255, 255]]])

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "clear.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "clear.png"), [[[255, 255, 255], [0, 0, 255]]])


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red = read_image(tmp_path / "a.jpg")
    assert red.shape == (8, 8, 3) and red[..., 0].min() > 200 and red[..., 1:].max() < 60


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_keep_their_range(tmp_path, ending):
    values = np.array([[0, 128, 129, 257 * 100, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    # 128 / 257 rounds to 0, 129 / 257 to 1
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{ending}")[0, :, 0], [0, 0, 1, 100, 255])


def test_floats(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "unit.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "unit.tif")[0, :, 0], [0, 128, 255])
    Image.fromarray(np.array([[0.0, 300.0]], np.float32)).save(tmp_path / "wide.tif")
    with pytest.raises(ImageError, match="wide.tif.*expected grey values in 0..65535"):
        read_image(tmp_path / "wide.tif")
    Image.fromarray(np.array([[-1, 70000]], np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(ImageError, match="int.tif.*got -1 to 70000"):
        read_image(tmp_path / "int.tif")


@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, SMALL),
        (2, SMALL[:, ::-1]),
        (3, SMALL[::-1, ::-1]),
        (4, SMALL[::-1]),
        (5, SMALL.transpose(1, 0, 2)),
        (6, np.rot90(SMALL, -1)),
        (7, SMALL[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(SMALL)),
        (9, SMALL),
    ],
)
def test_exif_orientation(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(SMALL).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)
    assert image_size(tmp_path / "a.png") == expected.shape[:2]
    Image.fromarray(SMALL).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == read_image(tmp_path / "a.jpg").shape[:2] == expected.shape[:2]
    with Image.open(tmp_path / "a.png") as image:
        np.testing.assert_array_equal(to_array(image), expected)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "tif", "webp"])
def test_truncated(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    Image.fromarray(picture(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=f"a.{ending}"):
        read_image(path)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "post.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    (tmp_path / "folder.jpg").mkdir()
    for read in (read_image, image_size):
        for name, words in [
            ("empty.jpg", "zero bytes"),
            ("text.jpg", "none of these"),
            ("post.jpg", "none of these"),  # EPS would start Ghostscript
            ("folder.jpg", "it is a folder"),
            ("none.jpg", "there is none"),
        ]:
            with pytest.raises(ImageError, match=rf"{name}: expected an image.*{words}"):
                read(tmp_path / name)


def test_decompression_bomb(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(40000, 40000))
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="bomb.png.*decompression bomb"):
            read(tmp_path / "bomb.png")


def test_header_only_for_the_size(tmp_path):
    (tmp_path / "a.png").write_bytes(png(30, 20, b"too little"))
    assert image_size(tmp_path / "a.png") == (20, 30)
    with pytest.raises(ImageError, match="a.png.*damaged"):
        read_image(tmp_path / "a.png")


def test_to_array():
    array = picture()
    assert to_array(array) is array
    np.testing.assert_array_equal(to_array(Image.fromarray(array)), array)
    for bad in (array[:, :, 0], array.astype(np.float32), array[:0]):
        with pytest.raises(ImageError, match=r"must be uint8 of shape \(H, W, 3\)"):
            to_array(bad)
    with pytest.raises(ImageError, match="got int"):
        to_array(3)


@pytest.mark.parametrize(
    ("size", "limits", "expected"),
    [
        ((480, 640), (240, 320), (240, 320)),
        ((640, 480), (240, 320), (320, 240)),
        ((427, 640), (800, 1333), (800, 1199)),  # 427 * (800 / 427) is 799.99... in floats
        ((375, 500), (600, 1000), (600, 800)),
        ((100, 1000), (600, 1000), (100, 1000)),  # the longer side decides
        ((1, 5000), (600, 1000), (1, 1000)),  # never 0
    ],
)
def test_target_size(size, limits, expected):
    assert target_size(*size, *limits) == expected


@pytest.mark.parametrize("size", [(24, 32), (29, 38), (96, 128), (1, 1), (48, 30)])
def test_resize_is_pillows_filter(size):
    array = np.asarray(Image.fromarray(picture(6, 8)).resize((64, 48), Image.Resampling.BICUBIC))
    expected = np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BILINEAR))
    result = resize(array, *size)
    assert result.shape == (*size, 3) and result.flags.c_contiguous
    # both use fixed-point weights and round once per axis
    assert np.abs(result.astype(int) - expected).max() <= 1
    assert resize(array, 48, 64) is array


def test_stack_pads_to_a_multiple_of_32():
    small, wide = picture(20, 33), picture(32, 10)
    images, sizes = stack([small, wide])
    assert images.shape == (2, 3, 32, 64) and images.dtype == torch.uint8
    assert sizes.tolist() == [[20, 33], [32, 10]] and sizes.dtype == torch.float32
    batch = images.permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(batch[0, :20, :33], small)
    np.testing.assert_array_equal(batch[1, :, :10], wide)
    assert (
        (batch[0, 20:] == PADDING).all()
        and (batch[0, :20, 33:] == PADDING).all()
        and (batch[1, :, 10:] == PADDING).all()
    )
    assert stack([small], divisor=1)[0].shape == (1, 3, 20, 33)
    with pytest.raises(ValueError, match="at least one image"):
        stack([])


@pytest.mark.parametrize(("top", "expected"), [(255, [0, 7, 255]), (4095, [0, 0, 255]), (65535, [0, 0, 255])])
def test_grey_integers_are_as_deep_as_their_largest_value_needs(tmp_path, top, expected):
    """7 is 7 of 255; of 4095 it is 0.44, of 65535 0.03, which round to 0."""
    Image.fromarray(np.array([[0, 7, top]], np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0, :, 0].tolist() == expected
    assert to_array(Image.fromarray(np.array([[0, 7, top]], np.int32)))[0, :, 0].tolist() == expected
