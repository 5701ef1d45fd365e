"""Pictures and short videos with a known content: drawn shapes and real handwritten digits."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

# Each name covers the mixtures of its anchors: what a painter and what an HTML table call by it.
COLOURS = {
    "red": ((214, 32, 38), (255, 0, 0)),
    "green": ((30, 152, 56), (0, 128, 0), (20, 235, 40)),
    "blue": ((34, 70, 206), (0, 0, 255)),
    "yellow": ((244, 214, 20), (255, 255, 0)),
    "orange": ((246, 128, 12), (255, 165, 0)),
    "purple": ((138, 38, 158), (128, 0, 128)),
    "black": ((24, 24, 26), (0, 0, 0)),
    "white": ((245, 245, 240), (255, 255, 255)),
}
SHAPES = ("circle", "square", "triangle", "star")
MAX_COUNT = 4
# Neutral backgrounds only, so that "what colour is it" can mean nothing but the shapes.
BACKGROUNDS = (
    *((255, 255, 255), (236, 234, 228), (205, 208, 212), (158, 160, 164)),
    *((104, 104, 108), (58, 60, 66), (0, 0, 0)),
)
# Pictures are drawn on a canvas twice as large as they are shown.
SIDE = 128
CANVAS = 2 * SIDE
# The rows of `load_digits` follow the writers in blocks, so its last rows are hands that training never sees.
HELD_OUT_DIGITS = 400


def _luminance(colour: tuple[int, int, int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _background(rng: np.random.Generator, ink: tuple[int, int, int]) -> tuple[int, int, int]:
    """A neutral background that the ink stands out from."""
    visible = [b for b in BACKGROUNDS if abs(_luminance(b) - _luminance(ink)) > 40]
    return visible[rng.integers(len(visible))]


def _ink(rng: np.random.Generator, name: str) -> tuple[int, int, int]:
    anchors = np.array(COLOURS[name])
    mixture = rng.dirichlet(np.ones(len(anchors))) @ anchors
    return tuple(int(v) for v in np.clip(mixture + rng.integers(-8, 9, 3), 0, 255))


def _regular_polygon(points: int, turn: float, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    angles = [turn + 2 * math.pi * i / points for i in range(points)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    turn: float,
    ink: tuple[int, int, int],
) -> None:
    x, y = centre
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
        return
    if shape == "square":
        points = _regular_polygon(4, turn + math.pi / 4, (1.15 * radius,))
    elif shape == "triangle":
        points = _regular_polygon(3, turn, (1.15 * radius,))
    else:
        points = _regular_polygon(10, turn, (1.15 * radius, 0.48 * radius))
    draw.polygon([(x + a, y + b) for a, b in points], fill=ink)


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """`count` circles (x, y, radius) in the unit square, each somewhere in a quarter of its own."""
    quarters = rng.permutation(4)[:count]
    centres = np.stack([quarters % 2, quarters // 2], axis=1) / 2 + 0.25 + rng.uniform(-0.05, 0.05, (count, 2))
    return [(x, y, rng.uniform(0.12, 0.165)) for x, y in centres]


def scene(rng: np.random.Generator, shape: str, colour: str, count: int) -> Image.Image:
    """`count` shapes of one kind and colour at random places and sizes, RGB."""
    ink = _ink(rng, colour)
    paper = _background(rng, ink)
    image = Image.new("RGB", (CANVAS, CANVAS), paper)
    draw = ImageDraw.Draw(image)
    for x, y, radius in _places(rng, count):
        _draw_shape(draw, shape, (x * CANVAS, y * CANVAS), radius * CANVAS, rng.uniform(-0.3, 0.3), ink)
    return _finish(rng, image)


def _finish(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Smooth edges (drawn larger than shown) and a little sensor noise."""
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noise = rng.normal(0, rng.uniform(0, 5), pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


@cache
def _digit_bank(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    # The strokes touch the edges of their 8 x 8 frame; a margin keeps them from ending abruptly on the picture.
    images = np.pad(data.images.astype(np.float32) / 16.0, ((0, 0), (1, 1), (1, 1)))
    rows = slice(-HELD_OUT_DIGITS, None) if held_out else slice(None, -HELD_OUT_DIGITS)
    return images[rows], data.target[rows]


def digit_layer(rng: np.random.Generator, held_out: bool) -> tuple[int, Image.Image]:
    """One handwritten digit as an 8-bit coverage mask [CANVAS, CANVAS], turned, scaled and shifted a little."""
    images, targets = _digit_bank(held_out)
    row = int(rng.integers(len(targets)))
    # At a quarter more than the canvas the margin is outside, as in a plain enlargement of the original.
    size = int(rng.uniform(1.1, 1.25) * CANVAS)
    stroke = Image.fromarray((images[row] * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    stroke = stroke.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC)
    mask = Image.new("L", (CANVAS, CANVAS))
    slack = CANVAS - size
    mask.paste(stroke, tuple(int(v) for v in rng.uniform(0.35, 0.65, 2) * slack))
    return int(targets[row]), mask


def _digit_colours(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Ink and paper as people write with."""
    return _ink(rng, ("black", "blue")[rng.integers(2)]), BACKGROUNDS[rng.integers(3)]


def digit_picture(rng: np.random.Generator, held_out: bool) -> tuple[int, Image.Image]:
    """A handwritten digit in some ink on some paper: (digit, RGB image)."""
    digit, mask = digit_layer(rng, held_out)
    ink, paper = _digit_colours(rng)
    image = Image.new("RGB", mask.size, paper)
    image.paste(ink, mask=mask)
    return digit, _finish(rng, image)


def shape_video(rng: np.random.Generator, shape: str, colour: str, moves: bool, frames: int) -> list[Image.Image]:
    """One shape that stays where it is, or crosses a good part of the picture on a straight line."""
    ink = _ink(rng, colour)
    paper = _background(rng, ink)
    radius = rng.uniform(0.18, 0.24)
    margin = 1.2 * radius
    start, end = rng.uniform(margin, 1 - margin, (2, 2))
    while moves and math.dist(start, end) < 0.36:
        start, end = rng.uniform(margin, 1 - margin, (2, 2))
    if not moves:
        end = start
    turn = rng.uniform(-0.3, 0.3)
    video = []
    for step in np.linspace(0, 1, frames):
        image = Image.new("RGB", (CANVAS, CANVAS), paper)
        x, y = start + step * (end - start)
        _draw_shape(ImageDraw.Draw(image), shape, (x * CANVAS, y * CANVAS), radius * CANVAS, turn, ink)
        video.append(_finish(rng, image))
    return video


def digit_video(rng: np.random.Generator, held_out: bool, frames: int) -> tuple[int, list[Image.Image]]:
    """A handwritten digit held by a slightly unsteady hand."""
    digit, mask = digit_layer(rng, held_out)
    ink, paper = _digit_colours(rng)
    video = []
    for _ in range(frames):
        image = Image.new("RGB", mask.size, paper)
        shift = tuple(int(v) for v in rng.integers(-6, 7, 2))
        moved = Image.new("L", mask.size)
        moved.paste(mask, shift)
        image.paste(ink, mask=moved)
        video.append(_finish(rng, image))
    return digit, video
