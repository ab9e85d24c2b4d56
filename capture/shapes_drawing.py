"""Coloured shapes on a plain background: what they are, how two of them stand, and their pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 50, 180),
    "black": (25, 25, 25),
}
RELATIONS = ("left", "right", "above", "below")
RADIUS = (6.0, 9.0)
SEPARATION = 20.0
CLEAR = 1.5

Pair = tuple[str, str]
ALL_PAIRS: tuple[Pair, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
# One pair for each shape and one for each colour, so that every word is learned and only the pairing is new.
HELD_OUT_PAIRS: frozenset[Pair] = frozenset(
    (tuple(COLOURS)[(5 * i + 1) % len(COLOURS)], shape) for i, shape in enumerate(SHAPES)
)
TRAIN_PAIRS: tuple[Pair, ...] = tuple(pair for pair in ALL_PAIRS if pair not in HELD_OUT_PAIRS)


@dataclass(frozen=True)
class Thing:
    """One drawn object: centre and radius in pixels (x right, y down), colour with its jitter."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def pair(self) -> Pair:
        return self.colour, self.shape


def relation(subject: Thing, other: Thing) -> str | None:
    """Where `subject` is relative to `other`; None unless one axis is at least 1.5 times the other."""
    dx, dy = subject.x - other.x, subject.y - other.y
    if abs(dx) >= CLEAR * abs(dy):
        return "left" if dx < 0 else "right"
    if abs(dy) >= CLEAR * abs(dx):
        return "above" if dy < 0 else "below"
    return None


def apart(things: Sequence[Thing], least: float = SEPARATION) -> bool:
    """Whether all centres are at least `least` pixels from each other."""
    return all(math.hypot(a.x - b.x, a.y - b.y) >= least for i, a in enumerate(things) for b in things[:i])


def jittered_rgb(colour: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """The named colour, each channel off by about 10 of 255."""
    r, g, b = np.clip(np.array(COLOURS[colour]) + rng.normal(0, 10, 3), 0, 255).astype(int)
    return int(r), int(g), int(b)


def random_background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light grey with a slight tint."""
    r, g, b = np.clip(rng.uniform(200, 250) + rng.normal(0, 4, 3), 0, 255).astype(int)
    return int(r), int(g), int(b)


def mask(thing: Thing) -> Image.Image:
    """The pixels of one object: 255 where it is drawn, 0 elsewhere."""
    image = Image.new("L", (SIDE, SIDE), 0)
    pen = ImageDraw.Draw(image)
    x, y, r = thing.x, thing.y, thing.radius
    match thing.shape:
        case "circle":
            pen.ellipse([x - r, y - r, x + r, y + r], fill=255)
        case "square":
            half = 0.88 * r
            pen.rectangle([x - half, y - half, x + half, y + half], fill=255)
        case "triangle":
            pen.polygon([(x, y - r), (x + r, y + 0.85 * r), (x - r, y + 0.85 * r)], fill=255)
        case "diamond":
            pen.polygon([(x, y - 1.1 * r), (x + 0.8 * r, y), (x, y + 1.1 * r), (x - 0.8 * r, y)], fill=255)
        case "cross":
            arm = 0.35 * r
            pen.rectangle([x - r, y - arm, x + r, y + arm], fill=255)
            pen.rectangle([x - arm, y - r, x + arm, y + r], fill=255)
        case "ring":
            pen.ellipse([x - r, y - r, x + r, y + r], outline=255, width=max(2, round(0.38 * r)))
        case unknown:
            raise ValueError(f"unknown shape {unknown!r}; one of {', '.join(SHAPES)}")
    return image


def box(thing: Thing) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of the drawn pixels: [x0, x1) and [y0, y1), the tightest box that holds them."""
    found = mask(thing).getbbox()
    if found is None:
        raise ValueError(f"{thing.name} at ({thing.x}, {thing.y}) is outside the image")
    return found


def draw(
    things: Sequence[Thing], background: tuple[int, int, int], noise: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """The scene as (SIDE, SIDE, 3) uint8, with Gaussian pixel noise of standard deviation `noise`."""
    image = Image.new("RGB", (SIDE, SIDE), background)
    for thing in things:
        image.paste(thing.rgb, mask=mask(thing))
    noisy = np.asarray(image, np.float32) + rng.normal(0, noise, (SIDE, SIDE, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)
