"""The brushes of :mod:`rcnn.data.flowers`: a canvas that knows who owns each pixel, blooms, clutter, backgrounds.

Everything is drawn at twice the size of the final image and halved at the end. Coordinates are canvas pixels, x to
the right and y down; colours are RGB in 0..255; every random number comes from the ``numpy`` generator handed in.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float32]
Random = np.random.Generator
RGB = tuple[float, float, float]

BACKGROUNDS = ("meadow", "soil", "sky", "bokeh", "wood", "wall")
TULIPS: tuple[tuple[RGB, RGB], ...] = (  # (petal, tip)
    ((196, 26, 40), (222, 52, 52)),
    ((226, 92, 146), (248, 168, 196)),
    ((240, 190, 34), (252, 224, 92)),
    ((108, 44, 136), (158, 92, 180)),
    ((232, 104, 32), (248, 168, 60)),
    ((232, 228, 214), (250, 248, 242)),
    ((190, 30, 44), (248, 208, 70)),
    ((104, 14, 40), (148, 30, 62)),
    ((244, 196, 190), (226, 84, 120)),
)


class Canvas:
    """A picture in the making and, for each of its pixels, the object that is seen there.

    Args:
        pixels: ``(H, W, 3)`` float32, the background.

    Attributes:
        pixels: ``(H, W, 3)`` float32 in 0..255.
        owner: ``(H, W)`` uint8, number of the bloom that shows at each pixel; 0 for anything else.
    """

    def __init__(self, pixels: Array) -> None:
        self.pixels = pixels
        self.owner: NDArray[np.uint8] = np.zeros(pixels.shape[:2], np.uint8)

    def paint(self, colour: Array, alpha: Array, x: int, y: int, owner: int = 0, shadow: float = 0.0) -> None:
        """Lay a patch over the canvas; whatever it hides by half or more changes owner.

        Args:
            colour: ``(h, w, 3)`` or ``(3,)`` float32 in 0..255.
            alpha: ``(h, w)`` float32 in 0..1, how much the patch covers.
            x, y: where the patch's upper left corner lies; may be outside the canvas.
            owner: the bloom's number, or 0.
            shadow: darkness 0..1 of the soft shadow that the patch throws to its lower right.
        """
        if shadow > 0:
            blur = max(2, min(alpha.shape) // 16)
            grown = Image.fromarray((np.pad(alpha, 2 * blur) * 255).astype(np.uint8))
            soft = np.asarray(grown.filter(ImageFilter.BoxBlur(blur)), np.float32) * np.float32(shadow / 255)
            self._blend(np.zeros(3, np.float32), soft, x - blur, y - blur // 2)
        self._blend(colour, alpha, x, y, owner)

    def _blend(self, colour: Array, alpha: Array, x: int, y: int, owner: int | None = None) -> None:
        height, width = self.owner.shape
        left, top = max(0, -x), max(0, -y)
        right, bottom = min(alpha.shape[1], width - x), min(alpha.shape[0], height - y)
        if left >= right or top >= bottom:
            return
        a = alpha[top:bottom, left:right]
        c = colour[top:bottom, left:right] if colour.ndim == 3 else colour
        view = self.pixels[y + top : y + bottom, x + left : x + right]
        view += (c - view) * a[..., None]
        if owner is not None:
            self.owner[y + top : y + bottom, x + left : x + right][a >= 0.5] = owner

    def ribbon(
        self, points: NDArray[np.float64], widths: NDArray[np.float64], colour: RGB, light: float = 1.25
    ) -> None:
        """Paint a band of varying width along a curve, one half in shade: a stem, a blade of grass, a leaf.

        Args:
            points: ``(n, 2)`` the curve, canvas pixels.
            widths: ``(n,)`` half widths along it, pixels.
            colour: of the shaded half.
            light: factor of the colour of the other half.
        """
        direction = np.gradient(points, axis=0)
        normal = np.stack((-direction[:, 1], direction[:, 0]), 1)
        normal /= np.maximum(np.hypot(normal[:, :1], normal[:, 1:]), 1e-6)
        side1, side2 = points + normal * widths[:, None], points - normal * widths[:, None]
        corner = np.floor(np.minimum(side1, side2).min(0)) - 1
        extent = np.ceil(np.maximum(side1, side2).max(0)) + 2 - corner
        size = (int(extent[0]), int(extent[1]))
        whole, half = Image.new("L", size), Image.new("L", size)
        outline = np.concatenate((side1, side2[::-1])) - corner
        ImageDraw.Draw(whole).polygon(outline.ravel().tolist(), fill=255)
        inner = np.concatenate((side1, points[::-1])) - corner
        ImageDraw.Draw(half).polygon(inner.ravel().tolist(), fill=255)
        lit = np.asarray(half, np.float32)[..., None] / 255
        base = np.asarray(colour, np.float32)
        shade = np.minimum(base * (1 + (light - 1) * lit), 255).astype(np.float32)
        self.paint(shade, np.asarray(whole, np.float32) / np.float32(255), int(corner[0]), int(corner[1]))

    def finish(self, rng: Random) -> Image.Image:
        """The picture at its final size: light, vignette, halving, a little noise of the sensor."""
        small = Image.fromarray(np.clip(self.pixels, 0, 255).astype(np.uint8)).reduce(2)
        if rng.random() < 0.2:
            small = small.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 0.9)))
        ys = np.linspace(-1, 1, small.height, dtype=np.float32)[:, None]
        xs = np.linspace(-1, 1, small.width, dtype=np.float32)[None]
        light = rng.uniform(0.84, 1.12) * (1 - rng.uniform(0, 0.2) * (xs * xs + ys * ys) / 2)
        light = light + rng.uniform(-0.1, 0.1) * xs + rng.uniform(-0.08, 0.08) * ys
        warm = rng.uniform(-0.07, 0.1)
        out = np.asarray(small, np.float32) * light[..., None] * np.array([1 + warm, 1, 1 - warm], np.float32)
        out = out + rng.normal(0, rng.uniform(1, 5), out.shape[:2]).astype(np.float32)[..., None]
        return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))


def curve(start: Sequence[float], bend: Sequence[float], end: Sequence[float], count: int = 14) -> NDArray[np.float64]:
    """``(count, 2)`` points of the quadratic Bezier curve from ``start`` to ``end`` that leans towards ``bend``."""
    t = np.linspace(0, 1, count)[:, None]
    return (1 - t) ** 2 * np.asarray(start) + 2 * t * (1 - t) * np.asarray(bend) + t**2 * np.asarray(end)


def _grid(size: int, angle: float) -> tuple[Array, Array]:
    """Coordinates -1..1 of a square patch's pixels in a frame turned by ``angle`` (radians, clockwise); y down."""
    line = (np.arange(size, dtype=np.float32) + 0.5) / (size / 2) - 1
    x, y = np.meshgrid(line, line)
    c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * c + y * s, y * c - x * s


