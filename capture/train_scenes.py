"""What spatial-tiny is trained on, in words: random scenes, questions and captions, names of patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .shapes_drawing import (
    COLOURS,
    RADIUS,
    SEPARATION,
    SHAPES,
    SIDE,
    TRAIN_PAIRS,
    Thing,
    apart,
    draw,
    jittered_rgb,
    random_background,
    relation,
)
from .train_architecture import COLUMNS, GRID, PATCH, ROWS, THIRDS_ACROSS, THIRDS_DOWN

IGNORED = -100
# The share of questions about a relation; the others ask for a colour, a shape, a row or a column.
RELATION_SHARE = 0.6


@dataclass(frozen=True)
class Block:
    """A text after the image, and the words to be predicted: (place of the token before the word, word)."""

    words: tuple[str, ...]
    targets: tuple[tuple[int, str], ...]
    about_relation: bool = False


def random_scene(
    rng: np.random.Generator, count: int, *, separation: float = SEPARATION
) -> tuple[Thing, ...]:
    """Objects of training pairs; the first two stand in a clear relation."""
    while True:
        things = []
        for i in rng.choice(len(TRAIN_PAIRS), count, replace=False):
            colour, shape = TRAIN_PAIRS[i]
            radius = float(rng.uniform(*RADIUS))
            x, y = (float(at) for at in rng.uniform(radius + 1, SIDE - radius - 1, 2))
            things.append(Thing(colour, shape, x, y, radius, jittered_rgb(colour, rng)))
        if apart(things, separation) and relation(things[0], things[1]) is not None:
            return tuple(things)


def scene_pixels(things: Sequence[Thing], rng: np.random.Generator) -> NDArray[np.float32]:
    """(3, SIDE, SIDE) in [-1, 1], as the processor makes them."""
    image = draw(things, random_background(rng), float(rng.uniform(0, 6)), rng)
    scaled: NDArray[np.float32] = image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1
    return scaled


def question(text: str, answer: str, *, about_relation: bool = False) -> Block:
    """The question as the chat template writes it; the answer, then the end, are to be predicted."""
    words = (*text.split(), "assistant", answer)
    return Block(words, ((len(words) - 2, answer), (len(words) - 1, "</s>")), about_relation)


def random_question(things: Sequence[Thing], rng: np.random.Generator) -> Block:
    """A question with exactly one answer in this scene."""
    ask = _relation_question if rng.random() < RELATION_SHARE else _ASKED[rng.integers(len(_ASKED))]
    while True:
        a, b = (things[i] for i in rng.permutation(len(things))[:2])
        asked = ask(a, b, things)
        if asked is not None:
            return asked
        ask = _relation_question if ask is _relation_question else _ASKED[rng.integers(len(_ASKED))]


def random_caption(things: Sequence[Thing], rng: np.random.Generator) -> Block:
    """Two objects and their cells: `the red square c3 r5 and the blue circle c6 r2`."""
    words: list[str] = []
    targets: list[tuple[int, str]] = []
    for i in rng.permutation(len(things))[:2]:
        thing, start = things[i], len(words)
        column, row = COLUMNS[int(thing.x / PATCH)], ROWS[int(thing.y / PATCH)]
        targets += [(start + 1, thing.shape), (start + 2, column), (start + 3, row)]
        words += ["the", thing.colour, thing.shape, column, row, "and"]
    return Block(tuple(words[:-1]), tuple(targets))


def patch_names(things: Sequence[Thing]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Colour and shape of each patch as numbers in COLOURS and SHAPES, one more for the background.

    IGNORED where a patch is at the edge of an object.
    """
    middle = (np.arange(GRID) + 0.5) * PATCH
    x, y = (axis.ravel() for axis in np.meshgrid(middle, middle))
    colours = np.full(GRID * GRID, len(COLOURS), np.int64)
    shapes = np.full(GRID * GRID, len(SHAPES), np.int64)
    for thing in things:
        distance = np.hypot(x - thing.x, y - thing.y)
        for names, number in (
            (colours, list(COLOURS).index(thing.colour)),
            (shapes, SHAPES.index(thing.shape)),
        ):
            names[distance < thing.radius + 5] = IGNORED
            names[distance < max(0.8 * thing.radius, 4.5)] = number
    return colours, shapes


Asked = Callable[[Thing, Thing, Sequence[Thing]], Block | None]


def _relation_question(a: Thing, b: Thing, things: Sequence[Thing]) -> Block | None:
    answer = relation(a, b)
    if answer is None:
        return None
    return question(f"where is the {a.name} relative to the {b.name} ?", answer, about_relation=True)


def _colour_question(a: Thing, b: Thing, things: Sequence[Thing]) -> Block | None:
    alone = sum(thing.shape == a.shape for thing in things) == 1
    return question(f"what colour is the {a.shape} ?", a.colour) if alone else None


def _shape_question(a: Thing, b: Thing, things: Sequence[Thing]) -> Block | None:
    return question(f"what shape is the {a.colour} object ?", a.shape) if _only_colour(a, things) else None


def _row_question(a: Thing, b: Thing, things: Sequence[Thing]) -> Block:
    return question(f"which row is the {a.name} in ?", THIRDS_DOWN[int(3 * a.y / SIDE)])


def _column_question(a: Thing, b: Thing, things: Sequence[Thing]) -> Block:
    return question(f"which column is the {a.name} in ?", THIRDS_ACROSS[int(3 * a.x / SIDE)])


def _row_by_colour(a: Thing, b: Thing, things: Sequence[Thing]) -> Block | None:
    if not _only_colour(a, things):
        return None
    return question(f"which row is the {a.colour} object in ?", THIRDS_DOWN[int(3 * a.y / SIDE)])


def _column_by_colour(a: Thing, b: Thing, things: Sequence[Thing]) -> Block | None:
    if not _only_colour(a, things):
        return None
    return question(f"which column is the {a.colour} object in ?", THIRDS_ACROSS[int(3 * a.x / SIDE)])


def _only_colour(a: Thing, things: Sequence[Thing]) -> bool:
    return sum(thing.colour == a.colour for thing in things) == 1


_ASKED: tuple[Asked, ...] = (
    _colour_question,
    _shape_question,
    _row_question,
    _column_question,
    _row_by_colour,
    _column_by_colour,
)
