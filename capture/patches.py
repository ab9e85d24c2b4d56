"""Patches of one image as values: tile, row, column, and the box in the original image that each covers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Geometry:
    """Processed pixel (x, y) is original pixel (x * scale_x + offset_x, y * scale_y + offset_y)."""

    width: int
    height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0

    def boxes(self, processed: NDArray[np.float64]) -> NDArray[np.float32]:
        """Boxes (n, [x0, y0, x1, y1]) in the original image, cut at its edges; NaN for padding."""
        scale = np.array([self.scale_x, self.scale_y] * 2)
        offset = np.array([self.offset_x, self.offset_y] * 2)
        limit = np.array([self.width, self.height] * 2, float)
        boxes: NDArray[np.float64] = np.clip(processed * scale + offset, 0, limit)
        empty = (boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])
        boxes[empty] = np.nan
        return np.asarray(boxes, np.float32)


@dataclass(frozen=True)
class Patches:
    """One row a token of one image; tokens that are no patch (a class token) have row and column -1, box NaN.

    A class token has the tile that it sums up; a separator between tiles has tile -1.
    """

    tile: NDArray[np.int16]
    row: NDArray[np.int16]
    col: NDArray[np.int16]
    box: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.row)

    def behind(self, count: int) -> Patches:
        """The same patches behind `count` tokens that are none, but belong to the same tile."""
        none = np.full(count, -1, np.int16)
        return Patches(
            np.concatenate([np.full(count, self.tile[0], np.int16), self.tile]),
            np.concatenate([none, self.row]),
            np.concatenate([none, self.col]),
            np.concatenate([np.full((count, 4), np.nan, np.float32), self.box]),
        )

    def as_tile(self, tile: int) -> Patches:
        """The same patches as another crop of the image."""
        return replace(self, tile=np.full(len(self), tile, np.int16))

    def take(self, order: NDArray[np.int64]) -> Patches:
        """Some of the patches, in the given order."""
        return Patches(self.tile[order], self.row[order], self.col[order], self.box[order])


@dataclass(frozen=True)
class ImageLayout:
    """The tokens of one image: the decoder's placeholders, and the encoder's own, in order."""

    decoder: Patches
    encoder: Patches


NO_PATCHES = Patches(
    np.zeros(0, np.int16), np.zeros(0, np.int16), np.zeros(0, np.int16), np.zeros((0, 4), np.float32)
)


def placeless(count: int) -> Patches:
    """Tokens that stand for no part of an image, and for no crop of it."""
    none = np.full(count, -1, np.int16)
    return Patches(none, none, none, np.full((count, 4), np.nan, np.float32))


def end_to_end(parts: Sequence[Patches]) -> Patches:
    """The patches of several tiles, one after another."""
    return Patches(
        np.concatenate([part.tile for part in parts]),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.col for part in parts]),
        np.concatenate([part.box for part in parts]),
    )


def square_grid(geometry: Geometry, rows: int, cols: int, patch: float) -> Patches:
    """Patches of `patch` x `patch` processed pixels, row by row, as tile 0."""
    row, col = (index.ravel() for index in np.indices((rows, cols)))
    corner = np.stack([col, row, col + 1, row + 1], axis=1).astype(np.float64) * patch
    return Patches(
        np.zeros(rows * cols, np.int16), row.astype(np.int16), col.astype(np.int16), geometry.boxes(corner)
    )