def _over(colour: Array, alpha: Array, top: Array, cover: Array) -> None:
    colour += (top - colour) * cover[..., None]
    np.maximum(alpha, cover, out=alpha)


def daisy(rng: Random, radius: float) -> tuple[Array, Array]:
    """A daisy seen from above or aslant: narrow white petals in two rings round a yellow disc.

    Args:
        rng: where its shape and colour come from.
        radius: of the bloom, canvas pixels.

    Returns:
        colour ``(n, n, 3)`` and alpha ``(n, n)`` float32 of a patch with the bloom in its middle.
    """
    size = 2 * int(math.ceil(radius * 1.04))
    x, y = _grid(size, rng.uniform(0, 2 * math.pi))
    y = y / np.float32(rng.uniform(0.55, 1) if rng.random() < 0.6 else 1)
    r, theta = np.hypot(x, y), np.arctan2(y, x)
    count = int(rng.integers(12, 22))
    step = 2 * math.pi / count
    disc = rng.uniform(0.22, 0.34)
    white = np.array([[250, 249, 244], [252, 240, 240], [250, 246, 226], [240, 244, 252]], np.float32)[rng.integers(4)]
    blush = np.array([226, 140, 170], np.float32) if rng.random() < 0.2 else white * np.float32(0.9)
    colour, alpha = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.float32)
    droop = rng.uniform(-0.35, 0.35)
    for phase, shade in ((0.5, 0.78), (0.0, 1.0)):
        turn = (theta + droop * r * step) / step + phase + count
        petal = np.floor(turn).astype(np.int64) % count
        length = rng.uniform(0.86, 0.99, count).astype(np.float32)[petal]
        breadth = (rng.uniform(0.72, 0.98, count).astype(np.float32) * np.float32(math.pi / count))[petal]
        t = np.minimum(r / length, 1)
        width = breadth * t**0.5 * np.sqrt(1 - t**6)
        across = np.sin((turn % 1 - 0.5) * step) * r
        cover = np.clip((width - np.abs(across)) * (size / 2) + 0.5, 0, 1) * (width > 0)
        s = across / np.maximum(width, 1e-4)
        tone = shade * (0.66 + 0.34 * np.sqrt(t)) * (1 - 0.2 * s * s + 0.035 * np.cos(s * 9)) * (1 + 0.05 * s)
        tip = np.clip(t * 2.4 - 1.6, 0, 1)[..., None]
        _over(colour, alpha, (white + (blush - white) * tip) * tone[..., None], cover)
    inside = np.clip((disc - r) * (size / 2) + 0.5, 0, 1)
    grain = np.cos(r * 60 / disc * 0.35) * np.cos(theta * 13 + r * 40) * 0.09
    dome = 1.04 - 0.38 * (r / disc) ** 2 - 0.12 * (x + y) / disc + grain
    yellow = np.array([[248, 196, 24], [242, 170, 20], [250, 214, 60]], np.float32)[rng.integers(3)]
    _over(colour, alpha, np.clip(yellow * dome[..., None], 0, 255), inside)
    return np.clip(colour, 0, 255), alpha


