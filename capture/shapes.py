"""Shapes: a drawn dataset in the spirit of What'sUp, in which only the relation changes within a set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import numpy as np
from PIL import Image

from mechanistic.store.errors import DatasetError

from .dataset import Sample, Scalar, encode_png
from .shapes_drawing import (
    ALL_PAIRS,
    HELD_OUT_PAIRS,
    RADIUS,
    RELATIONS,
    SIDE,
    TRAIN_PAIRS,
    Pair,
    Thing,
    apart,
    box,
    draw,
    jittered_rgb,
    random_background,
    relation,
)

# To be raised with every change that alters a sample: stored runs name it in their dataset hash.
GENERATOR_VERSION = 1
SPLITS = ("held_out", "train")
_LAYOUT, _NOISE, _OPTIONS = range(3)


@dataclass(frozen=True)
class Shapes:
    """Two objects, sometimes a third, and where the first is relative to the second.

    Sample i depends on the seed, the split, the share of distractors and i alone. Samples 4g to 4g+3 are one
    minimal-pair set: the same two objects, sizes, colours, background and noise, standing left, right, above
    and below in this order. Right is left with the two objects swapped; above and below are these two
    mirrored at the main diagonal, with the distractor. So answers are balanced, names and colours say
    nothing about them, and the best guess from the place of the first object alone is right in 68 % (an
    object that is left of another tends to be in the left half).

    `split="held_out"`: at least one of the two objects is a colour-shape pair that is in no sample of
    `split="train"`, and in no image that spatial-tiny was trained on.
    `distractor` is the share of sets with a third object, which no question mentions.

    Raises
    ------
    DatasetError    an option out of its range.
    """

    num_samples: int = 400
    seed: int = 0
    distractor: float = 0.25
    split: str = "held_out"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DatasetError(
                f"shapes has no split {self.split!r}; it has {' and '.join(SPLITS)}.",
                "Use --split held_out, or Shapes(split='held_out').",
            )
        if self.num_samples < 1 or self.seed < 0:
            raise DatasetError(
                f"shapes: num_samples={self.num_samples}, seed={self.seed}.",
                "Use 1 sample or more, a seed of 0 or more: --num-samples 400 --seed 0, Shapes(400, seed=0).",
            )
        if not 0 <= self.distractor <= 1:
            raise DatasetError(
                f"shapes: distractor={self.distractor} is not a share of the sets.",
                "Use a number from 0 (two objects) to 1 (always a third): Shapes(distractor=0.25).",
            )

    @property
    def name(self) -> str:
        return "shapes"

    def fingerprint(self) -> str:
        """SHA-256 over the generator's version and every option."""
        specification = {"dataset": self.name, "generator": GENERATOR_VERSION, **asdict(self)}
        return hashlib.sha256(json.dumps(specification, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int, /) -> Sample:
        if not -self.num_samples <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        index %= self.num_samples
        number, place = divmod(index, len(RELATIONS))
        things = stand(self._layout(number), RELATIONS[place])
        subject, other = things[:2]
        return Sample(
            sample_id=f"shapes-{self.split}-{self.seed}-{index:05d}",
            images=(self._image(things, number),),
            question=f"where is the {subject.name} relative to the {other.name} ?",
            options=tuple(str(word) for word in self._rng(index, _OPTIONS).permutation(RELATIONS)),
            answer=RELATIONS[place],
            relation=RELATIONS[place],
            subject=subject.name,
            object=other.name,
            group=f"shapes-{self.split}-{self.seed}-set-{number:05d}",
            extra={"index": index, **_columns(things)},
        )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(self.num_samples))

    def _rng(self, number: int, purpose: int) -> np.random.Generator:
        return np.random.default_rng(
            [GENERATOR_VERSION, SPLITS.index(self.split), self.seed, number, purpose]
        )

    def _layout(self, number: int) -> tuple[Thing, ...]:
        """The set's objects, placed so that the first is left of the second."""
        rng = self._rng(number, _LAYOUT)
        count = 3 if rng.random() < self.distractor else 2
        pairs = self._pairs(rng, count)
        radii = [float(rng.uniform(*RADIUS)) for _ in pairs]
        colours = [jittered_rgb(colour, rng) for colour, _ in pairs]
        # One margin for all, because the objects change places.
        margin = max(radii) + 1
        while True:
            xy = rng.uniform(margin, SIDE - margin, (count, 2))
            things = tuple(
                Thing(*pair, float(x), float(y), radius, rgb)
                for pair, (x, y), radius, rgb in zip(pairs, xy, radii, colours, strict=True)
            )
            if apart(things) and relation(things[0], things[1]) == "left":
                return things

    def _pairs(self, rng: np.random.Generator, count: int) -> list[Pair]:
        pool = ALL_PAIRS if self.split == "held_out" else TRAIN_PAIRS
        while True:
            pairs = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
            if self.split == "train" or any(pair in HELD_OUT_PAIRS for pair in pairs[:2]):
                return pairs

    def _image(self, things: tuple[Thing, ...], number: int) -> bytes:
        rng = self._rng(number, _NOISE)
        pixels = draw(things, random_background(rng), float(rng.uniform(0, 6)), rng)
        return encode_png(Image.fromarray(pixels))


def stand(things: tuple[Thing, ...], wanted: str) -> tuple[Thing, ...]:
    """The objects of a set, given with the first left of the second, so that it stands as `wanted`."""
    subject, other, *rest = things
    if wanted in ("right", "below"):
        subject, other = replace(subject, x=other.x, y=other.y), replace(other, x=subject.x, y=subject.y)
    standing = (subject, other, *rest)
    if wanted in ("above", "below"):
        standing = tuple(replace(thing, x=thing.y, y=thing.x) for thing in standing)
    return standing


def _columns(things: tuple[Thing, ...]) -> dict[str, Scalar]:
    subject, other, *rest = things
    columns: dict[str, Scalar] = {
        "distractor": bool(rest),
        "distractor_name": rest[0].name if rest else "",
    }
    for role, thing in (("subject", subject), ("object", other)):
        columns |= {f"{role}_x": thing.x, f"{role}_y": thing.y}
        columns |= {
            f"{role}_{edge}": at for edge, at in zip(("x0", "y0", "x1", "y1"), box(thing), strict=True)
        }
    return columns
