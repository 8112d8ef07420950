"""Resizing and random changes of an image and its boxes.

All randomness comes from a NumPy generator made of (seed, epoch, image), so the number of workers, the order in which
images are loaded and a resumed run change nothing. Pixels stay uint8 throughout.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from rcnn.images import resize, target_size

#: Boxes with a side shorter than this after resizing, in pixels, do not train.
MIN_SIDE = 1.0

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R 601 luma, as Pillow's "L"


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The source of random numbers for image ``index`` in ``epoch``; the same three numbers give the same ones."""
    return np.random.default_rng((seed % 2**64, epoch, index))


@dataclass(frozen=True)
class Augment:
    """Zoom, colour and flips; the defaults only resize.

    Six numbers are drawn for every image whatever is switched on, so that one setting does not change another's draws.

    Args:
        flip: probability of a horizontal flip.
        vertical_flip: probability of a vertical flip.
        color: strength c of the jitter: brightness, contrast and saturation are each multiplied by a factor drawn
            from ``1 - c .. 1 + c``.
        scale: lowest and highest zoom; ``min_size`` and ``max_size`` are both multiplied by it.
    """

    flip: float = 0.0
    vertical_flip: float = 0.0
    color: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)

    def __call__(
        self, image: np.ndarray, boxes: np.ndarray, *, min_size: int, max_size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Resize and change one image.

        Args:
            image: ``(H, W, 3)`` uint8.
            boxes: ``(n, 4)`` float32, pixels of ``image``.
            min_size: shorter side of the result before zoom, pixels; see :func:`rcnn.images.target_size`.
            max_size: longer side of it at most, pixels.
            rng: source of randomness; see :func:`generator`.

        Returns:
            image ``(H', W', 3)`` uint8; boxes ``(n, 4)`` float32, pixels of it, in the same order.
        """
        size = image.shape[0], image.shape[1]
        image, boxes, (flip, vertical_flip) = self.unflipped(
            image, boxes, size=size, min_size=min_size, max_size=max_size, rng=rng
        )
        if flip:
            image = image[:, ::-1]
        if vertical_flip:
            image = image[::-1]
        return np.ascontiguousarray(image), boxes

    def sides(self, min_size: int, max_size: int) -> tuple[int, int]:
        """``min_size`` and ``max_size`` at the highest zoom."""
        return max(1, round(min_size * self.scale[1])), max(1, round(max_size * self.scale[1]))

    def unflipped(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        *,
        size: tuple[int, int],
        min_size: int,
        max_size: int,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, tuple[bool, bool]]:
        """As a call, but the pixels are not flipped yet: a GPU does that as it pads.

        Args:
            image: ``(h, w, 3)`` uint8, perhaps decoded at a part of its size.
            boxes: ``(n, 4)`` float32, pixels of the full size.
            size: height and width of the full size.
            min_size: see a call.
            max_size: see a call.
            rng: see a call.

        Returns:
            image ``(H', W', 3)`` uint8; boxes of the flipped image; whether it is to be flipped left to right, and top
            to bottom.
        """
        zoom, flip, vertical_flip, *color = rng.random(6)
        zoom = self.scale[0] + (self.scale[1] - self.scale[0]) * zoom
        sizes = max(1, round(min_size * zoom)), max(1, round(max_size * zoom))
        height, width = size
        new_height, new_width = target_size(height, width, *sizes)
        image = resize(image, new_height, new_width)
        boxes = scale_boxes(boxes, new_height / height, new_width / width)
        if self.color > 0:
            image = jitter_color(image, *(1 + self.color * (2 * u - 1) for u in color))
        flips = bool(flip < self.flip), bool(vertical_flip < self.vertical_flip)
        if flips[0]:
            boxes = np.stack((new_width - boxes[:, 2], boxes[:, 1], new_width - boxes[:, 0], boxes[:, 3]), 1)
        if flips[1]:
            boxes = np.stack((boxes[:, 0], new_height - boxes[:, 3], boxes[:, 2], new_height - boxes[:, 1]), 1)
        return image, boxes, flips


def scale_boxes(boxes: np.ndarray, vertical: float, horizontal: float) -> np.ndarray:
    """Boxes of an image whose height is multiplied by ``vertical`` and whose width by ``horizontal``.

    Args:
        boxes: ``(n, 4)`` float32, pixels.
        vertical: factor on y.
        horizontal: factor on x.

    Returns:
        ``(n, 4)`` float32, pixels.
    """
    return (boxes * np.array((horizontal, vertical, horizontal, vertical))).astype(np.float32)


def jitter_color(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Multiply saturation, brightness and contrast, in this order, in one pass over the pixels.

    With grey(v) the luma of pixel v and m the image's mean luma (from every fourth pixel of every fourth row):
    ``contrast * brightness * (saturation * v + (1 - saturation) * grey(v)) + (1 - contrast) * brightness * m``,
    rounded and cut to 0..255.

    Args:
        image: ``(H, W, 3)`` uint8.
        brightness: factor; 1 changes nothing.
        contrast: factor; 1 changes nothing.
        saturation: factor; 1 changes nothing, 0 makes grey.

    Returns:
        ``(H, W, 3)`` uint8.

    Source:
        torchvision's ``ColorJitter``, which cuts to 0..255 after each step.
    """
    mean = float(image[::4, ::4].reshape(-1, 3).mean(0) @ _GREY)
    factors = contrast * brightness * (saturation * np.eye(3) + (1 - saturation) * _GREY)
    shift = np.full((3, 1), (1 - contrast) * brightness * mean)
    matrix = tuple(np.hstack((factors, shift)).ravel().tolist())
    return np.asarray(Image.fromarray(image).convert("RGB", matrix))