def tulip(rng: Random, height: float, angle: float) -> tuple[Array, Array]:
    """A tulip's bloom from the side: a cup of broad petals, without stem and leaves.

    Args:
        rng: where its shape and colour come from.
        height: of the bloom, canvas pixels.
        angle: how far it leans to the right, radians.

    Returns:
        colour ``(n, n, 3)`` and alpha ``(n, n)`` float32 of a patch; the foot of the bloom lies 0.5 height below
        the patch's middle, along the leaning axis.
    """
    size = 2 * int(math.ceil(height * 0.72))
    x, y = _grid(size, angle)
    scale = np.float32(size / (2 * height))
    x, up = x * scale, 0.5 - y * scale
    inside = (up >= 0) & (up < 1) & (np.abs(x) < 0.7)  # the rest of the patch stays empty: half of the work
    x, up = x[inside], up[inside]
    body, tip = (np.array(c, np.float32) for c in TULIPS[rng.integers(len(TULIPS))])
    wide, flare = rng.uniform(0.3, 0.42), rng.uniform(-0.25, 0.35)
    colour, alpha = np.zeros((len(up), 3), np.float32), np.zeros(len(up), np.float32)
    # (sideways offset, half width, length, brightness), from the back to the front
    petals = [(-0.42, 0.62, 0.96, 0.66), (0.42, 0.62, 0.98, 0.7), (0.02, 0.7, 1.0, 0.6)]
    petals += [(-0.56, 0.56, 0.93, 0.9), (0.58, 0.54, 0.91, 0.86), (rng.uniform(-0.2, 0.2), 0.62, 0.84, 1.06)]
    light = rng.uniform(-0.14, 0.14)
    for offset, breadth, length, shade in petals:
        t = np.clip(up / np.float32(length * rng.uniform(0.94, 1.02)), 0, 1)
        # The outline as a table over t: a power for each pixel would take most of the time that a picture takes.
        u, at = np.linspace(0, 1, 1024), (t * 1023).astype(np.intp)
        middles = wide * offset * np.minimum(u / 0.4, 1) ** 0.6 * (1 + flare * u * u * abs(offset) * 2)
        widths = wide * breadth * rng.uniform(1.05, 1.19) * (u + 0.05) ** 0.45 * (1 - u**2.6) ** 0.72
        across, width = x - middles.astype(np.float32)[at], widths.astype(np.float32)[at]
        cover = np.clip((width - np.abs(across)) * height + 0.5, 0, 1) * (t < 1)
        s = np.clip(across / np.maximum(width, 1e-4), -1, 1)
        tone = shade * (1 - 0.26 * s * s + 0.03 * np.cos(s * 11 + offset)) * (1 + light * s) * (0.8 + 0.24 * t)
        rim = np.clip(np.abs(s) * 1.4 - 0.6 + t * t * 0.7, 0, 1)[..., None]
        _over(colour, alpha, (body + (tip - body) * rim) * tone[..., None], cover)
    green = np.clip(0.16 - up, 0, 0.12)[..., None] * 5
    colour += (np.array([150, 170, 80], np.float32) - colour) * green
    patch, cover = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.float32)
    patch[inside], cover[inside] = np.clip(colour, 0, 255), alpha
    return patch, cover


