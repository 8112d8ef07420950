"""Images: files and arrays to RGB, resizing, and batches of 8-bit pixels.

Pixels stay ``uint8`` up to the network's device, where the model normalises them: a batch is four times smaller that
way. All arrays are ``(H, W, 3)`` uint8 RGB.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image
from torch import Tensor

#: Formats that are opened (JPEG includes the MPO of cameras). Pillow knows more, and some of them run other programs
#: (EPS runs Ghostscript).
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

#: File name endings of those formats, lower case.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff", ".webp")

#: Colour of the padding: ImageNet's mean, which the model's normalisation turns into about zero.
PADDING = (124, 116, 104)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be read; the message names the file."""


def read_image(path: "str | os.PathLike[str]", at_least: tuple[int, int] | None = None) -> np.ndarray:
    """Pixels of an image file.

    The EXIF orientation is applied. Grey, palette, CMYK and 1-bit images become RGB; transparent ones are laid on
    white; deeper grey ones are scaled to 8 bits, by 255 / 65535, by 255 / 4095 where no value needs more than
    12 bits, and by 1 where none needs more than 8; of several frames the first is taken.

    Args:
        path: image file in one of :data:`FORMATS`.
        at_least: height and width that are enough: a JPEG is decoded at a half, a quarter or an eighth of its size,
            rounded up, if that is not less, in a fraction of the time. Of other formats all pixels are read.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        ImageError: the file is missing, empty, truncated, not an image, or has more pixels than Pillow's
            ``2 * Image.MAX_IMAGE_PIXELS`` (a decompression bomb).
    """
    with _opened(path) as image:
        if at_least is not None:
            height, width = at_least
            image.draft(None, (height, width) if _orientation(image) >= 5 else (width, height))
        return _to_rgb(image, os.fspath(path))


def image_size(path: "str | os.PathLike[str]") -> tuple[int, int]:
    """Height and width of an image file after its EXIF orientation is applied, from its header alone.

    Raises:
        ImageError: as :func:`read_image`, except for damage behind the header.
    """
    with _opened(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def to_array(image: "str | os.PathLike[str] | Image.Image | np.ndarray") -> np.ndarray:
    """Pixels of a file, of a Pillow image (converted like a file) or of an array (taken as it is).

    Args:
        image: path, Pillow image, or ``(H, W, 3)`` uint8 RGB array.

    Returns:
        ``(H, W, 3)`` uint8, RGB.

    Raises:
        ImageError: see :func:`read_image`; an array of another shape or dtype.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ImageError(f"an image array must be uint8 of shape (H, W, 3), got {image.dtype} of {image.shape}")
        return image
    if isinstance(image, Image.Image):
        with _readable("the image"):
            return _to_rgb(image, "the image")
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    raise ImageError(f"an image must be a path, a Pillow image or a uint8 array, got {type(image).__name__}")


def target_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Size that an image is resized to before it enters the network.

    Both sides are multiplied by ``min(min_size / shorter, max_size / longer)`` and rounded down, in exact arithmetic;
    no side becomes 0.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        min_size: what the shorter side becomes, pixels, unless the longer one would exceed ``max_size``.
        max_size: what the longer side may become at most, pixels.

    Returns:
        Height and width, pixels.

    Source:
        torchvision's ``GeneralizedRCNNTransform``; it computes in float32, which can be one pixel less.
    """
    shorter, longer = min(height, width), max(height, width)
    if min_size * longer <= max_size * shorter:
        numerator, denominator = min_size, shorter
    else:
        numerator, denominator = max_size, longer
    return max(1, height * numerator // denominator), max(1, width * numerator // denominator)


def resize(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Image resized bilinearly, averaging over all source pixels where it shrinks.

    The filter is that of Pillow's ``BILINEAR``; torch's form of it takes a fifth of the time and differs from it by at
    most 1 of 255 in a few pixels.

    Args:
        array: ``(H, W, 3)`` uint8.
        height: new height, pixels.
        width: new width, pixels.

    Returns:
        ``(height, width, 3)`` uint8; ``array`` itself if it has that size already.
    """
    if array.shape[:2] == (height, width):
        return array
    source = torch.from_numpy(np.require(array, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = F.interpolate(source, size=(height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def stack(arrays: Sequence[np.ndarray], divisor: int = 32) -> tuple[Tensor, Tensor]:
    """One batch from images of any sizes: padded at the right and bottom with :data:`PADDING`.

    Args:
        arrays: B times ``(H_b, W_b, 3)`` uint8.
        divisor: height and width of the batch are multiples of it, pixels.

    Returns:
        images ``(B, 3, H, W)`` uint8; image_sizes ``(B, 2)`` float32, height and width of each image, pixels.

    Raises:
        ValueError: no image is given.
    """
    if not arrays:
        raise ValueError("a batch needs at least one image, got none")
    height = -(-max(a.shape[0] for a in arrays) // divisor) * divisor
    width = -(-max(a.shape[1] for a in arrays) // divisor) * divisor
    images = np.empty((len(arrays), 3, height, width), np.uint8)
    for image, array in zip(images, arrays, strict=True):
        h, w = array.shape[:2]
        image[:, :h, :w] = array.transpose(2, 0, 1)
        padding = np.array(PADDING, np.uint8)[:, None, None]
        image[:, h:] = padding
        image[:, :h, w:] = padding
    sizes = torch.tensor([a.shape[:2] for a in arrays], dtype=torch.float32)
    return torch.from_numpy(images), sizes


@contextmanager
def _opened(path: "str | os.PathLike[str]") -> Iterator[Image.Image]:
    name = os.fspath(path)
    if not os.path.isfile(name):
        what = "it is a folder" if os.path.isdir(name) else "there is none"
        raise ImageError(f"{name}: expected an image file, but {what}")
    with _readable(name):
        if os.path.getsize(name) == 0:
            raise ImageError(f"{name}: expected an image, but the file has zero bytes")
        with Image.open(name, formats=FORMATS) as image:
            if min(image.size) < 1:
                raise ImageError(f"{name}: expected an image, but its size is {image.size[0]} x {image.size[1]}")
            yield image


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turn whatever Pillow raises on a bad file into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # corrupt EXIF, palette with transparency: converted all the same
            yield
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(
            f"{name}: expected an image ({', '.join(FORMATS)}), but the content is none of these"
        ) from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ImageError(
            f"{name}: expected at most {limit} pixels, but its header claims more (decompression bomb)"
        ) from None
    except MemoryError:
        raise ImageError(f"{name}: the image does not fit into memory") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise ImageError(f"{name}: the image is truncated or damaged ({reason})") from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1..8, from what stands before the pixels."""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # Pillow would decode the whole file to look for a late chunk
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata of an image whose pixels are fine
        return 1
    return value if value in _TURNS else 1


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    orientation = _orientation(image)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bits(np.asarray(image), name))
    elif "transparency" in image.info or image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        if image.mode == "La":
            image = image.convert("LA")
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, (255, 255, 255))
        image.paste(rgba, mask=rgba.getchannel("A"))
    if image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    return np.array(image)


def _to_8_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Grey integers, or floats in 0..1, as 8 bits; other ranges have no agreed meaning.

    Integers are as deep as their largest value needs: 8, 12 (as cameras for science give them) or 16 bits.
    """
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(values * 255).astype(np.uint8)
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        if high <= 255:
            return values.astype(np.uint8)
        top = 4095 if high <= 4095 else 65535
        return ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    raise ImageError(
        f"{name}: expected grey values in 0..65535, or 0..1 for floats, got {low} to {high}; save it with 8 bits"
    )
