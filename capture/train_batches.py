"""Training batches: several texts packed behind one image, each blind to the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .shapes_drawing import SIDE, Thing
from .train_architecture import BEGIN, GRID, IMAGE, PAD, VOCABULARY
from .train_scenes import IGNORED, Block, patch_names, random_scene, scene_pixels

PREFIX = (BEGIN, VOCABULARY["user"], *[IMAGE] * (GRID * GRID))
# The longest text: a relation question with its answer.
LONGEST = 13


@dataclass(frozen=True)
class PackedBatch:
    """One batch: what the model takes, the labels, and which labels answer a relation question."""

    inputs: dict[str, Tensor]
    labels: Tensor
    about_relation: Tensor


def packed_batch(
    rng: np.random.Generator, scenes: int, distractor: float, write: Callable[[Sequence[Thing]], list[Block]]
) -> PackedBatch:
    """Random scenes, each with the same number of texts behind it.

    A text sees `<s> user`, the image and itself. Its position ids start again behind the image, so each
    text is to the model what it would be alone; the image is computed once for all of them.
    """
    drawn = [random_scene(rng, 3 if rng.random() < distractor else 2) for _ in range(scenes)]
    pixels = np.stack([scene_pixels(things, rng) for things in drawn])
    texts = [write(things) for things in drawn]
    width = len(PREFIX) + len(texts[0]) * LONGEST
    ids = np.full((scenes, width), PAD, np.int64)
    ids[:, : len(PREFIX)] = PREFIX
    labels = np.full((scenes, width), IGNORED, np.int64)
    about_relation = np.zeros((scenes, width), bool)
    for row, blocks in enumerate(texts):
        for start, block in zip(range(len(PREFIX), width, LONGEST), blocks, strict=True):
            ids[row, start : start + len(block.words)] = [VOCABULARY[word] for word in block.words]
            for place, word in block.targets:
                labels[row, start + place] = VOCABULARY[word]
            about_relation[row, start + block.targets[0][0]] = block.about_relation
    inputs = {
        "pixel_values": torch.from_numpy(pixels),
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(_positions(width)).expand(scenes, -1),
        "attention_mask": torch.from_numpy(_block_mask(width)).expand(scenes, 1, width, width),
    }
    return PackedBatch(inputs, torch.from_numpy(labels), torch.from_numpy(about_relation))


def patch_batch(rng: np.random.Generator, scenes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of crowded scenes, and the number of the colour and of the shape of each patch."""
    pixels = np.empty((scenes, 3, SIDE, SIDE), np.float32)
    colours = np.empty((scenes, GRID * GRID), np.int64)
    shapes = np.empty((scenes, GRID * GRID), np.int64)
    for i in range(scenes):
        things = random_scene(rng, int(rng.integers(3, 5)), separation=18)
        pixels[i] = scene_pixels(things, rng)
        colours[i], shapes[i] = patch_names(things)
    return torch.from_numpy(pixels), torch.from_numpy(colours), torch.from_numpy(shapes)


def _positions(width: int) -> np.ndarray:
    behind = len(PREFIX) + np.arange(width - len(PREFIX)) % LONGEST
    return np.concatenate([np.arange(len(PREFIX)), behind])[None]


def _block_mask(width: int) -> np.ndarray:
    text = np.concatenate(
        [np.full(len(PREFIX), -1), np.arange(width - len(PREFIX)) // LONGEST],
    )
    seen = (text[None, :] == -1) | (text[:, None] == text[None, :])
    return np.tril(seen)