def ball(rng: Random, radius: float, colour: RGB, rough: float = 0.0) -> tuple[Array, Array]:
    """A round thing lit from the upper left: a berry, a marble or, with ``rough`` > 0, a stone."""
    size = 2 * int(math.ceil(radius * 1.05))
    x, y = _grid(size, rng.uniform(-0.6, 0.6))
    y = y / np.float32(rng.uniform(0.6, 0.9) if rough else 1)
    theta = np.arctan2(y, x)
    edge = np.ones_like(x)
    for k in (2, 3, 5):
        edge -= np.float32(rough * rng.uniform(0, 1) / k) * (1 + np.cos(k * theta + rng.uniform(0, 6)))
    r = np.hypot(x, y) / edge
    light = np.hypot(x / edge + 0.3, y / edge + 0.35)
    tone = 1.12 - 0.5 * light * light
    if rough:
        tone = tone + noise(rng, size, size, 9)[:size, :size] * 0.25
    shine = np.clip(0.75 - light * 2.6, 0, 1) * (0 if rough else 0.9)
    out = np.array(colour, np.float32) * np.clip(tone, 0.25, 1.3)[..., None]
    out = out + (255 - out) * shine[..., None]
    return np.clip(out, 0, 255), np.clip((0.96 - r) * radius + 0.5, 0, 1).astype(np.float32)


def rosette(rng: Random, radius: float) -> tuple[Array, Array]:
    """A bloom of another kind, from above: four to six round petals in blue, red or violet, or a dandelion."""
    size = 2 * int(math.ceil(radius * 1.04))
    x, y = _grid(size, rng.uniform(0, 2 * math.pi))
    y = y / np.float32(rng.uniform(0.7, 1))
    r, theta = np.hypot(x, y), np.arctan2(y, x)
    kind = int(rng.integers(4))
    base, core, count, rim = (
        ((96, 130, 226), (250, 226, 110), 5, 0.16),
        ((206, 36, 30), (36, 24, 30), 4, 0.22),
        ((150, 84, 196), (240, 220, 240), 6, 0.12),
        ((246, 200, 30), (224, 160, 16), 26, 0.3),
    )[kind]
    lobe = np.abs(np.cos(theta * count / 2)) ** (0.5 if kind < 3 else 1)
    edge = 0.62 + 0.34 * lobe
    t = r / edge
    tone = (0.7 + 0.35 * t) * (0.82 + 0.2 * lobe) + 0.04 * np.cos(theta * count * 6)
    colour = np.array(base, np.float32) * tone[..., None]
    alpha = np.clip((edge - r) * radius + 0.5, 0, 1).astype(np.float32)
    inner = np.clip((rim - r) * radius + 0.5, 0, 1)[..., None]
    colour = colour + (np.array(core, np.float32) * (1.1 - 0.3 * (r / rim)[..., None] ** 2) - colour) * inner
    return np.clip(colour, 0, 255).astype(np.float32), alpha


