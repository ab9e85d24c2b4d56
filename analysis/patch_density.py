"""Tokens that show the same pixels: how much of a row each pixel gets, over all tiles together."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def patch_density(weights: NDArray[Any], boxes: NDArray[Any]) -> tuple[Floats, Floats, Floats]:
    """The weight on each pixel, every token's spread evenly over its box; exact on the grid of all edges.

    Returns
    -------
    x edges (n + 1,), y edges (m + 1,), density (m, n) per square pixel. Its integral is the sum of `weights`.
    """
    boxes = np.asarray(boxes, np.float64)
    x_edges, y_edges, covered = _on_grid(np.asarray(weights, np.float64) / _areas(boxes), boxes)
    # What the differences leave of cells that no token shows is rounding.
    return x_edges, y_edges, np.maximum(covered, 0)


def overlaps(boxes: NDArray[Any]) -> bool:
    """Whether two boxes share more than rounding of their area."""
    boxes = np.asarray(boxes, np.float64)
    x_edges, y_edges, count = _on_grid(np.ones(len(boxes)), boxes)
    cells = np.diff(y_edges)[:, None] * np.diff(x_edges)
    return bool(cells[count > 1.5].sum() > 0.01 * _areas(boxes).min())


def _areas(boxes: Floats) -> Floats:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def _on_grid(values: Floats, boxes: Floats) -> tuple[Floats, Floats, Floats]:
    """Sums of the values of the boxes that cover each cell between neighbouring edges."""
    # Edges of different tiles that mean the same pixel differ by rounding.
    boxes = boxes.round(3)
    x_edges, y_edges = np.unique(boxes[:, [0, 2]]), np.unique(boxes[:, [1, 3]])
    left, right = (np.searchsorted(x_edges, boxes[:, side]) for side in (0, 2))
    top, bottom = (np.searchsorted(y_edges, boxes[:, side]) for side in (1, 3))
    corners = np.zeros((len(y_edges), len(x_edges)))
    for rows, columns, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(corners, (rows, columns), sign * values)
    return x_edges, y_edges, corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]