def mushroom(canvas: Canvas, rng: Random, x: float, y: float, size: float) -> None:
    """A toadstool whose cap, ``size`` canvas pixels wide, has its foot at ``(x, y)``."""
    foot = curve((x, y), (x + size * 0.05, y - size * 0.3), (x, y - size * 0.6), 8)
    canvas.ribbon(foot, np.linspace(0.15, 0.11, 8) * size, (204, 196, 178), 1.18)
    cap_colour: RGB = ((190, 34, 26), (140, 92, 54), (206, 150, 80))[rng.integers(3)]
    n = 2 * int(math.ceil(size / 2 * 1.04))
    u, v = _grid(n, rng.uniform(-0.2, 0.2))
    v = v / 0.9
    edge = np.where(v < 0.25, 1 - np.hypot(u, (v - 0.25) / 1.2), 1 - np.hypot(u, (v - 0.25) * 5.0))
    alpha = np.clip(edge * size / 2 + 0.5, 0, 1).astype(np.float32)
    colour = np.array(cap_colour, np.float32) * (1.05 - 0.35 * np.hypot(u + 0.3, v + 0.4))[..., None]
    for _ in range(int(rng.integers(4, 9))):
        a, b, c = rng.uniform(-0.7, 0.7), rng.uniform(-0.75, 0.1), rng.uniform(0.07, 0.13)
        spot = np.clip((c - np.hypot(u - a, v - b)) * size / 2 + 0.5, 0, 1)[..., None]
        colour = colour + (np.array((246, 240, 226), np.float32) - colour) * spot
    canvas.paint(np.clip(colour, 0, 255).astype(np.float32), alpha, int(x - n / 2), int(y - size), shadow=0.3)


def butterfly(canvas: Canvas, rng: Random, x: float, y: float, size: float) -> None:
    """A butterfly with its body's middle at ``(x, y)``, ``size`` canvas pixels across."""
    n = 2 * int(math.ceil(size / 2 * 1.05))
    u, v = _grid(n, rng.uniform(0, 2 * math.pi))
    u = np.abs(u) / np.float32(rng.uniform(0.6, 1))
    upper = 1 - np.hypot((u - 0.48) / 0.46, (v + 0.28 + 0.3 * (u - 0.5)) / 0.4)
    lower = 1 - np.hypot((u - 0.36) / 0.34, (v - 0.34 - 0.2 * (u - 0.3)) / 0.34)
    wing = np.maximum(upper, lower)
    base: RGB = ((236, 150, 40), (90, 150, 230), (240, 224, 120), (200, 80, 40))[rng.integers(4)]
    colour = np.array(base, np.float32) * np.where(wing < 0.2, 0.25, 0.75 + 0.35 * wing)[..., None]
    body = 1 - np.hypot(u / 0.07, v / 0.55)
    colour = np.where(body[..., None] > 0, np.float32(40), colour)
    alpha = np.clip(np.maximum(wing, body) * size / 5 + 0.5, 0, 1).astype(np.float32)
    canvas.paint(np.clip(colour, 0, 255).astype(np.float32), alpha, int(x - n / 2), int(y - n / 2), shadow=0.3)


def leaf(canvas: Canvas, rng: Random, x: float, y: float, length: float, angle: float, colour: RGB) -> None:
    """A leaf from its foot at ``(x, y)`` in the direction ``angle`` (radians; 0 to the right, clockwise)."""
    end = (x + length * math.cos(angle), y + length * math.sin(angle))
    sag = rng.uniform(-0.25, 0.25) * length
    bend = ((x + end[0]) / 2 - sag * math.sin(angle), (y + end[1]) / 2 + sag * math.cos(angle))
    t = np.linspace(0, 1, 16)
    widths = np.sin(np.pi * t**0.8) ** 0.9 * length * rng.uniform(0.09, 0.2) + 0.6
    canvas.ribbon(curve((x, y), bend, end, 16), widths, colour, rng.uniform(1.1, 1.35))


def green(rng: Random) -> RGB:
    """A green of grass or leaf."""
    g = rng.uniform(84, 170)
    return (g * rng.uniform(0.35, 0.8), g, g * rng.uniform(0.2, 0.5))


def noise(rng: Random, height: int, width: int, cells: float, octaves: int = 3) -> Array:
    """Smooth noise ``(height, width)`` float32 round 0, about -1..1; ``cells`` lattice cells along the longer side."""
    out = np.zeros((height, width), np.float32)
    for k in range(octaves):
        pitch = max(height, width) / (cells * 2**k)
        shape = (max(2, int(height / pitch) + 2), max(2, int(width / pitch) + 2))
        lattice = Image.fromarray(rng.uniform(-1, 1, shape).astype(np.float32))
        out += np.asarray(lattice.resize((width, height), Image.Resampling.BICUBIC)) / np.float32(1.6**k)
    return out * np.float32(0.7)


def _mix(low: RGB, high: RGB, t: Array) -> Array:
    low_, high_ = np.array(low, np.float32), np.array(high, np.float32)
    return low_ + (high_ - low_) * np.clip(t, 0, 1)[..., None]


def _blades(image: Image.Image, rng: Random, count: int, tones: float, horizon: float) -> None:
    draw = ImageDraw.Draw(image)
    width, height = image.size
    for y in np.sort(rng.uniform(horizon + 0.05, 1.25, count)) * height:
        x, tall = rng.uniform(-0.05, 1.05) * width, rng.uniform(0.08, 0.24) * min(y, height) * (1 - horizon)
        lean, thick = rng.normal(0, 0.35) * tall, rng.uniform(1.5, 4.5)
        c = np.array(green(rng)) * tones * (0.55 + 0.45 * y / height)
        path = curve((x, y), (x, y - tall * 0.6), (x + lean, y - tall), 6)
        w = np.linspace(thick, 0.3, 6)[:, None] * np.array([[1.0, 0.0]])
        draw.polygon(np.concatenate((path - w, (path + w)[::-1])).ravel().tolist(), fill=tuple(c.astype(int).tolist()))


def background(rng: Random, kind: str, width: int, height: int) -> Array:
    """A background.

    Args:
        rng: where its layout and colours come from.
        kind: one of :data:`BACKGROUNDS`.
        width, height: of the canvas in pixels, even.

    Returns:
        ``(height, width, 3)`` float32 in 0..255.
    """
    w, h = width // 2, height // 2
    ys = np.broadcast_to(np.linspace(0, 1, h, dtype=np.float32)[:, None], (h, w))
    base: Array
    horizon = 0.0
    if kind == "meadow":
        a, b = (((52, 84, 30), (140, 176, 70)), ((40, 80, 44), (110, 170, 100)), ((90, 92, 40), (190, 180, 96)))[
            rng.choice(3, p=(0.55, 0.25, 0.2))
        ]
        base = _mix(a, b, 0.5 + 0.35 * noise(rng, h, w, 5) - 0.25 * ys)
        if rng.random() < 0.35:  # the sky and a row of trees above the meadow
            far = _mix((230, 238, 240), (150, 190, 225), 0.8 - 2 * ys)
            edge = rng.uniform(0.12, 0.4)
            trees = edge - 0.07 + 0.05 * noise(rng, 2, w, 9, 3)[:1]
            wood = _mix((40, 62, 40), (84, 110, 70), 0.5 + 0.6 * noise(rng, h, w, 14, 2))
            base = np.where((ys < edge)[..., None], np.where((ys < trees)[..., None], far, wood), base)
            horizon = edge
    elif kind == "soil":
        a, b = ((58, 40, 28), (140, 104, 72)) if rng.random() < 0.6 else ((96, 84, 70), (176, 160, 136))
        base = _mix(a, b, 0.45 + 0.3 * noise(rng, h, w, 6, 3) + 0.22 * noise(rng, h, w, 60, 2))
    elif kind == "sky":
        top: RGB = (rng.uniform(60, 110), rng.uniform(130, 165), rng.uniform(205, 240))
        base = _mix(top, (206, 226, 242), ys)
        cloud = np.clip(noise(rng, h, w, 3, 5) * 1.3 - rng.uniform(-0.2, 0.3), 0, 1)
        base = base + (np.float32(250) - base) * cloud[..., None]
    elif kind == "bokeh":
        a = ((22, 44, 22), (40, 34, 24), (30, 44, 60))[rng.integers(3)]
        base = _mix(a, green(rng), 0.4 + 0.45 * noise(rng, h, w, 3, 2))
    elif kind == "wood":
        base = _wood(rng, h, w, ys)
    else:
        base = _bricks(rng, h, w)
    image = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    if kind == "meadow":
        _blades(image, rng, int(rng.integers(40, 200)), rng.uniform(0.8, 1.2), horizon)
        image = image.filter(ImageFilter.BoxBlur(float(rng.choice([3, 6] if horizon else [0, 1, 3, 6]))))
    elif kind == "soil":
        draw = ImageDraw.Draw(image)
        for _ in range(int(rng.integers(20, 90))):
            x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(2, 7)
            tone = int(rng.integers(60, 170))
            draw.ellipse((x - r, y - r * 0.7, x + r, y + r * 0.7), fill=(tone, int(tone * 0.9), int(tone * 0.78)))
    elif kind == "bokeh":
        layer = image.copy()
        draw = ImageDraw.Draw(layer)
        for _ in range(int(rng.integers(15, 45))):
            x, y, r = rng.uniform(0, width), rng.uniform(0, height), rng.uniform(0.02, 0.09) * width
            hue = np.array(((190, 220, 120), (240, 220, 160), (210, 160, 190), (150, 200, 150))[rng.integers(4)])
            draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple((hue * rng.uniform(0.5, 1)).astype(int).tolist()))
        image = Image.blend(image, layer.filter(ImageFilter.BoxBlur(float(rng.uniform(4, 9)))), 0.6)
    return np.array(image, np.float32)


def _wood(rng: Random, h: int, w: int, ys: Array) -> Array:
    warp = noise(rng, h, w // 5, 5, 2)
    warp = np.asarray(Image.fromarray(warp).resize((w, h), Image.Resampling.BICUBIC))
    fibre = np.asarray(Image.fromarray(noise(rng, h, w // 12, 70, 2)).resize((w, h), Image.Resampling.BICUBIC))
    planks = int(rng.integers(2, 6))
    board = np.floor(ys * planks).astype(np.int64).clip(0, planks - 1)
    tone = rng.uniform(0.82, 1.12, planks).astype(np.float32)[board]
    shift = rng.uniform(0, 9, planks).astype(np.float32)[board]
    grain = np.sin((ys * planks * rng.uniform(4, 8) + shift + 0.8 * warp) * 6.3) * 0.09
    a, b = ((104, 66, 36), (186, 134, 84)) if rng.random() < 0.6 else ((120, 112, 104), (196, 188, 178))
    base = _mix(a, b, 0.5 + grain + 0.2 * fibre) * tone[..., None]
    gap = np.abs((ys * planks + 0.5) % 1 - 0.5) * h / planks < 1.3
    return np.where((gap & (ys > 0.5 / planks))[..., None], np.float32(0.35), np.float32(1)) * base


def _bricks(rng: Random, h: int, w: int) -> Array:
    tall = rng.uniform(20, 34)
    wide = tall * rng.uniform(2, 2.8)
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    row = np.floor(y / tall)
    x = x + (row % 2) * wide / 2
    column = np.floor(x / wide)
    tones = rng.uniform(0.75, 1.12, (64, 64)).astype(np.float32)[row.astype(int) % 64, column.astype(int) % 64]
    colour: RGB = ((160, 84, 66), (150, 142, 130), (190, 170, 140))[rng.integers(3)]
    near = np.minimum(np.minimum(y % tall, tall - y % tall), np.minimum(x % wide, wide - x % wide))
    rough = tones + noise(rng, h, w, 40, 2) * 0.16
    base = np.array(colour, np.float32) * rough[..., None]
    mortar = np.clip(2.6 - near, 0, 1)[..., None]
    return base + (np.array((178, 170, 158), np.float32) * (1 + 0.1 * rough[..., None]) - base) * mortar
